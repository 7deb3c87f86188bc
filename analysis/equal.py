"""Which schedule is better at equal tokens, equal optimizer steps, equal training time and equal FLOPs.

A schedule meets its baseline where the common range of their runs ends: at the largest place that all of
them reach. There the loss of each run is read off its own evaluations, linearly between two of them and never
beyond the last, and the runs with the same seed are compared as the final losses are (analysis.verdict).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from analysis import align
from analysis import numbers as text
from analysis.evaluations import AXES, Axis, Evaluations
from analysis.statistics import (
    SIGNIFICANCE,
    Estimate,
    estimate,
    holm,
    p_value,
    paired_difference,
)
from analysis.verdict import DECIDED, Comparison, OfDifference, of_difference

Kind = (
    OfDifference
    | Literal[
        "diverged",
        "no common range",  # where one ends, the other was not yet or no longer evaluated
        "not recorded",  # on this axis
        "not evaluated",  # in any finished run
        "no baseline",
    ]
)


@dataclass(frozen=True)
class Equal:
    """`schedule` against `baseline` (labels) at the same place of one axis."""

    axis: Axis
    schedule: str
    baseline: str | None
    kind: Kind
    place: float | None = None
    loss: Estimate | None = None
    baseline_loss: Estimate | None = None
    difference: Estimate | None = None  # loss − baseline's, paired by seed
    seeds: tuple[str, ...] = ()  # the shared ones
    unit: str = "tokens"  # of what runs have seen
    tokens: tuple[float, float] | None = None  # seen there, means over the runs: schedule, baseline
    progress: tuple[float, float] | None = None  # share of their runs that lies before, likewise
    hosts: int = 0  # that the runs were on
    p: float | None = None
    p_adjusted: float | None = None  # corrected for the comparisons on this axis

    @property
    def where(self) -> str:
        """at 98 steps, 800k against 201k tokens"""
        if self.place is None:
            return ""
        words = f"at {self.axis.amount(self.place)}"
        if self.axis.name != "tokens" and self.tokens:
            own, reference = (text.compact(tokens, 3) for tokens in self.tokens)
            return words if own == reference else f"{words}, {own} against {reference} {self.unit}"
        if self.early and self.progress:
            own, reference = (f"{share:.0%}" for share in self.progress)
            return f"{words}, after {own} of the runs against {reference}"
        return words

    @property
    def early(self) -> bool:
        """Whether one of the two had more to come."""
        return self.progress is not None and min(self.progress) < 0.99


def compare_at_equal(
    comparisons: Sequence[Comparison],
    measured: Mapping[str, Sequence[Evaluations]],
    axes: Sequence[Axis] = AXES,
) -> list[Equal]:
    """Each comparison on each axis; the first is that of what runs see."""
    found: list[Equal] = []
    for axis in axes:
        alone = [_compare(axis, c.schedule, c.baseline, measured) for c in comparisons]
        adjusted = holm({e.schedule: e.p for e in alone if e.p is not None})
        found += [
            replace(_corrected(equal, adjusted.get(equal.schedule)), unit=axes[0].title) for equal in alone
        ]
    return found


def _corrected(equal: Equal, p: float | None) -> Equal:
    if p is None or p < SIGNIFICANCE:
        return replace(equal, p_adjusted=p)
    return replace(equal, p_adjusted=p, kind="not distinguishable")


def _compare(
    axis: Axis, schedule: str, baseline: str | None, measured: Mapping[str, Sequence[Evaluations]]
) -> Equal:
    """By itself, as if it were the only comparison."""
    if baseline is None:
        return Equal(axis, schedule, None, "no baseline")
    if not measured[schedule] or not measured[baseline]:
        return Equal(axis, schedule, baseline, "not evaluated")
    own, reference = ([run for run in measured[name] if axis.name in run.at] for name in (schedule, baseline))
    if not own or not reference:
        return Equal(axis, schedule, baseline, "not recorded")
    limits = align.common_range([run.at[axis.name] for run in (*own, *reference)])
    if limits is None:
        return Equal(axis, schedule, baseline, "no common range")
    place = limits[1]
    losses, others = ({run.seed: run.loss_at(axis, place) for run in runs} for runs in (own, reference))
    difference = paired_difference(losses, others)
    kind = _kind([*losses.values(), *others.values()], difference)
    decided = kind in DECIDED
    return Equal(
        axis=axis,
        schedule=schedule,
        baseline=baseline,
        kind=kind,
        place=place,
        loss=estimate(list(losses.values())),
        baseline_loss=estimate(list(others.values())),
        difference=difference,
        seeds=tuple(seed for seed in losses if seed in others),
        tokens=_means([[run.tokens_at(axis, place) for run in runs] for runs in (own, reference)]),
        progress=_means([[run.progress_at(axis, place) for run in runs] for runs in (own, reference)]),
        hosts=len({run.host for run in (*own, *reference) if run.host}),
        p=p_value(difference) if decided and difference else None,
    )


def _kind(losses: Sequence[float], difference: Estimate | None) -> Kind:
    return of_difference(difference) if all(map(math.isfinite, losses)) else "diverged"


def _means(values: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """Of the two; None where they are not known."""
    own, reference = (math.fsum(side) / len(side) for side in values)
    return (own, reference) if math.isfinite(own + reference) else None
