"""The study of docs/study/problems: batch tests on small problems whose answer is known.

    python -m pipeline -m experiment=bollapragada2018_small     # and each other of PRESETS
    python -m benchmarks.problems_study docs/study/problems     # tables.md and figures from their records

The x-axis counts full gradient evaluations: gradients of samples over samples to train on (`epochs`). A
figure shows the median over seeds and the range of all of them; a value between two evaluations is read off
the straight line between them, in the logarithm where the axis is logarithmic.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analysis.load import load_sweep
from pipeline.config import ConfigError
from pipeline.store import Row, RunDirectory

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Preset:
    """`levels`: of the measure; the table tells when an evaluation first was at or below each (at or above,
    where more is better)."""

    title: str
    measure: str
    name: str  # of the measure, for the axis
    levels: Sequence[float]
    better: int = -1  # less; 1: more
    log: bool = True
    form: str = ".2g"  # of the measure in the table
    rounds: bool = False  # the measure over rounds of averaging, in place of the batch


PRESETS = {
    "bollapragada2018_small": Preset(
        "Logistic regression on 455 tumours", "exact/gap", "F − F*", (3e-2, 1e-2, 3e-3)
    ),
    "espath2021_small": Preset("Logistic regression on 1438 digits", "exact/gap", "F − F*", (3e-1, 1e-1)),
    "xie2020_small": Preset(
        "Logistic regression in a box on 5600 drawn samples", "exact/gap", "F − F*", (1e-2, 1e-3, 1e-4)
    ),
    "adadagrad_mnist_small": Preset(
        "Logistic regression on 1438 digits by AdaGrad", "exact/grad_norm", "‖∇F‖", (0.2, 0.1)
    ),
    "adadagrad_cifar_small": Preset(
        "A narrow ResNet-18 on 1438 digits by AdaGrad", "exact/grad_norm", "‖∇F‖", (1.0, 0.5)
    ),
    "coda2020_small": Preset(
        "AUC by CoDA on four ranks: logistic regression on 5600 drawn samples",
        "val/auc",
        "held-out AUC",
        (0.87, 0.88),
        better=1,
        log=False,
        form=".4f",
        rounds=True,
    ),
}

ALONE = 1e3  # a ν from here on leaves the inner-product test alone
COLOURS = {
    "norm test": "#1f4e79",
    "inner product alone": "#c9a227",
    "inner product": "#2e7d32",
    "inner product, best split": "#e8763d",
    "coordinates": "#8d6e63",
    "composite": "#b03060",
    "allreduce": "#1f4e79",
    "local_sgd": "#e8763d",
}
LOSSES = {"binary": "logistic loss"}
GREYS = ("#b5b5b5", "#777777", "#333333")  # constant batches, the smallest first
DASHES = ("-", "--", ":", "-.")  # of lines of one colour


@dataclass(frozen=True)
class Curve:
    """Of one run."""

    epochs: Array  # at evaluations
    values: Array  # of the measure there
    step_epochs: Array
    batches: Array
    accuracy: float | None


@dataclass(frozen=True)
class Method:
    kind: str  # of COLOURS, or `constant`
    label: str
    curves: Mapping[str, Curve]  # by seed
    period: int = 1  # steps between two rounds of averaging

    def rounds(self, curve: Curve) -> int:
        return len(curve.batches) // self.period


def described(setting: Mapping[str, str]) -> tuple[str, str]:
    """(kind, label) of the axes of a sweep that make a schedule or, where it has none, a way to average."""
    batch = setting.get("batch", "")
    number = {key.partition(".")[2]: value for key, value in setting.items() if key.startswith("batch.")}
    match batch:
        case "constant":
            kind, label = "constant", f"constant {number['size']}"
        case "norm_test":
            kind, label = "norm test", f"norm test, η {number['eta']}"
        case "inner_product" if "epsilon" in number:
            kind, label = "inner product, best split", f"inner product, best split, ε {number['epsilon']}"
        case "inner_product" if float(number["nu"]) >= ALONE:
            kind, label = "inner product alone", f"inner product alone, θ {number['theta']}"
        case "inner_product":
            kind, label = "inner product", f"inner product, θ {number['theta']}, ν {number['nu']}"
        case "coordinate_norm_test":
            kind, label = "coordinates", f"coordinates, η {number['eta']}"
        case "composite":
            form = number["form"].replace("_", " ")
            kind, label = "composite", f"complete step, {form}, θ {number['theta']}"
        case _ if setting["sync"] == "local_sgd":
            kind, label = "local_sgd", f"variables averaged every {setting['sync.period']}"
        case _:
            kind, label = "allreduce", "gradients averaged"
    others = [setting[axis] for axis in ("optim", "model.loss") if axis in setting]
    return kind, ", ".join([label, *(LOSSES.get(other, other) for other in others)])


def curve_of(rows: Sequence[Row], measure: str) -> Curve:
    """Without the last step where the budget left it only a part of its batch: its gradient is not what the
    test asked for, and at the rate of a large batch it may undo many steps."""
    trained = [row for row in rows if "train/loss" in row]
    if len(trained) > 1 and trained[-1]["batch/size"] < trained[-2]["batch/size"]:
        trained.pop()
    evaluated = [row for row in rows if measure in row and row["step"] <= trained[-1]["step"]]
    return Curve(
        np.array([row["epochs"] for row in evaluated]),
        np.array([row[measure] for row in evaluated]),
        np.array([row["epochs"] for row in trained]),
        np.array([row["batch/size"] for row in trained], dtype=np.float64),
        evaluated[-1].get("val/accuracy"),
    )


def methods_of(sweep: str, measure: str) -> list[Method]:
    """Of finished runs, in the order of the sweep."""
    found: dict[tuple[str, str, int], dict[str, Curve]] = defaultdict(dict)
    for run in load_sweep(sweep).runs:
        if run.state == "DONE" and run.id:
            kind, label = described(run.setting)
            curves = found[kind, label, int(run.setting.get("sync.period", 1))]
            if run.seed in curves:
                raise ConfigError(f"{sweep}: two runs of {label}, seed {run.seed} cannot be told apart")
            curves[run.seed] = curve_of(RunDirectory.find(run.id).rows(), measure)
    return [Method(kind, label, curves, period) for (kind, label, period), curves in found.items()]


# --- numbers ---------------------------------------------------------------------------------------------


def reached(curve: Curve, level: float, better: int) -> float | None:
    """Epochs at the first evaluation that is as good."""
    there = better * curve.values >= better * level
    return float(curve.epochs[there.argmax()]) if there.any() else None


def table(methods: Sequence[Method], preset: Preset) -> str:
    sign = "≥" if preset.better > 0 else "≤"
    levels = [f"epochs to {preset.name} {sign} {level:g}" for level in preset.levels]
    counted = ["rounds" if preset.rounds else "last batch", f"{preset.name} at the end"]
    columns = ["method", "steps", *counted, *levels, *([] if preset.rounds else ["accuracy"])]
    rows = [columns, ["---"] * len(columns)]
    seeds = max(len(method.curves) for method in methods)
    for method in methods:
        curves = list(method.curves.values())
        last = [method.rounds(curve) if preset.rounds else float(curve.batches[-1]) for curve in curves]
        row = [
            method.label + (f" ({len(curves)} of {seeds} seeds)" if len(curves) < seeds else ""),
            _show([len(curve.batches) for curve in curves], ".0f"),
            _show(last, ".0f"),
            _show([float(curve.values[-1]) for curve in curves], preset.form),
            *(_show([reached(curve, at, preset.better) for curve in curves], ".1f") for at in preset.levels),
        ]
        if not preset.rounds:
            accuracies = [curve.accuracy for curve in curves if curve.accuracy is not None]
            row.append(_show(accuracies, ".3f"))
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _show(values: Sequence[float | None], form: str) -> str:
    """Median (least to most); how many of the seeds have a value where some have none."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    if len(known) < len(values):
        return f"{len(known)} of {len(values)} seeds"
    shown = f"{np.median(known):{form}}"
    low, high = f"{min(known):{form}}", f"{max(known):{form}}"
    return shown if low == high else f"{shown} ({low} to {high})"


