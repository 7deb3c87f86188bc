"""The comparison of a sweep as one object: everything that its files say is decided here."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from analysis import figures as charts
from analysis import settings as facts
from analysis.curves import Dataset
from analysis.equal import Equal, compare_at_equal
from analysis.evaluations import EPOCHS, FLOPS, TIME, Axis, axes_of, evaluations
from analysis.figures import Figure
from analysis.load import Run, Sweep
from analysis.projection import GPU_COUNTS, Projection, project, step_traces
from analysis.projection_notes import notes
from analysis.statistics import BOOTSTRAP_SEEDS
from analysis.summary import MORE, RunNumbers, Schedule, batch_unit, run_numbers, summarise
from analysis.synchronisation import Network
from analysis.target import Target, check_target, reach_targets
from analysis.verdict import (
    Comparison,
    Overall,
    cautions,
    compare_all,
    headline,
    is_baseline,
    overall,
    parse_baseline,
)
from pipeline.config import common_unit


@dataclass(frozen=True)
class Report:
    """All that a report says, before it is written as a page, as Markdown, as LaTeX or as JSON."""

    sweep: Sweep
    written: float  # Unix seconds
    numbers: dict[int, RunNumbers]  # by point, whatever the run's state
    schedules: list[Schedule]
    baseline: dict[str, str]
    comparisons: list[Comparison]
    equal: list[Equal]  # at equal tokens, steps, time and FLOPs
    targets: list[Target]  # one for each baseline
    projection: Projection
    overall: list[Overall]
    headline: str
    cautions: list[str]
    settings: facts.Facts
    figures: list[Figure]
    datasets: dict[str, Dataset]

    @property
    def runs(self) -> list[Run]:
        """All that count or are to come: without the superseded."""
        return sorted((run for s in self.schedules for run in s.runs), key=lambda run: run.point)

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.state == "DONE"]

    @property
    def unfinished(self) -> list[Run]:
        return [run for run in self.runs if run.state != "DONE"]

    @property
    def labels(self) -> list[str]:
        return [schedule.label for schedule in self.schedules]

    @property
    def commands(self) -> list[str]:
        """All that asked for points of the sweep, which may have grown by several."""
        return _joined(self.sweep.runs) or [shlex.join(self.sweep.command)]

    @property
    def resume(self) -> list[str]:
        """The commands that asked for what is missing: issued again, they do no more than that.

        A refused point would be refused again.
        """
        return _joined([run for run in self.unfinished if run.state != "INVALID"])

    def label_of(self, run: Run) -> str:
        return next(s.label for s in self.schedules if run in s.runs or run in s.superseded)

    def state_of(self, run: Run) -> str:
        return "SUPERSEDED" if any(run in s.superseded for s in self.schedules) else run.state

    def numbers_of(self, run: Run) -> RunNumbers | None:
        return self.numbers.get(run.point)

    def comparison_of(self, schedule: Schedule) -> Comparison | None:
        return next((c for c in self.comparisons if c.schedule == schedule.label), None)

    @property
    def tested(self) -> bool:
        """Whether any comparison has a p-value."""
        return any(comparison.p is not None for comparison in self.comparisons)

    @property
    def enough_seeds(self) -> bool:
        """Whether any schedule has enough for an interquartile mean."""
        return any(schedule.val_loss_iqm for schedule in self.schedules)

    @property
    def methods(self) -> list[str]:
        """What the columns about chance hold, in sentences."""
        found = []
        if self.tested:
            found += [
                "p: paired t-test of the difference, corrected for all comparisons of the sweep (Holm).",
                "Probability of improvement: the share of seeds that end lower than with the baseline, a tie "
                "as half a seed, with its exact 95% interval.",
            ]
        if self.tested or self.enough_seeds:
            found.append(
                f"Interquartile mean: of the middle half of the seeds, with its 95% bootstrap interval, from "
                f"{BOOTSTRAP_SEEDS} seeds on; of fewer, such an interval misses far too often (of 2 every "
                f"other time)."
            )
        if "val_loss_averaged" in self.more:
            found.append(
                "Mean iterate: the mean of weights that optim=swa keeps, evaluated beside the last ones, "
                "which are what everything else is about."
            )
        if "losses" in self.more:
            found.append(
                "Full loss evaluations: those of a line search, a forward pass each. Full gradient "
                "evaluations do not include them; the training time does."
            )
        return found

    def equal_of(self, comparison: Comparison, axis: Axis) -> Equal:
        return next(e for e in self.equal if e.schedule == comparison.schedule and e.axis is axis)

    @property
    def axes(self) -> list[Axis]:
        """Those that a comparison is shown on: of FLOPs, and of full gradients, only where they tell
        something that tokens do not."""
        own = [e.tokens for e in self.equal if e.axis in (FLOPS, EPOCHS) and e.tokens]
        same = all(math.isclose(*tokens) for tokens in own)
        return [axis for axis in axes_of(self.schedules) if axis not in (FLOPS, EPOCHS) or not same]

    @property
    def unit(self) -> str:
        """tokens, or samples"""
        return common_unit(s.unit for s in self.schedules)

    @property
    def batch_unit(self) -> str:
        return batch_unit(self.unit)

    @property
    def more(self) -> dict[str, str]:
        """The numbers beside losses and costs that any of its runs has, and how a reader calls them."""
        found = [n for n in self.numbers.values()]
        return {
            name: title
            for name, (_, title) in MORE.items()
            if any(getattr(numbers, name) is not None for numbers in found)
            if name != "gradients" or EPOCHS in self.axes
        }

    @property
    def equal_notes(self) -> list[str]:
        """What a reader must know of the comparison at equal tokens, steps and time."""
        if not any(e.place is not None for e in self.equal):
            return []
        notes = [
            "Each schedule meets its baseline where the common range of their runs ends. Losses are read off "
            "each run's evaluations, linearly between two of them. Differences are paired by seed and have "
            "their 95% interval; verdicts are corrected for all comparisons on the same axis (Holm)."
        ]
        if any(e.early for e in self.equal):
            notes.append(
                f"Where one of the two has seen fewer {self.unit}, or less of its run, it is compared before "
                "its learning rate has come down: planned to end there, it would do better."
            )
        if self.unit == "samples":
            notes.append(
                "FLOPs are not counted: at equal samples they are equal where the model and the evaluations "
                "of a gradient per step are."
            )
        elif FLOPS not in self.axes:
            known = any(e.place is not None for e in self.equal if e.axis is FLOPS)
            notes.append(
                "FLOPs: as at equal tokens, since a token costs the compared runs the same."
                if known
                else "FLOPs: not known, since that takes a run's model and sequence length."
            )
        hosts = max((e.hosts for e in self.equal if e.axis is TIME), default=0)
        if hosts > 1:
            notes.append(
                f"The runs of one comparison were on up to {hosts} hosts: their times compare hosts as well."
            )
        elif hosts == 1:
            notes.append("The times of each comparison are from one host.")
        return notes

    @property
    def projection_notes(self) -> list[str]:
        """What the projection rests on, how far it can be trusted and what it assumes."""
        return notes(self.projection)

    @property
    def target_notes(self) -> list[str]:
        """How the table of targets is to be read."""
        return [
            "A run reaches the loss where its evaluations first come down to it, on the straight line "
            "between two of them. Not within: it had not by its end. At most: it had by its first "
            "evaluation. Means are over the seeds, ± half of the 95% interval.",
            "Speed-up: what the baseline takes divided by what the schedule takes, geometric mean over the "
            "pairs of runs with the same seed, where all of them reached the loss, with its 95% interval; "
            "verdicts are corrected for all comparisons on the same axis (Holm).",
        ]

    def is_baseline(self, schedule: Schedule) -> bool:
        return is_baseline(schedule, self.baseline)


def _joined(runs: Sequence[Run]) -> list[str]:
    """The distinct commands of the runs, as typed."""
    return list(dict.fromkeys(shlex.join(run.command) for run in runs if run.command))


def build(
    sweep: Sweep,
    baseline: Sequence[str],
    written: float,
    target: float | None = None,
    gpu_counts: Sequence[int] = GPU_COUNTS,
    network: Network | None = None,
) -> Report:
    """The whole comparison. Raises ConfigError when no schedule is what `baseline` asks for, or when `target`
    is no loss. `gpu_counts`, `network`: of analysis.projection.project."""
    check_target(target)
    numbers = run_numbers(sweep.rows)
    schedules = summarise(sweep, numbers)
    chosen = parse_baseline(baseline, schedules)
    comparisons = compare_all(schedules, chosen)
    measured = evaluations(sweep, schedules)
    against = {c.schedule: c.baseline for c in comparisons}
    projection = project(step_traces(sweep, schedules), against, gpu_counts, network)
    figures, datasets = charts.build(sweep, schedules, projection)
    return Report(
        sweep=sweep,
        written=written,
        numbers=numbers,
        schedules=schedules,
        baseline=chosen,
        comparisons=comparisons,
        equal=compare_at_equal(comparisons, measured, axes_of(schedules)),
        targets=reach_targets(schedules, comparisons, measured, target, axes_of(schedules)),
        projection=projection,
        overall=overall(schedules, comparisons),
        headline=headline(schedules, comparisons),
        cautions=[*cautions(schedules, comparisons, chosen), *sweep.cautions],
        settings=facts.describe(sweep),
        figures=figures,
        datasets=datasets,
    )
