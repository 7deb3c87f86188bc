"""The numbers of each run, and of each schedule over its seeds."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from analysis.load import Run, Sweep
from analysis.statistics import Estimate, Interval, estimate, interquartile
from pipeline.config import Config
from pipeline.identity import identity_fields

_TASK_LETTERS = 24  # of a value: a fingerprint is longer
EMPTY = "(empty)"  # in place of a label that nobody would see
TRAIN_WINDOW = 0.05  # the final training loss is the mean over this last share of the tokens


@dataclass(frozen=True)
class RunNumbers:
    """What one run measured, up to where it got; None is what its record does not hold."""

    steps: float | None
    tokens: float | None
    mean_batch: float | None  # sequences per step
    final_batch: float | None
    train_loss: float | None  # mean over the last 5 % of the run's tokens, or steps where none are counted
    val_loss: float | None  # after the last step
    seconds: float | None  # of training, without evaluation
    tokens_per_second: float | None
    val_accuracy: float | None = None  # these at the end as well, of labelled samples
    val_auc: float | None = None
    gap: float | None = None  # of the objective, above its least value
    grad_norm: float | None = None  # of the gradient over all samples to train on
    val_loss_averaged: float | None = None  # of the mean of iterates, where the run keeps one
    val_accuracy_averaged: float | None = None
    val_auc_averaged: float | None = None
    gradients: float | None = None  # evaluated in all: those of samples over samples to train on
    losses: float | None = None  # without a gradient, those of a line search: over samples to train on


# Of those fields that not all sweeps have: the column, if it is one, and how a reader calls it.
MORE: dict[str, tuple[str | None, str]] = {
    "val_accuracy": ("val/accuracy", "validation accuracy"),
    "val_auc": ("val/auc", "validation AUC"),
    "gap": ("exact/gap", "optimality gap"),
    "grad_norm": ("exact/grad_norm", "exact gradient norm"),
    "val_loss_averaged": ("val/loss_averaged", "validation loss, mean iterate"),
    "val_accuracy_averaged": ("val/accuracy_averaged", "validation accuracy, mean iterate"),
    "val_auc_averaged": ("val/auc_averaged", "validation AUC, mean iterate"),
    "gradients": ("epochs", "full gradient evaluations"),
    "losses": (None, "full loss evaluations"),
}


_LOSSES = ("train_loss", "val_loss")


@dataclass(frozen=True)
class Schedule:
    """The runs that differ in nothing but their seed. Means are over the runs that finished, one per seed;
    those of losses are NaN where a run diverged."""

    label: str
    axes: dict[str, str]
    settings: dict[str, str]  # of the batch group, where schedules differ
    rest: str | None  # every other setting that decides a result, to tell like from unlike
    task: dict[str, str]  # what its losses are losses of; {} where nothing is known
    runs: list[Run]  # that count or are to come
    superseded: list[Run]  # by a newer finished run of the same seed: they count nowhere
    broken: list[Run]  # that were ended because a loss, a gradient or the weights were no finite numbers
    numbers: dict[int, RunNumbers]  # by point, finished runs only
    val_loss: Estimate | None
    val_loss_iqm: Interval | None  # the interquartile mean, of enough seeds
    train_loss: Estimate | None
    diverged: int  # the broken ones, and finished ones whose final validation loss is no finite number

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.point in self.numbers]

    @property
    def unit(self) -> str:
        """Of what its budget counts."""
        return "samples" if any(run.labelled for run in self.runs) else "tokens"

    @property
    def budgets(self) -> set[int]:
        """In tokens; of runs whose budget nobody wrote down, what they have read."""
        known = {run.config.budget_tokens for run in self.runs if run.config}
        return known or {round(n.tokens) for n in self.numbers.values() if n.tokens is not None}

    def mean(self, number: str) -> float | None:
        found = estimate([v for n in self.numbers.values() if (v := getattr(n, number)) is not None])
        return found.mean if found else None

    def by_seed(self, number: str) -> dict[str, float]:
        """A loss of a broken run is NaN: without it the seeds that did not diverge would speak for all."""
        values = {run.seed: getattr(self.numbers[run.point], number) for run in self.finished}
        if number in _LOSSES:
            values |= {run.seed: math.nan for run in self.broken}
        return {seed: value for seed, value in values.items() if value is not None}


def run_numbers(rows: Mapping[int, pl.DataFrame]) -> dict[int, RunNumbers]:
    """The numbers of every point that has a record."""
    return {point: _numbers(own) for point, own in rows.items()}


def _numbers(rows: pl.DataFrame) -> RunNumbers:
    # Of the last row, whichever kind: a throttled log may hold the final evaluation, not the step before it.
    last = rows.select("step", "tokens", "time", "sequences").row(-1)
    # What foreign runs log as a counter need not be a number.
    steps, tokens, seconds, sequences = (v if v is not None and math.isfinite(v) else None for v in last)
    evaluations = rows.filter(pl.col("val/loss").is_not_null() & (pl.col("step") == last[0]))
    return RunNumbers(
        steps=steps,
        tokens=tokens,
        mean_batch=sequences / steps if sequences and steps else None,
        final_batch=_final_batch(rows.filter(pl.col("batch/size").is_not_null())),
        train_loss=_final_train_loss(rows.filter(pl.col("train/loss").is_not_null())),
        val_loss=_last(evaluations["val/loss"]),
        seconds=seconds,
        tokens_per_second=tokens / seconds if tokens and seconds else None,
        losses=_full_losses(rows),
        **{name: _last(evaluations[column]) for name, (column, _) in MORE.items() if column},
    )


def _full_losses(rows: pl.DataFrame) -> float | None:
    """In the unit of `epochs`, which are gradients over samples to train on."""
    counted = rows.select("loss_evaluations", "epochs", "gradient_evaluations").drop_nulls()
    if counted.is_empty():
        return None
    losses, epochs, gradients = counted.row(-1)
    return float(losses * epochs / gradients)


def _last(values: pl.Series) -> float | None:
    return None if values.is_empty() or values[-1] is None else float(values[-1])


def is_cut(training: pl.DataFrame) -> bool:
    """Whether the last step was shortened to end on the budget, so that its size is not the schedule's."""
    requested = training["batch/requested"][-1]
    return requested is not None and training["batch/size"][-1] < requested and len(training) > 1


