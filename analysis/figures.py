"""The figures as Vega-Lite specifications: one source for the page's charts and for the PNG files.

A figure is a row of panels. The page embeds each panel by itself, so that it can follow the width and the
colour scheme; `png` joins them. Panels name their data, which `datasets` holds once for all of them. Colours
come from the configuration (`look.config`), since they depend on the scheme; dashes and shapes do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import vl_convert

from analysis import align, curves, look, panels
from analysis import numbers as text
from analysis.curves import MEDIAN_SHARE, SMOOTHING, Dataset, Resample
from analysis.load import Sweep
from analysis.look import Spec
from analysis.panels import Axis, Panel
from analysis.statistics import Estimate
from analysis.summary import Schedule

VEGA_LITE = "6.4"


@dataclass(frozen=True)
class Figure:
    name: str
    title: str
    caption: str
    alternative: str  # what the figure shows, in words and numbers
    panels: list[Panel]


_MEANS = "Bold: mean over seeds; faint: seeds"


def build(sweep: Sweep, schedules: Sequence[Schedule]) -> tuple[list[Figure], dict[str, Dataset]]:
    """The figures that this sweep's records can fill, and the data they name."""
    every, tokens = ("tokens", "step", "time"), ("tokens",)
    recorded: dict[str, tuple[str, tuple[str, ...], Resample, bool]] = {
        "validation": ("val/loss", every, align.interpolate, True),
        "training": ("train/loss", every, curves.smooth, False),
        "batch": ("batch/size", tokens, align.hold, False),
        "noise": ("stat/noise_scale", tokens, align.interpolate, False),
    }
    datasets: dict[str, Dataset] = {}
    ends = dict.fromkeys(every, 1.0)
    for name, (column, over, resample, exact) in recorded.items():
        lines = curves.of(sweep, schedules, column)
        ends = {axis: max([end, *(float(line.x[axis][-1]) for line in lines)]) for axis, end in ends.items()}
        datasets[f"{name}_runs"] = curves.run_lines(lines, over)
        datasets[f"{name}_means"] = curves.mean_lines(lines, over, resample, exact)
    datasets["final_runs"] = curves.final_points(schedules)
    datasets["final_means"] = curves.final_means(schedules)

    axes = panels.axes(ends)
    makers = (_tradeoff, _validation, _training, _batch, _noise)
    figures = [figure for make in makers if (figure := make(datasets, schedules, axes))]
    specs = str([panel.spec for figure in figures for panel in figure.panels])
    return figures, {name: data for name, data in datasets.items() if f"'{name}'" in specs}


Axes = tuple[Axis, Axis, Axis]
_Schedules = Sequence[Schedule]


def _labels(schedules: _Schedules) -> list[str]:
    return [schedule.label for schedule in schedules]


def _tradeoff(data: dict[str, Dataset], schedules: _Schedules, axes: Axes) -> Figure | None:
    runs, means = data["final_runs"], data["final_means"]
    if not means["y"]:
        return None
    return Figure(
        "tradeoff",
        "The trade: loss against steps",
        "Lower is a better model, further left is fewer optimizer steps for the same tokens. Large marks: "
        "mean over seeds, with the 95% interval as a bar, cut at the frame; small marks: seeds. The dashed "
        "line joins the schedules that no other beats in both.",
        f"Final validation loss and optimizer steps. {_ends(schedules)}",
        [panels.front_panel(_labels(schedules), runs["step"], panels.final_loss(runs, means))],
    )


def _validation(data: dict[str, Dataset], schedules: _Schedules, axes: Axes) -> Figure | None:
    runs = data["validation_runs"]
    if not panels.finite(runs):
        return None
    quantity = panels.loss("validation loss", runs, data["validation_means"], 0.1, measured=True)
    return Figure(
        "validation_loss",
        "Validation loss",
        f"{_MEANS}, with a point for each evaluation. Logarithmic; early evaluations may lie above the "
        "frame.",
        f"Validation loss over tokens, optimizer steps and training time. {_ends(schedules)}",
        [panels.curve_panel("validation", axis, quantity, _labels(schedules)) for axis in axes],
    )


