"""The study of docs/study: every schedule at equal tokens, equal steps and equal time.

    python -m pipeline -m experiment=study
    python -m benchmarks.study docs/study       # tables.md and figures from the records of that sweep

Losses are means over seeds with 95 % intervals; differences are paired by seed. A validation loss between two
evaluations is read off the straight line between them. `off the front` compares a run with the constant
batches that take as many steps for the same tokens: the straight line, in the logarithm of the steps, between
the two constant batches beside it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib import colormaps
from matplotlib.figure import Figure

from analysis.load import Run, Sweep, load_sweep
from analysis.statistics import Estimate, estimate
from analysis.summary import Schedule, run_numbers, summarise

STEPS = (49, 98, 196)  # of the constant batches of 128, 64 and 32
SHOWN = {  # in the figure of batches: label of a schedule, its colour
    "norm_test · eta=0.4": "#1f4e79",
    "norm_test · eta=0.4 · estimator=worker": "#4f9bd9",
    "norm_test · eta=0.1 · estimator=paper": "#b03060",
    "noise_scale · c=0.6": "#2e7d32",
    "inner_product · theta=0.1 · nu=0.55": "#e8a33d",
    "inner_product · theta=0.1 · nu=0.55 · confirmations=5": "#c46210",
    "inner_product · theta=0.1 · nu=0.55 · direction=in_sample · confirmations=5": "#8d6e63",
    "coordinate_norm_test": "#555555",
}


class Study:
    """The sweep's schedules, and what a comparison reads off their runs."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.schedules = [s for s in summarise(sweep, run_numbers(sweep.rows)) if s.finished]
        constant = [s for s in self.schedules if set(s.axes) == {"batch", "batch.size"}]
        self.constants = [s for s in constant if s.axes["batch"] == "constant"]
        self.seconds = min(n.seconds or math.inf for s in self.schedules for n in s.numbers.values())

    def loss_at(self, run: Run, column: str, place: float) -> float:
        """Validation loss of a run after so many steps or seconds; NaN beyond its end."""
        rows = self.sweep.rows[run.point].filter(pl.col("val/loss").is_not_null())
        x, y = rows[column].to_numpy().astype(float), rows["val/loss"].to_numpy().astype(float)
        return float(np.interp(place, x, y, left=math.nan, right=math.nan))

    def losses(self, schedule: Schedule, column: str, place: float) -> Estimate | None:
        """Over seeds; None where a run did not come so far."""
        found = [self.loss_at(run, column, place) for run in schedule.finished]
        return estimate(found) if all(math.isfinite(loss) for loss in found) else None

    def off_the_front(self, schedule: Schedule) -> Estimate | None:
        """Mean over seeds of the loss above that of constant batches with as many steps."""
        above = []
        for run in schedule.finished:
            number = schedule.numbers[run.point]
            front = sorted(
                (other.numbers[r.point].steps or 0.0, other.numbers[r.point].val_loss or math.nan)
                for other in self.constants
                for r in other.finished
                if r.seed == run.seed
            )
            assert number.steps and number.val_loss is not None
            if not front[0][0] <= number.steps <= front[-1][0]:
                return None
            steps, losses = np.array(front).T
            above.append(number.val_loss - float(np.interp(np.log(number.steps), np.log(steps), losses)))
        return estimate(above)


def table(study: Study) -> str:
    columns: dict[str, Callable[[Schedule], str]] = {
        "schedule": lambda s: s.label,
        "steps": lambda s: f"{s.mean('steps'):.0f}",
        "mean batch": lambda s: f"{s.mean('mean_batch'):.1f}",
        "loss at equal tokens": lambda s: _show(s.val_loss),
        "off the front": lambda s: "" if s in study.constants else _show(study.off_the_front(s), sign="+"),
        **{
            f"after {steps} steps": lambda s, at=steps: _show(study.losses(s, "step", at))  # type: ignore[misc]
            for steps in STEPS
        },
        f"after {study.seconds:.1f} s": lambda s: _show(study.losses(s, "time", study.seconds)),
        "time": lambda s: f"{s.mean('seconds'):.1f} s",
    }
    rows = [list(columns), ["---"] * len(columns)]
    rows += [[show(schedule) for show in columns.values()] for schedule in study.schedules]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _show(found: Estimate | None, sign: str = "") -> str:
    if found is None:
        return "–"
    half = "" if found.half_width is None else f" ± {found.half_width:.3f}"
    return f"{found.mean:{sign}.3f}{half}"


def draw_front(study: Study, path: Path) -> None:
    """Final loss over steps: constant batches as a line, all others as points."""
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    front = sorted((s.mean("steps") or 0, s.val_loss.mean if s.val_loss else 0) for s in study.constants)
    axes.plot(*zip(*front, strict=True), color="#888888", marker="s", label="constant batches", zorder=1)
    markers = iter("ovD^P*Xv<>ph" * 4)
    others = [s for s in study.schedules if s not in study.constants and s.val_loss]
    colours = iter(np.linspace(0, 1, max(len(others), 1)))
    for schedule in others:
        assert schedule.val_loss
        axes.errorbar(
            schedule.mean("steps") or 0,
            schedule.val_loss.mean,
            schedule.val_loss.half_width or 0,
            marker=next(markers),
            color=colormaps["turbo"](next(colours)),
            capsize=2,
            linestyle="none",
            label=schedule.label,
        )
    axes.set_xscale("log")
    axes.set_xticks([50, 100, 200, 400, 800], ["50", "100", "200", "400", "800"])
    axes.minorticks_off()
    axes.set_xlabel("optimizer steps, for the same tokens")
    axes.set_ylabel("validation loss (nats per byte)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    figure.savefig(path, dpi=130)


def draw_batches(study: Study, path: Path) -> None:
    """The batch over tokens of one run of each kind of test."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    for schedule in study.schedules:
        if schedule.label not in SHOWN:
            continue
        run = schedule.finished[0]
        rows = study.sweep.rows[run.point].filter(pl.col("batch/size").is_not_null())
        rows = rows[:-1]  # the last step is cut to the budget
        axes.step(
            rows["tokens"] / 1000,
            rows["batch/size"],
            where="pre",
            label=schedule.label,
            color=SHOWN[schedule.label],
        )
    axes.set_yscale("log", base=2)
    axes.set_yticks([8, 16, 32, 64, 128], ["8", "16", "32", "64", "128"])
    axes.set_xlabel("thousand tokens")
    axes.set_ylabel("batch (sequences)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?", default=Path("docs/study"))
    parser.add_argument("--sweep", default="study")
    options = parser.parse_args(arguments)
    study = Study(load_sweep(options.sweep))
    options.directory.mkdir(parents=True, exist_ok=True)
    (options.directory / "tables.md").write_text(table(study) + "\n", encoding="utf-8")
    draw_front(study, options.directory / "front.png")
    draw_batches(study, options.directory / "batches.png")
    print(table(study))
    return 0


if __name__ == "__main__":
    sys.exit(main())
