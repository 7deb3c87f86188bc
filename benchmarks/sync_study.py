"""The study of docs/study/sync: how replicas agree, at equal tokens, with and without late ranks.

    python -m pipeline -m experiment=wagma2021_small
    python -m pipeline -m experiment=wagma2021_small_details
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from analysis.load import Run, load_sweep
from analysis.statistics import Estimate, estimate
from pipeline.config import Config, ConfigError
from pipeline.store import Row, RunDirectory

BASELINE = "allreduce"
COLOURS = {
    "allreduce": "#888888",
    "local_sgd, period 1": "#bbbbbb",
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


Setting = tuple[int, str, str]  # ranks, imbalance, distribution of the data


def method_of(run: Run, config: Config) -> str:
    """With all settings of the sweep that make a difference to it."""
    others = ("sync", "parallel.replicate", "imbalance", "data.distribution")
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


def results_of(sweeps: Sequence[str]) -> dict[Setting, dict[str, dict[str, Result]]]:
    """By setting, method and seed; of finished runs."""
    found: dict[Setting, dict[str, dict[str, Result]]] = defaultdict(lambda: defaultdict(dict))
    for run in (run for sweep in sweeps for run in load_sweep(sweep).runs):
        if run.state == "DONE" and run.config and run.id:
            config = run.config
            setting = (config.parallel.replicate, config.imbalance.kind, config.data.distribution)
            method = method_of(run, config)
            if run.seed in found[setting][method]:
                raise ConfigError(f"two runs of {method}, seed {run.seed}, {setting} cannot be told apart")
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


def draw_consensus(results: dict[Setting, dict[str, dict[str, Result]]], path: Path) -> None:
    """Over 60 steps, mean over seeds, with late ranks."""
    settings = [setting for setting in sorted(results) if setting[1:] == ("delay", "shared")]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, setting in zip(np.atleast_1d(figure.subplots(1, len(settings))), settings, strict=True):
        for method, runs in results[setting].items():
            of_seeds = [run.consensus_by_step[60:120] for run in runs.values() if run.consensus_by_step]
            if any(map(any, of_seeds)):
                mean = np.mean(of_seeds, axis=0)
                shown = np.where(mean > 0, mean, np.nan)
                axes.plot(np.arange(61, 61 + len(mean)), shown, label=method, color=COLOURS.get(method))
        axes.set_yscale("log")
        axes.set_xlabel("optimizer step")
        axes.set_title(f"{setting[0]} processes", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("consensus distance")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def draw_loss(results: dict[Setting, dict[str, dict[str, Result]]], path: Path) -> None:
    """Validation loss over time, mean over seeds, with late ranks."""
    settings = [setting for setting in sorted(results) if setting[1:] == ("delay", "shared")]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, setting in zip(np.atleast_1d(figure.subplots(1, len(settings))), settings, strict=True):
        for method, runs in results[setting].items():
            seconds, losses = np.mean([run.evaluations for run in runs.values()], axis=0).T
            axes.plot(seconds, losses, marker=".", label=method, color=COLOURS.get(method))
        axes.set_xlabel("seconds of training")
        axes.set_ylabel("validation loss (nats per byte)")
        axes.set_title(f"{setting[0]} processes", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?", default=Path("docs/study/sync"))
    parser.add_argument("--sweeps", nargs="+", default=["wagma2021_small", "wagma2021_small_details"])
    options = parser.parse_args(arguments)
    results = results_of(options.sweeps)
    options.directory.mkdir(parents=True, exist_ok=True)
    parts = []
    for setting in sorted(results):
        ranks, imbalance, distribution = setting
        parts.append(
            f"## {ranks} processes, imbalance {imbalance}, data {distribution}\n\n{table(results[setting])}\n"
        )
    (options.directory / "tables.md").write_text("\n".join(parts), encoding="utf-8")
    draw_consensus(results, options.directory / "consensus.png")
    draw_loss(results, options.directory / "loss.png")
    print("\n".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
