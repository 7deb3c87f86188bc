"""The comparison of a sweep as one object: everything that its files say is decided here."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from analysis import figures as charts
from analysis import settings as facts
from analysis.curves import Dataset
from analysis.figures import Figure
from analysis.load import Run, Sweep
from analysis.statistics import BOOTSTRAP_SEEDS
from analysis.summary import RunNumbers, Schedule, run_numbers, summarise
from analysis.verdict import Comparison, cautions, compare_all, headline, is_baseline, parse_baseline


@dataclass(frozen=True)
class Report:
    sweep: Sweep
    written: float  # Unix seconds
    numbers: dict[int, RunNumbers]  # by point, whatever the run's state
    schedules: list[Schedule]
    baseline: dict[str, str]
    comparisons: list[Comparison]
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
        return found

    def is_baseline(self, schedule: Schedule) -> bool:
        return is_baseline(schedule, self.baseline)


def _joined(runs: Sequence[Run]) -> list[str]:
    """The distinct commands of the runs, as typed."""
    return list(dict.fromkeys(shlex.join(run.command) for run in runs))


def build(sweep: Sweep, baseline: Sequence[str], written: float) -> Report:
    """The whole comparison. Raises ConfigError when no schedule is what `baseline` asks for."""
    numbers = run_numbers(sweep.record)
    schedules = summarise(sweep, numbers)
    chosen = parse_baseline(baseline, schedules)
    comparisons = compare_all(schedules, chosen)
    figures, datasets = charts.build(sweep, schedules)
    return Report(
        sweep=sweep,
        written=written,
        numbers=numbers,
        schedules=schedules,
        baseline=chosen,
        comparisons=comparisons,
        headline=headline(schedules, comparisons),
        cautions=[*cautions(schedules, comparisons), *sweep.cautions],
        settings=facts.describe(sweep),
        figures=figures,
        datasets=datasets,
    )
