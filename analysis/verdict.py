"""Which schedule is better: one plain sentence per comparison, with the numbers it rests on.

A schedule is better or worse than the baseline when the 95 % interval of the paired difference of their
final validation losses excludes zero, and its p-value stays below 0.05 after correction for all comparisons
of the sweep. The sentence always gives steps and time beside the loss, since a comparison at equal tokens
alone hides what large batches buy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from analysis import numbers as text
from analysis.load import SEED
from analysis.statistics import (
    SIGNIFICANCE,
    Estimate,
    Interval,
    holm,
    improvement,
    interquartile,
    p_value,
    paired_difference,
    t_factor,
)
from analysis.summary import Schedule, comparable, in_short, tasks
from pipeline.config import ConfigError, common_unit, did_you_mean

SAME_BUDGET = 0.01  # budgets that differ by at most this share count as equal tokens

OfDifference = Literal["better", "worse", "not distinguishable", "one seed", "no shared seed"]
Kind = OfDifference | Literal["diverged", "different budget", "not finished", "no baseline"]
DECIDED: tuple[Kind, ...] = ("better", "worse", "not distinguishable")


@dataclass(frozen=True)
class Comparison:
    """`schedule` against `baseline` (labels); `difference` is schedule − baseline, paired by seed."""

    schedule: str
    baseline: str | None
    kind: Kind
    difference: Estimate | None
    seeds: list[str]  # the shared ones
    steps: tuple[float, float] | None  # means over the shared seeds: schedule, baseline
    seconds: tuple[float, float] | None
    statement: str  # how the losses compare
    cost: str  # what it took; empty when unknown
    p: float | None = None  # of the difference; None where the losses give no verdict
    p_adjusted: float | None = None  # corrected for all comparisons of the sweep that have one
    improvement: Interval | None = None  # probability that a seed ends lower than with the baseline

    @property
    def sentence(self) -> str:
        verdict = f": {self.kind}" if self.kind in DECIDED else ""
        return f"{self.statement}{verdict}{'; ' if self.cost else ''}{self.cost}."


# --- the baseline ----------------------------------------------------------------------------------------


def parse_baseline(requests: Sequence[str], schedules: Sequence[Schedule]) -> dict[str, str]:
    """The axis values that make a schedule the baseline. Raises ConfigError listing the choices."""
    choices = list(dict.fromkeys(f"{a}={v}" for schedule in schedules for a, v in schedule.axes.items()))
    for request in requests:
        if request not in choices:
            raise ConfigError(
                f"--baseline {request}: no schedule of this sweep has that." + did_you_mean(request, choices),
                f"Choices: {', '.join(choices) or f'none, since only {SEED} varies'}",
            )
    chosen: dict[str, str] = {}
    for request in requests:
        axis, _, value = request.partition("=")
        if chosen.setdefault(axis, value) != value:
            raise ConfigError(
                f"--baseline {request}: there is --baseline {axis}={chosen[axis]} already, and a baseline "
                f"has one value of each axis"
            )
    return chosen or default_baseline(schedules)


def default_baseline(schedules: Sequence[Schedule]) -> dict[str, str]:
    """The batch of the first constant schedule, else of the first; {} when there is nothing to compare.

    Its other axes are left out, so that each model and each budget has a baseline of its own, unless nothing
    of the batch varies.
    """
    if not schedules:
        return {}
    axes = next(
        (s.axes for s in schedules if s.axes.get("batch", "").startswith("constant")), schedules[0].axes
    )
    batch = {axis: value for axis, value in axes.items() if axis.split(".")[0] == "batch"}
    varies = any(not is_baseline(schedule, batch) for schedule in schedules)
    return batch if varies else dict(axes)


def is_baseline(schedule: Schedule, baseline: dict[str, str]) -> bool:
    """Whether it has all these options."""
    return baseline.items() <= schedule.axes.items()


def counterpart(
    schedule: Schedule, baseline: dict[str, str], schedules: Sequence[Schedule]
) -> Schedule | None:
    """The baseline schedule that agrees with `schedule` on every other axis, so that like meets like.

    An axis that one of the two does not read is no disagreement.
    """
    wanted = schedule.axes | baseline
    candidates = [
        candidate
        for candidate in schedules
        if is_baseline(candidate, baseline)
        and comparable(candidate, schedule)
        and all(wanted.get(axis, value) == value for axis, value in candidate.axes.items())
    ]
    return min(candidates, key=lambda candidate: candidate.rest != schedule.rest, default=None)


# --- comparisons -----------------------------------------------------------------------------------------


def compare_all(schedules: Sequence[Schedule], baseline: dict[str, str]) -> list[Comparison]:
    """Every schedule that is not a baseline against its own."""
    found = [
        compare(schedule, counterpart(schedule, baseline, schedules))
        for schedule in schedules
        if not is_baseline(schedule, baseline)
    ]
    adjusted = holm({c.schedule: c.p for c in found if c.p is not None})
    return [_corrected(comparison, adjusted) for comparison in found]


def _corrected(comparison: Comparison, adjusted: Mapping[str, float]) -> Comparison:
    """With its corrected p-value; of many intervals some leave out zero by chance, and that is no verdict."""
    p = adjusted.get(comparison.schedule)
    found = replace(comparison, p_adjusted=p)
    if p is None or p < SIGNIFICANCE or comparison.kind == "not distinguishable":
        return found
    statement = (
        f"{comparison.statement}; the interval leaves out zero, but not after correction for {len(adjusted)} "
        f"comparisons (p = {text.probability(p)})"
    )
    return replace(found, kind="not distinguishable", statement=statement)


def compare(schedule: Schedule, baseline: Schedule | None) -> Comparison:
    """By itself, as if it were the only comparison."""
    if baseline is None:
        why = f"{schedule.label} has no baseline with the same other settings in this sweep: not compared"
        return Comparison(schedule.label, None, "no baseline", None, [], None, None, why, "")
    own, reference = schedule.by_seed("val_loss"), baseline.by_seed("val_loss")
    difference = paired_difference(own, reference)
    seeds = [seed for seed in own if seed in reference]
    kind = _kind(schedule, baseline, difference)
    steps = _means("steps", schedule, baseline, seeds)
    seconds = _means("seconds", schedule, baseline, seeds)
    statement = _statement(schedule, baseline, kind, difference)
    cost = "" if kind in ("not finished", "different budget", "diverged") else _cost(steps, seconds)
    found = Comparison(
        schedule.label, baseline.label, kind, difference, seeds, steps, seconds, statement, cost
    )
    if kind not in DECIDED or difference is None:
        return found
    return replace(found, p=p_value(difference), improvement=improvement(own, reference))


def _kind(schedule: Schedule, baseline: Schedule, difference: Estimate | None) -> Kind:
    if schedule.val_loss is None or baseline.val_loss is None:
        return "not finished"
    if not _equal_budgets(schedule.budgets | baseline.budgets):
        return "different budget"
    if schedule.diverged or baseline.diverged:
        return "diverged"
    return of_difference(difference)


def of_difference(difference: Estimate | None) -> OfDifference:
    """What the interval of a loss minus that of the baseline says by itself."""
    if difference is None:
        return "no shared seed"
    if difference.low is None or difference.high is None:
        return "one seed"
    if difference.low <= 0 <= difference.high:
        return "not distinguishable"
    return "better" if difference.mean < 0 else "worse"


def _equal_budgets(budgets: set[int]) -> bool:
    return not budgets or max(budgets) - min(budgets) <= SAME_BUDGET * max(budgets)


def _means(
    number: str, schedule: Schedule, baseline: Schedule, seeds: list[str]
) -> tuple[float, float] | None:
    own, reference = schedule.by_seed(number), baseline.by_seed(number)
    common = [seed for seed in seeds if seed in own and seed in reference]
    if not common:
        return None
    return tuple(math.fsum(values[s] for s in common) / len(common) for values in (own, reference))  # type: ignore[return-value]


# --- over several models ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overall:
    """A batch schedule that meets a baseline more than once, as with each of several models."""

    schedule: str
    against: list[str]  # the baselines
    change: Interval  # of the final validation loss, as a share of the baseline's
    pairs: int

    @property
    def sentence(self) -> str:
        low, high = text.interval(100 * self.change.low, 100 * self.change.high).split(" to ")
        decimals = text.decimals_for(50 * (self.change.high - self.change.low))
        return (
            f"{self.schedule} against {' and '.join(self.against)} together: validation loss "
            f"{text.signed(100 * self.change.mean, decimals)}% ({low} to {high}%), the interquartile mean "
            f"over {self.pairs} pairs of runs, with its 95% interval by a bootstrap within each"
        )


def overall(schedules: Sequence[Schedule], comparisons: Sequence[Comparison]) -> list[Overall]:
    """Losses of different models have no common scale, so each difference is a share of the baseline's loss,
    and each comparison is a stratum of the bootstrap. Only where all of them have the seeds for one: over
    those that happen to have them the mean would be another quantity."""
    by_label = {schedule.label: schedule for schedule in schedules}
    groups: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        if comparison.baseline is not None:
            own, reference = by_label[comparison.schedule].axes, by_label[comparison.baseline].axes
            apart = {axis: value for axis, value in own.items() if reference.get(axis) != value}
            groups.setdefault(in_short(apart), []).append(comparison)
    found = []
    for name, group in groups.items():
        if len(group) < 2 or any(comparison.kind not in DECIDED for comparison in group):
            continue
        against = [comparison.baseline or "" for comparison in group]
        shares = [
            _relative(by_label[c.schedule].by_seed("val_loss"), by_label[b].by_seed("val_loss"))
            for c, b in zip(group, against, strict=True)
        ]
        if change := interquartile(shares):
            found.append(Overall(name, against, change, sum(map(len, shares))))
    return found


def _relative(values: Mapping[str, float], baseline: Mapping[str, float]) -> list[float]:
    return [values[seed] / baseline[seed] - 1 for seed in values if seed in baseline]


# --- sentences -------------------------------------------------------------------------------------------


def _statement(schedule: Schedule, baseline: Schedule, kind: Kind, difference: Estimate | None) -> str:
    name, other = schedule.label, baseline.label
    if kind == "not finished":
        which = " or ".join(s.label for s in (schedule, baseline) if s.val_loss is None)
        return f"{name} against {other}: no finished run of {which} yet"
    if kind == "different budget":
        return (
            f"{name} trained on {_budgets(schedule)}, {other} on {_budgets(baseline)} {schedule.unit}: their "
            f"final losses ({_loss(schedule)} and {_loss(baseline)}) are no comparison at equal "
            f"{schedule.unit}"
        )
    if kind == "diverged":
        which = " and ".join(s.label for s in (schedule, baseline) if s.diverged)
        return f"{name} against {other}: runs of {which} diverged, so there is no mean to compare"
    ends = f"{name} ends at validation loss {_loss(schedule)}"
    if difference is None:
        return f"{ends}, {other} at {_loss(baseline)}, but no seed finished in both: not compared"
    if difference.half_width is None or difference.low is None or difference.high is None:
        gap = _gap(difference.mean, text.LOSS_DECIMALS, other)
        return f"{ends}, {gap} (1 seed, so no interval and no verdict)"
    gap = _gap(difference.mean, text.decimals_for(difference.half_width), other)
    limits = text.interval(difference.low, difference.high)
    return f"{ends}, {gap} (95% interval {limits}, {difference.n} seeds)"


def _loss(schedule: Schedule) -> str:
    estimate = schedule.val_loss
    return text.MISSING if estimate is None else text.with_interval(estimate.mean, estimate.half_width)


def _budgets(schedule: Schedule) -> str:
    return " or ".join(text.compact(tokens) for tokens in sorted(schedule.budgets))


def _gap(difference: float, decimals: int, other: str) -> str:
    size = text.fixed(abs(difference), decimals)
    if not float(size.replace(",", "")):
        return f"level with {other}"
    return f"{size} {'higher' if difference > 0 else 'lower'} than {other}"


def _cost(steps: tuple[float, float] | None, seconds: tuple[float, float] | None) -> str:
    if steps is None or not steps[1]:
        return ""
    if steps[0] == steps[1]:
        words = f"it took the same {text.count(steps[0])} optimizer steps"
    else:
        words = (
            f"it took {text.count(steps[0])} optimizer steps instead of {text.count(steps[1])} "
            f"({text.change(*steps)})"
        )
    if seconds is None or not seconds[1]:
        return words
    if text.duration(seconds[0]) == text.duration(seconds[1]):
        return f"{words} and {text.duration(seconds[0])} of training, as the other"
    return (
        f"{words} and {text.duration(seconds[0])} of training instead of {text.duration(seconds[1])} "
        f"({text.change(*seconds)})"
    )


def headline(schedules: Sequence[Schedule], comparisons: Sequence[Comparison]) -> str:
    """The schedule with the lowest mean and what cannot be told from it, or why none can be named."""
    ranked = [s for s in schedules if s.val_loss and math.isfinite(s.val_loss.mean)]
    if not ranked and any(s.finished for s in schedules):
        return "No finished run has a finite validation loss at its end, so there is nothing to compare."
    if not ranked:
        return "No run has finished, so there is nothing to compare yet."
    if len(parts := tasks(ranked)) > 1:
        own = (f"{name}: {headline(each, comparisons)}" for name, each in parts.items())
        return f"Runs of {len(parts)} tasks, whose losses are no comparison. {' '.join(own)}"
    budgets, unit = set().union(*(s.budgets for s in ranked)), common_unit(s.unit for s in ranked)
    if not _equal_budgets(budgets):
        spread = f"{text.compact(min(budgets))} to {text.compact(max(budgets))}"
        return f"Runs trained on {spread} {unit}; only schedules with the same budget are compared."
    best = min(ranked, key=lambda s: s.val_loss.mean if s.val_loss else math.inf)
    after = f" after {text.compact(max(budgets))} {unit}" if budgets else ""
    seeds = best.val_loss.n if best.val_loss else 0
    if len(ranked) == 1:
        return f"{best.label} ends at validation loss {_loss(best)}{after}."
    runs = "1 seed" if seeds == 1 else f"{seeds} seeds"
    lead = f"{best.label} has the lowest mean validation loss{after}: {_loss(best)} ({runs})"
    level = [c for c in comparisons if c.kind == "not distinguishable"]
    if other := next((c.baseline for c in level if c.schedule == best.label), None):
        return f"{lead}, not distinguishable from {other}."
    if others := [c.schedule for c in level if c.baseline == best.label]:
        verb = "is" if len(others) == 1 else "are"
        return f"{lead}; {text.listed(others)} {verb} not distinguishable from it."
    return f"{lead}."


def _unlike(schedule: Schedule, reference: Schedule, baseline: Mapping[str, str]) -> list[str]:
    """The settings outside the batch in which the two differ, but for those that make the baseline one."""
    if schedule.rest is None or reference.rest is None:
        return []
    own, other = (_leaves(json.loads(rest)) for rest in (schedule.rest, reference.rest))
    differing = [key for key in own | other if own.get(key) != other.get(key)]
    return [key for key in differing if not any(f"{key}.".startswith(f"{axis}.") for axis in baseline)]


def _leaves(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = _leaves(value, f"{above}{key}.") if isinstance(value, dict) else {}
        found |= inner or {f"{above}{key}": value}
    return found


def cautions(
    schedules: Sequence[Schedule], comparisons: Sequence[Comparison], baseline: Mapping[str, str]
) -> list[str]:
    """What a reader must know before trusting the verdicts."""
    notes = []
    sizes = [c.difference.n for c in comparisons if c.difference]
    if 1 in sizes:
        notes.append("With one seed there is no interval: with another seed the order may be another.")
    if 2 in sizes:
        notes.append(
            f"With two seeds an interval reaches {t_factor(1):.1f} standard errors to each side, with three "
            f"{t_factor(2):.1f}: another seed is the cheapest way to a sharper verdict."
        )
    decided = sum(c.kind in DECIDED for c in comparisons)
    if decided > 1:
        notes.append(
            f"Better and worse need p below {SIGNIFICANCE:g} after Holm's correction for {decided} "
            f"comparisons. Each 95% interval is that of one comparison, not widened for being one of several."
        )
    notes += [
        f"{ended} of {len(s.finished)} finished runs of {s.label} ended without a finite validation "
        f"loss, so that it has no mean."
        for s in schedules
        if (ended := s.diverged - len(s.broken))
    ]
    notes += [
        f"{len(s.broken)} of {len(s.runs)} runs of {s.label} failed since a loss, a gradient or the weights "
        f"were no finite numbers, so that it has no mean: its other seeds alone would flatter it."
        for s in schedules
        if s.broken
    ]
    if len(parts := tasks(schedules)) > 1:
        notes.append(
            f"Runs of {len(parts)} tasks ({'; '.join(parts)}): a loss of one says nothing about another. "
            f"Each schedule is compared with a baseline of its own task alone; the figures show all."
        )
    axes = [schedule.axes for schedule in schedules]
    if any(axes.count(own) > 1 for own in axes):
        notes.append(
            "Numbered schedules, (1) and (2), have the same axes but ran under different settings; each is "
            "compared with the baseline of its own settings."
        )
    by_label = {schedule.label: schedule for schedule in schedules}
    for c in comparisons:
        if c.baseline and (unlike := _unlike(by_label[c.schedule], by_label[c.baseline], baseline)):
            notes.append(f"{c.schedule} and {c.baseline} differ in more than the batch: {', '.join(unlike)}.")
    superseded = sum(len(s.superseded) for s in schedules)
    if superseded:
        one, many = "1 run is superseded by a newer one", f"{superseded} runs are superseded by newer ones"
        notes.append(
            f"{one if superseded == 1 else many} of the same schedule and seed: each seed counts only once."
        )
    unfinished = sum(len(s.runs) - len(s.finished) for s in schedules)
    if unfinished and any(s.finished for s in schedules):
        many = f"{unfinished} runs are not finished and count in no mean."
        notes.append("1 run is not finished and counts in no mean." if unfinished == 1 else many)
    hosts = {run.status.host for s in schedules for run in s.finished if run.status and run.status.host}
    if len(hosts) > 1:
        unit = common_unit(s.unit for s in schedules)
        notes.append(f"The runs were on {len(hosts)} hosts: their times and {unit}/s compare hosts as well.")
    unevaluated = sum(n.val_loss is None for s in schedules for n in s.numbers.values())
    if unevaluated:
        notes.append(
            f"Without an evaluation after the last step: {unevaluated} finished run(s); they have no final "
            f"validation loss."
        )
    return notes
