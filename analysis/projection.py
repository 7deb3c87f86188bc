"""Training time and GPU-hours at other GPU counts, from the batch traces and step times of a sweep.

`project(step_traces(sweep, schedules), baselines)`. The batch trace of a run is taken as logged and each of
its steps as analysis.step_cost predicts it. Ranks beyond the micro-batches of a step have nothing to do in
it: that is what a larger batch buys.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from analysis.load import Sweep
from analysis.step_cost import (
    MIN_STEPS,
    WARM_UP,
    Array,
    Cell,
    Check,
    Cost,
    Machine,
    StepTrace,
    cells,
    checks,
    cost,
    grouped,
    regular,
    step_trace,
)
from analysis.summary import Schedule
from analysis.synchronisation import Network, Synchronisation, mesh_at, synchronisation
from pipeline.config import Config, ConfigError, LlamaConfig, to_tree
from pipeline.identity import identity_fields
from pipeline.store import RunDirectory, home

GPU_COUNTS = (8, 64, 512, 4096)
RUNS_NETWORK = Network()  # that the runs are taken to have had, as far as their widths do not tell
INSEPARABLE = (
    f"nothing tells its micro-batches from the rest of a step. That takes {MIN_STEPS} steps each of two "
    f"numbers of micro-batches per step and rank, as with a constant batch twice as large"
)
UNTIMED = (
    f"no step of its log can be used, for want of a time or of its number of micro-batches "
    f"({WARM_UP} steps of each attempt are left out)"
)
WORTH = 0.1  # the least saving for which another doubling of the GPUs is worth its while
MOST_DOUBLINGS = 20


def step_traces(sweep: Sweep, schedules: Sequence[Schedule]) -> dict[str, list[StepTrace]]:
    """Of the finished runs of each schedule, by its label."""
    found = {}
    for schedule in schedules:
        found[schedule.label] = [
            step_trace(
                run.config,
                machine_of(run.id, run.config),
                sweep.rows[run.point],
                run.status.host if run.status else None,
            )
            for run in schedule.finished
            if run.id and run.config
        ]
    return found


def machine_of(run: str, config: Config) -> Machine | None:
    """What the newest attempt of a run found, as far as its file can be read."""
    logs = RunDirectory(home() / "runs" / run).logs
    files = sorted(logs.glob("attempt-*.environment.json"), key=lambda path: path.stat().st_mtime)
    try:
        found: dict[str, Any] = json.loads(files[-1].read_text(encoding="utf-8"))
        gpus = [gpu["name"] for gpu in found["gpus"]]
        return Machine(int(found["cpus"]), gpus[0] if gpus and config.launch.device != "cpu" else None)
    except (IndexError, KeyError, TypeError, ValueError, OSError):
        return None


# --- the projection -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """What runs of the same arithmetic on the same hardware tell of a step."""

    labels: list[str]  # of their schedules
    example: StepTrace
    cost: Cost
    sync_scale: float  # of the modelled synchronisation, in the projection
    steps: int  # that it rests on
    ranks: list[int]  # data-parallel widths measured
    typical: float  # share of the training time of those steps that their medians account for
    checks: list[Check]
    perhaps_unlike: list[str]  # the hosts of its runs, where these may be of different hardware

    def sync_at(self, width: int, network: Network) -> Synchronisation:
        config = self.example.config
        modelled = synchronisation(config, *mesh_at(config.parallel, width), network)
        return modelled.times(self.sync_scale)


@dataclass(frozen=True)
class Forecast:
    """Of a schedule on so many GPUs: means over its seeds."""

    gpus: int
    seconds: float
    gpu_hours: float
    speedup: float | None  # over the baseline on as many GPUs
    busy: float  # share of the GPU time in micro-batches


@dataclass(frozen=True)
class Outlook:
    """What a schedule would take, on more GPUs."""

    schedule: str
    baseline: str | None
    seeds: int
    statistics_s: float  # per micro-batch of a step that takes statistics
    forecasts: list[Forecast]  # on the GPU counts asked for
    line: list[Forecast]  # from the least to the greatest of them, for drawing
    enough: int  # GPUs beyond which another doubling saves less than WORTH

    def on(self, gpus: int) -> Forecast | None:
        return next((forecast for forecast in self.forecasts if forecast.gpus == gpus), None)


@dataclass(frozen=True)
class Projection:
    """All that `project` found; its words are in analysis.projection_notes."""

    gpu_counts: tuple[int, ...]
    network: Network
    given: bool  # the network was asked for, not the one that the runs saw
    fits: list[Fit]
    outlooks: list[Outlook]
    missing: dict[str, str]  # label of a schedule -> why it has no outlook
    by_rank: list[str]  # labels of schedules whose batches depend on the number of ranks


def project(
    runs: Mapping[str, Sequence[StepTrace]],
    baselines: Mapping[str, str | None],
    gpu_counts: Sequence[int] = GPU_COUNTS,
    network: Network | None = None,
) -> Projection:
    """Of each schedule, by label, from the `step_traces` of its runs.

    `baselines`: with which schedule each is compared. network None: synchronisation takes as long as the
    sweep measured it at several widths, and as Network() says where it did not. Another network changes what
    is projected, never what was measured.
    """
    if wrong := [count for count in gpu_counts if count < 1]:
        raise ConfigError(f"{wrong[0]} GPUs: must be at least 1")
    missing = {label: why for label, own in runs.items() if (why := _unusable(own))}
    usable = {label: own for label, own in runs.items() if label not in missing}
    alike = grouped([(label, own) for label, own in usable.items()], lambda item: arithmetic(item[1][0]))
    fits, loads = [], {}
    for group in alike.values():
        labels = [label for label, _ in group]
        own_runs = [run for _, own in group for run in own]
        fit, in_micro = _fit(labels, own_runs, given=network is not None)
        if fit is None:
            used = any(run.steps["regular"].any() for run in own_runs)
            missing |= dict.fromkeys(labels, INSEPARABLE if used else UNTIMED)
            continue
        fits.append(fit)
        for label, own in group:
            extra_s = 0.0 if in_micro else statistics_s(own, fit.cost)
            loads[label] = _load(own, fit, extra_s, network or Network())
    outlooks = [
        _outlook(label, loads[label], baseline, loads.get(baseline or ""), gpu_counts)
        for label in runs
        if label in loads
        for baseline in (baselines.get(label),)
    ]
    by_rank = [label for label in loads if compares_ranks(runs[label][0].config)]
    counts = tuple(sorted(set(gpu_counts)))
    return Projection(counts, network or Network(), network is not None, fits, outlooks, missing, by_rank)


def compares_ranks(config: Config) -> bool:
    """Whether the schedule measures gradients of whole ranks rather than of micro-batches."""
    batch = identity_fields(config)["batch"]
    if batch["schedule"] == "coordinate_norm_test" and "estimator" not in batch:
        return True
    return batch.get("estimator") in ("worker", "paper")


def _unusable(own: Sequence[StepTrace]) -> str | None:
    if not own:
        return "none of its runs has finished"
    if not all(run.whole for run in own):
        return "its log misses steps, of which the run's own record holds every one"
    if not isinstance(own[0].config.model, LlamaConfig):
        return "only language models are projected"
    if (sync := own[0].config.sync.method) != "allreduce":
        return f"it has sync={sync}, and only ranks that average gradients in every step are projected"
    if (imbalance := own[0].config.imbalance).read:
        how = f"={imbalance.kind}" if imbalance.kind != "none" else f".compute_ms={imbalance.compute_ms:g}"
        return f"its ranks were slowed down on purpose (imbalance{how})"
    if len({arithmetic(run) for run in own}) > 1:
        return "its runs were on different hardware"
    return None


def arithmetic(run: StepTrace) -> str:
    """What decides the time of a micro-batch and of an update on one rank: all but the widths."""
    parallel = {key: value for key, value in to_tree(run.config.parallel).items() if key not in _WIDTHS}
    if run.config.parallel.strategy == "single":
        parallel["strategy"] = "ddp"  # of one rank
    model = {key: value for key, value in to_tree(run.config.model).items() if key != "name"}
    data, optim = run.config.data, identity_fields(run.config)["optim"]
    optimizer = [optim["name"], optim.get("base")]
    decisive = [model, parallel, data.sequence_length, data.micro_batch, optimizer, run.hardware]
    return json.dumps(decisive, sort_keys=True)


_WIDTHS = ("replicate", "shard")


def _fit(labels: list[str], runs: list[StepTrace], *, given: bool) -> tuple[Fit | None, bool]:
    """And whether a micro-batch holds the taking of statistics, since too few steps do without.

    given: the projection is for another network, on which synchronisation takes as long as modelled.
    """
    for measured in (False, True):
        found = cells(runs, RUNS_NETWORK, measured=measured)
        if (fitted := cost(found)) and fitted.micro_s + fitted.step_s > 0:
            break
    else:
        return None, False
    steps = pl.concat([regular(run) for run in runs])
    if not measured:
        steps = steps.filter(~pl.col("measured"))
    medians = sum(cell.steps * cell.seconds for cell in found)
    scale = 1.0 if given or fitted.sync_scale is None else fitted.sync_scale
    fit = Fit(
        labels=labels,
        example=max(runs, key=lambda run: run.config.parallel.data_ranks),  # shows how its mesh grows
        cost=fitted,
        sync_scale=scale,
        steps=sum(cell.steps for cell in found),
        ranks=sorted({math.prod(cell.mesh) for cell in found}),
        typical=medians / float(steps["alone"].sum()),
        checks=checks(found),
        perhaps_unlike=_perhaps_unlike(runs),
    )
    return fit, measured


def _perhaps_unlike(runs: Sequence[StepTrace]) -> list[str]:
    """The hosts of runs of which nobody knows the hardware, unless they are one host."""
    unknown = [run.host for run in runs if run.machine is None]
    if len(unknown) < 2 or (len(set(unknown)) == 1 and unknown[0]):
        return []
    return sorted({host or "unknown" for host in unknown})


def statistics_s(own: Sequence[StepTrace], fitted: Cost) -> float:
    """What taking statistics adds to a micro-batch of this schedule: the median over its measured steps."""
    extra: list[float] = []
    for run in own:
        modelled = synchronisation(run.config, *run.mesh, RUNS_NETWORK)
        for rounds, seconds in regular(run).filter("measured").select("accumulation", "alone").iter_rows():
            plain = fitted.in_cell(Cell(run.mesh, int(rounds), seconds, 1, modelled))
            extra.append((seconds - plain) / rounds)
    return max(0.0, float(np.median(extra))) if len(extra) >= MIN_STEPS else 0.0


@dataclass(frozen=True)
class _Load:
    """The steps of a schedule by what they take, and what that costs."""

    fit: Fit
    network: Network
    statistics_s: float
    seeds: int
    micro_batches: Array  # of each kind of step
    measured: Array  # 1 where statistics are taken
    steps: Array  # of each kind, mean over seeds

    @property
    def tensor(self) -> int:
        return self.fit.example.config.parallel.tensor

    def seconds(self, gpus: int) -> float:
        """Of training, mean over seeds."""
        width = gpus // self.tensor
        sync = self.fit.sync_at(width, self.network)
        rounds = np.ceil(self.micro_batches / width)
        once_s = self.fit.cost.step_s + sync.per_step_s
        return float(np.sum(self.steps * (rounds * (self._micro_s() + sync.per_micro_s) + once_s)))

    def busy(self, gpus: int) -> float:
        """Share of the time of all GPUs in which they compute micro-batches."""
        computed = float(np.sum(self.steps * self.micro_batches * self._micro_s()))
        return computed / (gpus // self.tensor * self.seconds(gpus))

    def _micro_s(self) -> Array:
        return self.fit.cost.micro_s + self.measured * self.statistics_s

    def enough(self) -> int:
        """The first count of GPUs whose doubling saves too little."""
        counts = [self.tensor * (1 << n) for n in range(MOST_DOUBLINGS + 1)]
        seconds = [self.seconds(count) for count in counts]
        pairs = zip(counts, itertools.pairwise(seconds), strict=False)
        return next((count for count, (few, many) in pairs if many > (1 - WORTH) * few), counts[-1])


def _load(own: Sequence[StepTrace], fit: Fit, extra_s: float, network: Network) -> _Load:
    kinds = pl.concat([run.steps.select("batch", "measured") for run in own])
    counted = kinds.group_by("batch", "measured", maintain_order=True).len()
    return _Load(
        fit=fit,
        network=network,
        statistics_s=extra_s,
        seeds=len(own),
        micro_batches=np.ceil(counted["batch"].to_numpy() / fit.example.config.data.micro_batch),
        measured=counted["measured"].to_numpy().astype(np.float64),
        steps=counted["len"].to_numpy() / len(own),
    )


def _outlook(
    label: str, load: _Load, baseline: str | None, reference: _Load | None, counts: Sequence[int]
) -> Outlook:
    drawn = [min(counts) << n for n in range(int(math.log2(max(counts) / min(counts))) + 1)]
    forecasts, line = (
        [_forecast(load, reference, gpus) for gpus in sorted(found) if gpus % load.tensor == 0]
        for found in (set(counts), {*drawn, *counts})
    )
    return Outlook(label, baseline, load.seeds, load.statistics_s, forecasts, line, load.enough())


def _forecast(load: _Load, reference: _Load | None, gpus: int) -> Forecast:
    seconds = load.seconds(gpus)
    comparable = reference is not None and gpus % reference.tensor == 0
    return Forecast(
        gpus=gpus,
        seconds=seconds,
        gpu_hours=seconds * gpus / 3600,
        speedup=reference.seconds(gpus) / seconds if reference and comparable else None,
        busy=load.busy(gpus),
    )


def projection_table(projection: Projection) -> pl.DataFrame:
    """One row for each schedule and GPU count."""
    return pl.DataFrame(
        [
            {
                "schedule": outlook.schedule,
                "baseline": outlook.baseline,
                "seeds": outlook.seeds,
                **vars(forecast),
                "enough_gpus": outlook.enough,
            }
            for outlook in projection.outlooks
            for forecast in outlook.forecasts
        ],
        schema={
            "schedule": pl.String,
            "baseline": pl.String,
            "seeds": pl.Int64,
            "gpus": pl.Int64,
            "seconds": pl.Float64,
            "gpu_hours": pl.Float64,
            "speedup": pl.Float64,
            "busy": pl.Float64,
            "enough_gpus": pl.Int64,
        },
    )
