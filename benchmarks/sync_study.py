"""The study of docs/study/sync: how replicas agree, at equal tokens, with and without late ranks.

    python -m pipeline -m experiment=wagma2021_small
    python -m pipeline -m experiment=wagma2021_small_details
    python -m pipeline -m experiment=wagma2021_small_long
    python -m benchmarks.sync_study docs/study/sync      # tables.md and figures from their records

Numbers are means over seeds with 95 % intervals; ratios and differences are to allreduce with the same seed.
Tokens/s is over the whole run, until the last rank has done its last step. The consensus distance
mean_r ‖W_r − W̄‖²/‖W̄‖² is averaged over all steps; fresh is the share of contributions that were of the step
they were averaged in.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.load import Run, load_sweep
from analysis.statistics import Estimate, estimate
from pipeline.config import Config, ConfigError
from pipeline.store import Row, RunDirectory

SWEEPS = ["wagma2021_small", "wagma2021_small_details", "wagma2021_small_long"]
BASELINE = "allreduce"
COLOURS = {
    "allreduce": "#888888",
    "local_sgd": "#2e7d32",
    "dpsgd": "#8d6e63",
    "sgp": "#c46210",
    "adpsgd": "#e8a33d",
    "eager_sgd": "#b03060",
    "wagma": "#1f4e79",
    "wagma, grace_ms 8": "#4f9bd9",
}


@dataclass(frozen=True)
class Result:
    """Of one run."""

    tokens_per_s: float
    val_loss: float
    consensus: float | None
    fresh: float | None
    consensus_by_step: list[float]
    evaluations: list[tuple[float, float]]  # (seconds, loss)


@dataclass(frozen=True, order=True)
class Setting:
    """Within which methods are compared."""

    ranks: int
    imbalance: str
    distribution: str
    optimizer: str
    tokens: int

    @staticmethod
    def of(config: Config) -> Setting:
        return Setting(
            config.parallel.replicate,
            config.imbalance.kind,
            config.data.distribution,
            config.optim.name,
            config.budget_tokens,
        )

    @property
    def title(self) -> str:
        late = "late ranks" if self.imbalance == "delay" else "no late ranks"
        parts = "each rank has a part of the data" if self.distribution == "by_rank" else ""
        parts_of_title = [f"{self.ranks} processes", late, self.optimizer, f"{self.tokens:,} tokens", parts]
        return ", ".join(part for part in parts_of_title if part)


Results = dict[Setting, dict[str, dict[str, Result]]]  # by setting, method and seed


def method_of(run: Run, config: Config) -> str:
    """With all settings of the sweep that make a difference to it."""
    others = ("sync", "parallel.replicate", "imbalance", "data.distribution", "optim", "optim.lr")
    details = [f"{key.rpartition('.')[2]} {value}" for key, value in run.setting.items() if key not in others]
    return ", ".join([config.sync.method, *details])


def result_of(rows: Sequence[Row]) -> Result:
    trained = [row for row in rows if "train/loss" in row]
    evaluated = [row for row in rows if "val/loss" in row]
    consensus = [row["sync/consensus"] for row in trained if "sync/consensus" in row]
    fresh = [row["sync/fresh"] for row in trained if "sync/fresh" in row]
    return Result(
        trained[-1]["tokens"] / trained[-1]["time"],
        evaluated[-1]["val/loss"],
        float(np.mean(consensus)) if consensus else None,
        float(np.mean(fresh)) if fresh else None,
        consensus,
        [(row["time"], row["val/loss"]) for row in evaluated],
    )


def results_of(sweeps: Sequence[str]) -> Results:
    """Of finished runs."""
    found: Results = defaultdict(lambda: defaultdict(dict))
    for run in (run for sweep in sweeps for run in load_sweep(sweep).runs):
        if run.state == "DONE" and run.config and run.id:
            config = run.config
            setting = Setting.of(config)
            method = method_of(run, config)
            if run.seed in found[setting][method]:
                raise ConfigError(
                    f"two runs of {method}, seed {run.seed}, {setting.title} cannot be told apart"
                )
            found[setting][method][run.seed] = result_of(RunDirectory.find(run.id).rows())
    return found


def table(results: dict[str, dict[str, Result]]) -> str:
    """Of one setting."""
    columns = ["method", "tokens/s", "× allreduce", "loss", "− allreduce", "consensus distance", "fresh"]
    rows = [columns, ["---"] * len(columns)]
    base = results.get(BASELINE, {})
    for method in results:
        runs = results[method]
        paired = [(runs[seed], base[seed]) for seed in sorted(runs.keys() & base.keys())]
        consensus = [run.consensus for run in runs.values() if run.consensus is not None]
        fresh = [run.fresh for run in runs.values() if run.fresh is not None]
        rows.append(
            [
                method,
                _show(estimate([run.tokens_per_s for run in runs.values()]), ".0f"),
                _show(estimate([mine.tokens_per_s / its.tokens_per_s for mine, its in paired]), ".3f"),
                _show(estimate([run.val_loss for run in runs.values()]), ".3f"),
                _show(estimate([mine.val_loss - its.val_loss for mine, its in paired]), "+.3f"),
                f"{np.mean(consensus):.1e}" if consensus else "",
                f"{np.mean(fresh):.0%}" if fresh else "",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _show(found: Estimate | None, form: str) -> str:
    if found is None:
        return "–"
    half = "" if found.half_width is None else f" ± {found.half_width:{form.lstrip('+')}}"
    return f"{found.mean:{form}}{half}"


def main_settings(results: Results) -> list[Setting]:
    """Those of all methods, with late ranks."""
    return [
        setting for setting in sorted(results) if setting.imbalance == "delay" and len(results[setting]) > 6
    ]


def draw_consensus(results: Results, path: Path) -> None:
    """Over 60 steps, mean over seeds, with late ranks."""

    def draw(axes: Axes, runs: list[Result], style: dict[str, str | None]) -> None:
        of_seeds = [run.consensus_by_step[60:120] for run in runs if run.consensus_by_step]
        if any(map(any, of_seeds)):
            mean = np.mean(of_seeds, axis=0)
            axes.plot(np.arange(61, 61 + len(mean)), np.where(mean > 0, mean, np.nan), **style)
            axes.set_yscale("log")

    _panels(results, draw, "optimizer step", "consensus distance", path)


def draw_loss(results: Results, path: Path) -> None:
    """Validation loss over time, mean over seeds, with late ranks."""

    def draw(axes: Axes, runs: list[Result], style: dict[str, str | None]) -> None:
        seconds, losses = np.mean([run.evaluations for run in runs], axis=0).T
        axes.plot(seconds, losses, marker=".", **style)

    _panels(results, draw, "seconds of training", "validation loss (nats per byte)", path)


def _panels(
    results: Results,
    draw: Callable[[Axes, list[Result], dict[str, str | None]], None],
    x: str,
    y: str,
    path: Path,
) -> None:
    """One panel for each main setting, one line for each method."""
    settings = main_settings(results)
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, setting in zip(np.atleast_1d(figure.subplots(1, len(settings))), settings, strict=True):
        for method, runs in results[setting].items():
            if method in COLOURS:
                draw(axes, list(runs.values()), {"label": method, "color": COLOURS[method]})
        axes.set_xlabel(x)
        axes.set_title(f"{setting.ranks} processes", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel(y)
    # The last panel has all methods.
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def draw_differences(results: Results, path: Path) -> None:
    """Loss beside allreduce's with 95 % intervals: every setting of 8 processes with late ranks."""
    settings = [setting for setting in sorted(results) if setting.imbalance == "delay" and setting.ranks == 8]
    lines: list[tuple[str, Estimate | None, str]] = []
    for setting in settings:
        base = results[setting].get(BASELINE, {})
        lines.append((setting.title.partition("late ranks, ")[2], None, ""))
        for method, runs in results[setting].items():
            both = runs.keys() & base.keys()
            found = estimate([runs[seed].val_loss - base[seed].val_loss for seed in sorted(both)])
            if method != BASELINE and found:
                lines.append((method, found, COLOURS.get(method, "#555555")))
    figure = Figure(figsize=(8, 0.24 * len(lines) + 0.8), layout="constrained")
    axes = figure.subplots()
    for place, (_, found, colour) in enumerate(lines):
        if found:
            axes.errorbar(found.mean, place, xerr=found.half_width, fmt="o", markersize=4, color=colour)
    axes.set_yticks(range(len(lines)), [name for name, _, _ in lines], fontsize=8)
    for label, (_, found, _) in zip(axes.get_yticklabels(), lines, strict=True):
        label.set_fontweight("normal" if found else "bold")
    axes.invert_yaxis()
    axes.axvline(0, color="#888888", linewidth=1)
    axes.set_xlabel("validation loss − allreduce's (nats per byte)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?", default=Path("docs/study/sync"))
    parser.add_argument("--sweeps", nargs="+", default=SWEEPS)
    options = parser.parse_args(arguments)
    results = results_of(options.sweeps)
    options.directory.mkdir(parents=True, exist_ok=True)
    parts = []
    for setting in sorted(results):
        parts.append(f"## {setting.title}\n\n{table(results[setting])}\n")
    (options.directory / "tables.md").write_text("\n".join(parts), encoding="utf-8")
    draw_consensus(results, options.directory / "consensus.png")
    draw_loss(results, options.directory / "loss.png")
    draw_differences(results, options.directory / "differences.png")
    print("\n".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
