"""What it takes to reach a validation loss: tokens, optimizer steps, training time and FLOPs to the target.

A run reaches the target where its evaluations first come down to it, between two of them on the straight line
that joins them. A run that is below already when first evaluated got there somewhere before; one that never
comes down to the target has not reached it up to its own end. Neither is averaged with the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from analysis import numbers as text
from analysis.align import Array
from analysis.evaluations import AXES, TIME, Axis, Evaluations
from analysis.statistics import (
    SIGNIFICANCE,
    Estimate,
    Interval,
    estimate,
    holm,
    p_value,
    paired_difference,
)
from analysis.summary import Schedule
from analysis.verdict import Comparison
from pipeline.config import ConfigError

Reached = Literal["there", "before", "not"]


@dataclass(frozen=True)
class Cost:
    """Of one run on one axis. `at`: where it reached the target; "before": at the latest; "not": up to where
    it was looked for in vain."""

    seed: str
    reached: Reached
    at: float


Kind = Literal[
    "sooner",
    "later",
    "not distinguishable",
    "one seed",
    "no shared seed",
    "censored",  # a run did not reach it, or before its first evaluation
    "not recorded",  # on this axis
    "not evaluated",  # in any finished run
]


@dataclass(frozen=True)
class Reach:
    """What a schedule takes to the target on one axis, and how much sooner it is there than the baseline."""

    axis: Axis
    schedule: str
    baseline: str | None  # None for the baseline itself
    target: float
    costs: list[Cost]
    mean: Estimate | None  # None where a run is censored
    kind: Kind | None  # None for the baseline itself
    speedup: Estimate | None = None  # of the logarithm of baseline's cost / cost, paired by seed
    p: float | None = None
    p_adjusted: float | None = None  # corrected for the comparisons on this axis

    @property
    def ratio(self) -> Interval | None:
        """The speed-up with its interval: geometric mean over the seeds; of one seed without any width."""
        if self.speedup is None:
            return None
        log, width = self.speedup.mean, self.speedup.half_width or 0.0
        return Interval(math.exp(log), math.exp(log - width), math.exp(log + width))

    @property
    def decided(self) -> bool:
        return self.kind in ("sooner", "later", "not distinguishable")

    @property
    def words(self) -> str:
        """612k ± 20k tokens; not within 800k tokens (2 of 3 seeds); at most 80k tokens."""
        amount = self.axis.amount
        if not self.costs:
            return text.MISSING
        censored = [cost.at for cost in self.costs if cost.reached == "not"]
        if censored:
            seeds = "seed" if len(self.costs) == 1 else "seeds"
            return f"not within {amount(min(censored))} ({len(censored)} of {len(self.costs)} {seeds})"
        if self.mean is None:
            return f"at most {amount(max(cost.at for cost in self.costs))}"
        if self.mean.half_width is None:
            return amount(self.mean.mean)
        return f"{self.axis.number(self.mean.mean)} ± {amount(self.mean.half_width)}"


@dataclass(frozen=True)
class Target:
    """The loss to reach for a baseline and the schedules compared with it."""

    loss: float
    baseline: str
    why: str  # this loss, in words
    reaches: list[Reach]  # axis by axis, the baseline first

    @property
    def sentence(self) -> str:
        """What each schedule takes to it, the baseline first: time, or tokens where no time was recorded."""
        recorded = [TIME, *(reach.axis for reach in self.reaches)]
        axis = next((axis for axis in recorded if any(reach.costs for reach in self.of(axis))), TIME)
        each = [f"{r.schedule} {r.words}{_speedup(r)}" for r in self.of(axis) if r.costs]
        title = axis.title[:1].upper() + axis.title[1:]
        found = ", ".join(each) or "no finished run was evaluated"
        return f"{title} to validation loss {text.fixed(self.loss)} ({self.why}): {found}."

    def of(self, axis: Axis) -> list[Reach]:
        return [reach for reach in self.reaches if reach.axis is axis]


def _speedup(reach: Reach) -> str:
    if reach.ratio is None:
        return ""
    verdict = f", {reach.kind}" if reach.decided else ""
    return f" (speed-up {text.ratio(reach.ratio.mean, reach.ratio.low, reach.ratio.high)}{verdict})"


def check_target(loss: float | None) -> None:
    """Raises ConfigError for what no loss can be."""
    if loss is not None and not (math.isfinite(loss) and loss > 0):
        raise ConfigError(
            f"--target {loss:g}: a validation loss to reach is a positive number, such as 2.5. Without "
            f"--target it is the highest final one of the baseline's runs"
        )


def reach_targets(
    schedules: Sequence[Schedule],
    comparisons: Sequence[Comparison],
    measured: Mapping[str, Sequence[Evaluations]],
    asked: float | None,
    axes: Sequence[Axis] = AXES,
) -> list[Target]:
    """One for each baseline, and for each schedule without one where a loss is `asked` for."""
    compared = {c.schedule for c in comparisons if c.baseline}
    found = []
    for head in (s for s in schedules if s.label not in compared):
        against = [c.schedule for c in comparisons if c.baseline == head.label]
        finals = list(head.by_seed("val_loss").values())
        chosen = _choose(head.label, finals, asked)
        if chosen and (against or asked is not None):
            loss, why = chosen
            found.append(Target(loss, head.label, why, _reaches(loss, head.label, against, measured, axes)))
    return _corrected(found, axes)


def _choose(baseline: str, finals: Sequence[float], asked: float | None) -> tuple[float, str] | None:
    if asked is not None:
        return asked, "the one asked for with --target"
    finite = [loss for loss in finals if math.isfinite(loss)]
    if not finite:
        return None
    if len(finals) == 1:
        return finite[0], f"the final one of {baseline}"
    which = "each of its runs" if len(finite) == len(finals) else "each of its runs that did not diverge"
    return max(finite), f"the highest final one of {baseline}, reached by {which}"


def _reaches(
    loss: float,
    baseline: str,
    against: Sequence[str],
    measured: Mapping[str, Sequence[Evaluations]],
    axes: Sequence[Axis],
) -> list[Reach]:
    found = []
    for axis in axes:
        reference = _costs(axis, loss, measured[baseline])
        found.append(Reach(axis, baseline, None, loss, reference, _mean(reference), None))
        for label in against:
            costs = _costs(axis, loss, measured[label])
            if measured[label] and measured[baseline]:
                found.append(_compare(axis, label, baseline, loss, costs, reference))
            else:
                found.append(Reach(axis, label, baseline, loss, costs, _mean(costs), "not evaluated"))
    return found


def _costs(axis: Axis, loss: float, runs: Sequence[Evaluations]) -> list[Cost]:
    return [
        Cost(run.seed, *crossing(run.at[axis.name], run.loss, loss)) for run in runs if axis.name in run.at
    ]


def crossing(x: Array, losses: Array, target: float) -> tuple[Reached, float]:
    """Where `losses` first come down to `target`. After a loss that is not finite only the place of the next
    one is known: the target was reached there or before."""
    below = np.flatnonzero(losses <= target)
    if not len(below):
        return "not", float(x[-1])
    i = int(below[0])
    if i == 0 or not math.isfinite(losses[i - 1]):
        return "before", float(x[i])
    share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return "there", float(x[i - 1] + share * (x[i] - x[i - 1]))


def _mean(costs: Sequence[Cost]) -> Estimate | None:
    return estimate([c.at for c in costs]) if all(c.reached == "there" for c in costs) else None


def _compare(
    axis: Axis,
    schedule: str,
    baseline: str,
    loss: float,
    costs: list[Cost],
    reference: list[Cost],
) -> Reach:
    """By itself, as if it were the only comparison. The means of log cost are compared: a ratio of means
    would weigh a slow seed more than a fast one, and t intervals suit differences."""
    mean = _mean(costs)
    if not costs or not reference:
        return Reach(axis, schedule, baseline, loss, costs, mean, "not recorded")
    seeds = {cost.seed for cost in costs} & {cost.seed for cost in reference}
    paired = [cost for cost in (*costs, *reference) if cost.seed in seeds]
    if any(cost.reached != "there" or cost.at <= 0 for cost in paired):
        return Reach(axis, schedule, baseline, loss, costs, mean, "censored")
    own, other = ({c.seed: -math.log(c.at) for c in side if c.seed in seeds} for side in (costs, reference))
    gain = paired_difference(own, other)
    if gain is None:
        return Reach(axis, schedule, baseline, loss, costs, mean, "no shared seed")
    kind: Kind = "sooner" if gain.mean > 0 else "later"
    if gain.low is None or gain.high is None:
        kind = "one seed"
    elif gain.low <= 0 <= gain.high:
        kind = "not distinguishable"
    return Reach(axis, schedule, baseline, loss, costs, mean, kind, gain, p_value(gain))


def _corrected(targets: Sequence[Target], axes: Sequence[Axis]) -> list[Target]:
    """With Holm's correction over all comparisons on each axis."""
    adjusted = {
        axis.name: holm({r.schedule: r.p for t in targets for r in t.of(axis) if r.p is not None})
        for axis in axes
    }

    def correct(reach: Reach) -> Reach:
        p = adjusted[reach.axis.name].get(reach.schedule)
        if p is None or p < SIGNIFICANCE:
            return replace(reach, p_adjusted=p)
        return replace(reach, p_adjusted=p, kind="not distinguishable")

    return [replace(target, reaches=[correct(reach) for reach in target.reaches]) for target in targets]