def _training(data: dict[str, Dataset], schedules: _Schedules, axes: Axes) -> Figure | None:
    runs = data["training_runs"]
    if not panels.finite(runs):
        return None
    quantity = panels.loss("training loss", runs, data["training_means"], 0.05, measured=False)
    return Figure(
        "training_loss",
        "Training loss",
        f"{_MEANS}, as recorded. The means are averaged over windows of {SMOOTHING:.0%} of the axis. "
        "Logarithmic; the first steps lie above the frame.",
        f"Training loss over tokens, optimizer steps and training time. {_ends(schedules, 'train_loss')}",
        [panels.curve_panel("training", axis, quantity, _labels(schedules)) for axis in axes],
    )


def _batch(data: dict[str, Dataset], schedules: _Schedules, axes: Axes) -> Figure | None:
    sizes = panels.finite(data["batch_runs"])
    if not sizes:
        return None
    quantity = panels.logarithmic("batch size (sequences)", sizes, 2, "step-before")
    final = "; ".join(
        f"{s.label}: mean {text.count(s.mean('mean_batch'))}, final {text.count(s.mean('final_batch'))}"
        for s in schedules
        if s.finished
    )
    return Figure(
        "batch_size",
        "Batch size",
        f"Sequences per optimizer step. {_MEANS}. The last step, cut to end on the budget, is not drawn.",
        f"Batch size in sequences over tokens. {final}",
        [panels.curve_panel("batch", axes[0], quantity, _labels(schedules))],
    )


def _noise(data: dict[str, Dataset], schedules: _Schedules, axes: Axes) -> Figure | None:
    scales = [y for y in panels.finite(data["noise_runs"]) if y > 0]
    if not scales:
        return None
    return Figure(
        "noise_scale",
        "Gradient noise scale",
        f"The batch, in sequences, at which noise and signal of the gradient are equal: running median over "
        f"{MEDIAN_SHARE:.0%} of the measurements, since a single one is often meaningless. {_MEANS}.",
        f"Noise scale over tokens, from {text.compact(min(scales))} to {text.compact(max(scales))} sequences",
        [
            panels.curve_panel(
                "noise",
                axes[0],
                panels.logarithmic("noise scale (sequences)", scales, 10, "linear"),
                _labels(schedules),
            )
        ],
    )


def _ends(schedules: _Schedules, quantity: Literal["val_loss", "train_loss"] = "val_loss") -> str:
    """Where each schedule ends: the figure in words."""
    ends: dict[str, Estimate | None] = {s.label: getattr(s, quantity) for s in schedules}
    return "; ".join(
        f"{s.label}: no finished run"
        if (end := ends[s.label]) is None
        else f"{s.label}: {text.with_interval(end.mean, end.half_width)} after "
        f"{text.count(s.mean('steps'))} steps"
        for s in schedules
    )


def joined(figure: Figure, datasets: dict[str, Dataset], labels: Sequence[str]) -> Spec:
    """The whole figure as one specification, for a file."""
    width = 560 if len(figure.panels) == 1 else 300
    parts = [{**panel.spec, "layer": _static(panel.spec), "width": width} for panel in figure.panels]
    entry = 50 + 7 * max(map(len, labels))  # pixels of a legend's entry
    font = "Helvetica, Arial, Liberation Sans, sans-serif"
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "title": figure.title,
        "description": figure.alternative,
        "params": [panels.HIDDEN],
        "datasets": {name: curves.rows(data) for name, data in datasets.items() if f"'{name}'" in str(parts)},
        "hconcat": parts,
        "spacing": 28,
        "config": look.config("light", len(labels), font, max(1, width * len(parts) // entry)),
    }


def _static(spec: Spec) -> list[Spec]:
    """The layers that show something without a pointer."""
    return [layer for layer in spec["layer"] if "params" not in layer]


def png(spec: Spec) -> bytes:
    return vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, scale=2)