def _final_batch(training: pl.DataFrame) -> float | None:
    return None if training.is_empty() else float(training["batch/size"][-2 if is_cut(training) else -1])


def _final_train_loss(training: pl.DataFrame) -> float | None:
    """Mean loss per token over the window: each step counts by its tokens inside it."""
    if training.is_empty():
        return None
    axis = "tokens" if training["tokens"].is_finite().fill_null(False).all() else "step"
    start = float(training[axis][-1]) * (1 - TRAIN_WINDOW)
    before = pl.col(axis).shift(1).fill_null(0.0)
    inside = training.select(
        loss="train/loss", weight=pl.col(axis) - pl.max_horizontal(before, pl.lit(start))
    ).filter(pl.col("weight").is_finite() & (pl.col("weight") > 0))
    if inside.is_empty():
        return None
    return float(np.average(inside["loss"].to_numpy(), weights=inside["weight"].to_numpy()))


def summarise(sweep: Sweep, numbers: Mapping[int, RunNumbers]) -> list[Schedule]:
    """The schedules in the order of the manifest."""
    groups = _groups(sweep.runs)
    labels = _labels([_setting(runs) for runs in groups], sweep, groups)
    settings = _distinguishing([_batch_settings(runs) for runs in groups])
    described = zip(labels, settings, groups, strict=True)
    return [_schedule(label, own, runs, numbers) for label, own, runs in described]


