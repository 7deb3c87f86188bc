"""What the parts of an optimizer step take, from the step times of runs.

A step of b sequences on W data-parallel ranks takes ⌈b / (W·m)⌉ rounds of one micro-batch of m sequences on
each rank, one update, and the synchronisation:

    t(b, W) = ⌈b / (W·m)⌉ · (micro_s + per_micro_s(W)) + step_s + per_step_s(W)

micro_s and step_s follow from runs whose steps differ in their number of rounds, by least absolute
deviations. per_micro_s and per_step_s are those of analysis.synchronisation; runs at several W tell how many
times as long that really takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.synchronisation import Network, Synchronisation, synchronisation
from pipeline.config import Config

Array = NDArray[np.float64]

WARM_UP = 2  # first steps of an attempt: they compile, allocate memory and open connections
MIN_STEPS = 5  # of one kind, for a median

T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)


def grouped(items: Iterable[T], key: Callable[[T], Key]) -> dict[Key, list[T]]:
    """In the order of the first of each."""
    groups: dict[Key, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


# --- what was measured --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """The cores of a host and the name of its GPUs."""

    cores: int
    gpu: str | None


@dataclass(frozen=True)
class StepTrace:
    """The steps of one run: `step`, `batch` (sequences), `seconds`, `accumulation` (rounds), `measured`
    (statistics were taken), `regular` (its time tells what such a step takes)."""

    config: Config
    machine: Machine | None  # None: not known
    steps: pl.DataFrame
    host: str | None = None  # its name; None: not known

    @property
    def mesh(self) -> tuple[int, int]:
        return self.config.parallel.replicate, self.config.parallel.shard

    @property
    def on_gpu(self) -> bool:
        return self.machine is not None and self.machine.gpu is not None

    @property
    def threads(self) -> int | None:
        """Of each rank on a CPU, as pipeline.worker sets them."""
        if self.machine is None or self.on_gpu:
            return None
        share = self.machine.cores // self.config.ranks_per_node
        return self.config.launch.cpus_per_task or max(1, share)

    @property
    def hardware(self) -> str:
        """Of one rank."""
        if self.machine is None:
            return "an unknown machine"
        return self.machine.gpu or f"{self.threads} core{'' if self.threads == 1 else 's'} of a CPU"

    @property
    def oversubscription(self) -> float:
        """How many threads share a core, at least 1: so much longer everything takes than on a rank with
        cores of its own."""
        if self.machine is None or self.threads is None:
            return 1.0
        return max(1.0, self.threads * self.config.ranks_per_node / self.machine.cores)

    @property
    def whole(self) -> bool:
        """Whether no step of a finished run is missing, as in a throttled log."""
        return float(self.steps["batch"].sum()) == self.config.trained_sequences


def step_trace(
    config: Config, machine: Machine | None, record: pl.DataFrame, host: str | None = None
) -> StepTrace:
    """Of the record of one run (analysis.load.RECORD)."""
    unit = config.batch_unit
    training = record.filter(pl.col("batch/size").is_not_null())
    # Another accumulation than that of the mesh: the attempt ran on another one. A batch that does not fill
    # its last round: its micro-batches are smaller.
    rounds = (pl.col("batch") / unit).ceil()
    as_frozen = (pl.col("accumulation") == rounds).fill_null(False).all().over("attempt")
    settled = pl.int_range(pl.len()).over("attempt") >= WARM_UP
    steps = training.select(
        "step",
        "attempt",
        batch="batch/size",
        seconds=pl.col("time").diff(),
        accumulation="batch/accumulation",
        measured=pl.col("stat/noise_scale").is_not_null(),
        follows=pl.col("step").diff().fill_null(1) == 1,
    )
    timed = pl.col("seconds").is_finite() & (pl.col("seconds") > 0)
    regular = as_frozen & settled & timed & pl.col("follows") & (pl.col("batch") % unit == 0)
    return StepTrace(config, machine, steps.with_columns(regular=regular.fill_null(False)), host)


@dataclass(frozen=True)
class Cell:
    """Steps of one mesh and one number of rounds: their median time on ranks with cores of their own."""

    mesh: tuple[int, int]
    accumulation: int
    seconds: float
    steps: int
    modelled: Synchronisation


@dataclass(frozen=True)
class Cost:
    """Of a step, without synchronisation. `sync_scale`: how many times as long as modelled that takes; None
    where only one mesh was measured, so that it cannot be told."""

    micro_s: float
    step_s: float
    sync_scale: float | None

    def seconds(self, accumulation: float, sync: Synchronisation) -> float:
        return accumulation * (self.micro_s + sync.per_micro_s) + self.step_s + sync.per_step_s

    def in_cell(self, cell: Cell) -> float:
        scale = 1.0 if self.sync_scale is None else self.sync_scale
        return self.seconds(cell.accumulation, cell.modelled.times(scale))


def cells(runs: Sequence[StepTrace], network: Network, *, measured: bool = False) -> list[Cell]:
    """measured: with the steps in which statistics were taken."""
    found = []
    for mesh, group in grouped(runs, lambda run: run.mesh).items():
        modelled = synchronisation(group[0].config, *mesh, network)
        steps = pl.concat([regular(run) for run in group])
        kept = steps if measured else steps.filter(~pl.col("measured"))
        medians = kept.group_by("accumulation").agg(pl.col("alone").median(), pl.len()).sort("accumulation")
        found += [
            Cell(mesh, int(rounds), seconds, count, modelled)
            for rounds, seconds, count in medians.iter_rows()
            if count >= MIN_STEPS
        ]
    return found


def regular(run: StepTrace) -> pl.DataFrame:
    """`alone`: seconds on a rank with cores of its own."""
    alone = pl.col("seconds") / run.oversubscription
    return run.steps.filter("regular").select("accumulation", "measured", "seconds", alone=alone)


def cost(found: Sequence[Cell]) -> Cost | None:
    """None where no two cells tell a micro-batch from the rest of a step."""
    if not found:
        return None
    seconds = np.array([cell.seconds for cell in found])
    weights = np.array([float(cell.steps) for cell in found])
    rounds = np.array([float(cell.accumulation) for cell in found])
    once = np.ones(len(found))
    sync = np.array([c.accumulation * c.modelled.per_micro_s + c.modelled.per_step_s for c in found])
    if _independent(sync, rounds, once):
        scale, micro_s, step_s = least_absolute([sync, rounds, once], seconds, weights)
        return Cost(micro_s, step_s, scale)
    if not _independent(rounds, once):
        return None
    # One mesh: what was measured holds its synchronisation.
    micro_s, step_s = least_absolute([rounds, once], seconds, weights)
    modelled = found[0].modelled
    return Cost(max(0.0, micro_s - modelled.per_micro_s), max(0.0, step_s - modelled.per_step_s), None)


def _independent(*columns: Array) -> bool:
    largest = [column.max() for column in columns]
    if min(largest) == 0:
        return False
    scaled = np.column_stack([c / top for c, top in zip(columns, largest, strict=True)])
    return int(np.linalg.matrix_rank(scaled, tol=1e-9)) == len(columns)


def least_absolute(columns: Sequence[Array], y: Array, weights: Array) -> list[float]:
    """The x ≥ 0 with the least Σ weights·|y − Σ x·columns|: a few disturbed points do not move it.

    The best of the other coefficients leaves a convex function of the first one, so it is found by the golden
    section; the last one alone is a weighted median. Columns are ≥ 0 and none is all zeros.
    """
    first, *rest = columns
    some = first > 0
    if not rest:
        return [max(0.0, weighted_median(y[some] / first[some], (weights * first)[some]))]

    def with_first(x: float) -> tuple[float, list[float]]:
        left = y - x * first
        others = least_absolute(rest, left, weights)
        fitted = sum((c * column for c, column in zip(others, rest, strict=True)), np.zeros(len(y)))
        return float(np.sum(weights * np.abs(left - fitted))), [x, *others]

    return _least(with_first, 0.0, max(0.0, float((y[some] / first[some]).max())))


GOLDEN = (math.sqrt(5) - 1) / 2


def _least(value: Callable[[float], tuple[float, list[float]]], low: float, high: float) -> list[float]:
    """The second part of the least value of a function that is convex between `low` and `high`."""
    ends = [value(low), value(high)]
    span = high - low
    at = [high - GOLDEN * span, low + GOLDEN * span]
    inner = [value(x) for x in at]
    while high - low > 1e-9 * span:
        if inner[0][0] <= inner[1][0]:
            high = at[1]
            at = [high - GOLDEN * (high - low), at[0]]
            inner = [value(at[0]), inner[0]]
        else:
            low = at[0]
            at = [at[1], low + GOLDEN * (high - low)]
            inner = [inner[1], value(at[1])]
    return min([*ends, *inner])[1]


def weighted_median(values: Array, weights: Array) -> float:
    """The least value that, with all below, has half the weight."""
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(reached, reached[-1] / 2)])


@dataclass(frozen=True)
class Check:
    """The median steps of one mesh, as predicted from the other meshes of the sweep alone."""

    ranks: int  # data-parallel
    from_ranks: tuple[int, ...]
    steps: int
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        """Relative: 0.1 is a prediction 10 % too long."""
        return self.predicted_s / self.measured_s - 1


def checks(found: Sequence[Cell]) -> list[Check]:
    """Each mesh left out once, where the others suffice."""
    done = []
    for mesh in sorted({cell.mesh for cell in found}):
        here = [cell for cell in found if cell.mesh == mesh]
        others = [cell for cell in found if cell.mesh != mesh]
        if fitted := cost(others):
            done.append(
                Check(
                    ranks=math.prod(mesh),
                    from_ranks=tuple(sorted({math.prod(cell.mesh) for cell in others})),
                    steps=sum(cell.steps for cell in here),
                    predicted_s=sum(cell.steps * fitted.in_cell(cell) for cell in here),
                    measured_s=sum(cell.steps * cell.seconds for cell in here),
                )
            )
    return done