# --- figures ---------------------------------------------------------------------------------------------


def over_seeds(method: Method, grid: Array, log: bool) -> tuple[Array, Array, Array]:
    """(median, least, most) of the measure at each place of the grid; NaN where a run has none."""

    def at(curve: Curve) -> Array:
        values = np.log(np.maximum(curve.values, 1e-300)) if log else curve.values
        read: Array = np.interp(grid, curve.epochs, values, left=np.nan, right=np.nan)
        return np.exp(read) if log else read

    values = np.array([at(curve) for curve in method.curves.values()])
    return np.median(values, axis=0), values.min(axis=0), values.max(axis=0)


def batches_over(method: Method, grid: Array) -> Array:
    """Median over seeds of the batch of the step that a place of the grid lies in."""
    steps = [np.searchsorted(curve.step_epochs, grid) for curve in method.curves.values()]
    batches = [
        curve.batches[np.minimum(step, len(curve.batches) - 1)]
        for curve, step in zip(method.curves.values(), steps, strict=True)
    ]
    return np.asarray(np.median(batches, axis=0), dtype=np.float64)


def rounds_per_epoch(method: Method) -> float:
    """Of batches of one size, where a round comes every `period` steps."""
    curve = next(iter(method.curves.values()))
    return len(curve.batches) / float(curve.step_epochs[-1]) / method.period