def _groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that agree on every axis but the seed, and on every setting as well.

    A sweep repeated after conf/ was edited holds runs of the same axes that are not the same schedule. A run
    without a config goes to the first schedule with its axes.
    """
    groups: dict[tuple[frozenset[tuple[str, str]], str], list[Run]] = {}
    for run in runs:
        if run.config:
            key = (frozenset(run.setting.items()), _fingerprint(run.config))
            groups.setdefault(key, []).append(run)
    without: dict[tuple[frozenset[tuple[str, str]], ...], list[Run]] = {}
    for run in runs:
        if not run.config:
            axes = frozenset(run.setting.items())  # may hold axes that the schedule does not read
            known = (group for (setting, _), group in groups.items() if setting <= axes)
            own = without.setdefault((axes, frozenset(run.task.items())), [])
            next(known, own).append(run)
    found = [sorted(g, key=lambda run: run.point) for g in [*groups.values(), *without.values()] if g]
    return sorted(found, key=lambda group: group[0].point)


def _setting(runs: Sequence[Run]) -> dict[str, str]:
    return next((run.setting for run in runs if run.config), runs[0].setting)


def _fingerprint(config: Config, *without: str) -> str:
    """The settings that decide the result, without the seeds and the groups in `without`."""
    settings = {key: value for key, value in identity_fields(config).items() if key not in ("seed", *without)}
    for group in ("data", "imbalance"):
        if group in settings:
            settings[group] = {key: value for key, value in settings[group].items() if key != "seed"}
    return json.dumps(settings, sort_keys=True)


def _superseded(runs: Sequence[Run]) -> list[Run]:
    """The runs that are no newer than a finished one of the same seed.

    A sweep asked for again after ids changed holds a seed under two ids. Both together are still one seed: as
    two they would narrow every interval without having measured anything more.
    """
    newest: dict[str, Run] = {}
    for run in runs:
        if run.state == "DONE" and (run.seed not in newest or _changed(run) > _changed(newest[run.seed])):
            newest[run.seed] = run
    return [
        run
        for run in runs
        if run.state not in ("INVALID", "UNREADABLE")
        and run.seed in newest
        and _changed(run) < _changed(newest[run.seed])
    ]


def _changed(run: Run) -> tuple[float, int]:
    """Grows with the time of the last change; of two equals the one later in the manifest is newer."""
    return (run.status.updated if run.status else None) or 0.0, run.point


def _schedule(
    label: str, settings: dict[str, str], runs: list[Run], numbers: Mapping[int, RunNumbers]
) -> Schedule:
    superseded = _superseded(runs)
    kept = [run for run in runs if run not in superseded]
    finished = {run.point: numbers[run.point] for run in kept if run.state == "DONE" and run.point in numbers}
    broken = [run for run in kept if _is_broken(run, numbers.get(run.point))]
    losses, train_losses = (
        [v for n in finished.values() if (v := getattr(n, number)) is not None] + [math.nan] * len(broken)
        for number in ("val_loss", "train_loss")
    )
    config = next((run.config for run in runs if run.config), None)
    return Schedule(
        label=label,
        axes=_setting(runs),
        settings=settings,
        rest=_fingerprint(config, "batch") if config else None,
        task=next((run.task for run in runs if run.task), {}),
        runs=kept,
        superseded=superseded,
        broken=broken,
        numbers=finished,
        val_loss=estimate(losses),
        val_loss_iqm=interquartile([losses]),
        train_loss=estimate(train_losses),
        diverged=sum(not math.isfinite(loss) for loss in losses),
    )


def _is_broken(run: Run, numbers: RunNumbers | None) -> bool:
    """Whether a failed run diverged, by its status or, where it comes without (wandb), by its last losses."""
    if run.state != "FAILED":
        return False
    last = (numbers.train_loss, numbers.val_loss) if numbers else ()
    said = run.status is not None and run.status.diverged
    return said or any(loss is not None and not math.isfinite(loss) for loss in last)


def _labels(settings: Sequence[dict[str, str]], sweep: Sweep, groups: Sequence[list[Run]]) -> list[str]:
    """One distinct label for each schedule: short, else with the names of the axes, else numbered."""
    short = [_label(setting, sweep, runs) for setting, runs in zip(settings, groups, strict=True)]
    if len(set(short)) < len(short):
        full = [" · ".join(f"{axis}={value}" for axis, value in setting.items()) for setting in settings]
        both = zip(short, full, strict=True)
        short = [
            long if short.count(brief) > 1 and full.count(long) == 1 and long else brief
            for brief, long in both
        ]
    taken = {label for label in short if short.count(label) == 1}
    labels = []
    for label in short:
        if short.count(label) > 1:
            numbered = (f"{label} ({n})" for n in itertools.count(1))
            label = next(each for each in numbered if each not in taken)
            taken.add(label)
        labels.append(label)
    return labels


def _label(setting: dict[str, str], sweep: Sweep, runs: list[Run]) -> str:
    """norm_test, norm_test · 10m, norm_test · eta=0.2: a bare value where it speaks for itself."""
    if not setting:
        config = next((run.config for run in runs if run.config), None)
        return sweep.common.get("batch") or (config.batch.schedule if config else sweep.name)
    return in_short(setting)


def in_short(setting: Mapping[str, str]) -> str:
    """As a label: `norm_test · eta=0.2`."""
    return " · ".join(
        (value or EMPTY) if "." not in axis else f"{axis.rsplit('.', 1)[-1]}={value}"
        for axis, value in setting.items()
    )


def _batch_settings(runs: list[Run]) -> dict[str, str]:
    """What the schedule reads from the batch group of its config."""
    config = next((run.config for run in runs if run.config), None)
    if config is None:
        return {}
    batch = identity_fields(config)["batch"]
    return {key: show(value) for key, value in batch.items() if value is not None}


def _distinguishing(settings: list[dict[str, str]]) -> list[dict[str, str]]:
    """Each without what all share."""
    known = [own for own in settings if own]
    counts = Counter(item for own in known for item in own.items())
    shared = {item for item, n in counts.items() if n == len(known) > 1}
    return [{key: value for key, value in own.items() if (key, value) not in shared} for own in settings]


def batch_unit(unit: str) -> str:
    """What batches count where budgets count `unit`: a labelled sample is a sequence of one token."""
    return "samples" if unit == "samples" else "sequences"


def comparable(one: Schedule, other: Schedule) -> bool:
    """Whether their losses are losses of the same task, as far as that is known."""
    return one.task == other.task or not one.task or not other.task


def tasks(schedules: Sequence[Schedule]) -> dict[str, list[Schedule]]:
    """The schedules of each task, which goes by what tells it from the others."""
    found: dict[tuple[tuple[str, str], ...], list[Schedule]] = {}
    for schedule in schedules:
        if schedule.task:
            found.setdefault(tuple(schedule.task.items()), []).append(schedule)
    differing = _distinguishing([dict(task) for task in found])
    names = [", ".join(f"{key}={value[:_TASK_LETTERS]}" for key, value in own.items()) for own in differing]
    return dict(zip(names, found.values(), strict=True))


def show(value: object) -> str:
    """As Hydra would have it typed."""
    return str(value).lower() if isinstance(value, bool) else str(value)