def styles(methods: Sequence[Method]) -> list[tuple[str, str]]:
    """(colour, dashes) of each: one colour for a kind of test, in every figure."""
    sizes = sorted({_size(method) for method in methods if method.kind == "constant"})
    seen = Counter({COLOURS["inner product, best split"]: 1})  # dashed, as local_sgd: lies on another line
    found = []
    for method in methods:
        constant = method.kind == "constant"
        colour = GREYS[sizes.index(_size(method))] if constant else COLOURS[method.kind]
        found.append((colour, DASHES[seen[colour]]))
        seen[colour] += 1
    return found


def _size(method: Method) -> int:
    return int(next(iter(method.curves.values())).batches[0])


def draw(methods: Sequence[Method], preset: Preset, path: Path) -> None:
    """The measure over full gradient evaluations, and beside it the batch, or the measure over rounds."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    measured, beside = figure.subplots(1, 2)
    last = max(curve.epochs[-1] for method in methods for curve in method.curves.values())
    grid = np.linspace(0, last, 400)
    for method, (colour, dashes) in zip(methods, styles(methods), strict=True):
        median, least, most = over_seeds(method, grid, preset.log)
        measured.plot(grid, median, dashes, color=colour, label=method.label, linewidth=1.6)
        measured.fill_between(grid, least, most, color=colour, alpha=0.13, linewidth=0)
        if preset.rounds:
            rounds = grid * rounds_per_epoch(method)
            beside.plot(rounds[rounds >= 1], median[rounds >= 1], dashes, color=colour, linewidth=1.6)
        else:
            beside.plot(grid, batches_over(method, grid), dashes, color=colour, linewidth=1.6)
    if preset.log:
        measured.set_yscale("log")
    measured.set_ylabel(preset.name)
    if preset.rounds:
        beside.set_xscale("log")
        beside.sharey(measured)
    else:
        beside.set_yscale("log")
        beside.set_ylabel("batch (samples)")
    _finish(measured, "full gradient evaluations")
    _finish(beside, "rounds of averaging" if preset.rounds else "full gradient evaluations")
    figure.suptitle(preset.title, fontsize=11)
    figure.legend(*measured.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=100)


def _finish(axes: Axes, x: str) -> None:
    axes.set_xlabel(x)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?", default=Path("docs/study/problems"))
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    options = parser.parse_args(arguments)
    options.directory.mkdir(parents=True, exist_ok=True)
    parts = []
    for name in options.presets:
        preset = PRESETS[name]
        methods = methods_of(name, preset.measure)
        seeds = len({seed for method in methods for seed in method.curves})
        parts.append(f"## {name}\n\n{preset.title}; seeds: {seeds}.\n\n{table(methods, preset)}\n")
        draw(methods, preset, options.directory / f"{name}.png")
    (options.directory / "tables.md").write_text("\n".join(parts), encoding="utf-8")
    print("\n".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
