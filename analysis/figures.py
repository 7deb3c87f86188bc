"""The figures as Vega-Lite specifications: one source for the page's charts and for the PNG files.

A figure is a row of panels. The page embeds one panel of each chart by itself, so that it can follow the
width, the colour scheme and the chosen axis; `joined` makes one picture of those that a file shows. Panels
name their data, which `datasets` holds once for all of them. Colours come from the configuration
(`look.config`), since they depend on the scheme; dashes and shapes do not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import vl_convert

from analysis import align, curves, look, panels
from analysis import numbers as text
from analysis.curves import MEDIAN_SHARE, RATE_WINDOW, SMOOTHING, Curve, Dataset, Resample, Trace
from analysis.load import Sweep
from analysis.look import Spec
from analysis.panels import Axis, Panel, Quantity
from analysis.projection import Projection
from analysis.statistics import Estimate
from analysis.summary import Schedule, batch_unit
from pipeline.config import common_unit

VEGA_LITE = "6.4"
MARKED_POINTS = 1_000  # of all runs together: more are a smear, and slow to draw


@dataclass(frozen=True)
class Figure:
    """A figure of the report, with its words."""

    name: str
    title: str
    caption: str
    alternative: str  # what the figure shows, in words and numbers
    panels: list[Panel]
    over: tuple[str, ...]  # the axes that a file shows side by side; the page lets the reader choose

    @property
    def charts(self) -> list[str]:
        return list(dict.fromkeys(panel.chart for panel in self.panels))

    @property
    def follows_axis(self) -> bool:
        """Whether the page's choice of an axis governs it."""
        return len(self.panels) > len(self.charts)


@dataclass(frozen=True)
class _Curves:
    """What is drawn over tokens, steps, time and FLOPs, and how."""

    curve: Callable[[Trace], Curve | None]
    resample: Resample
    exact: bool = False  # the mean at every point of every run: they are few


_CURVES = {
    "gap": _Curves(curves.positive("exact/gap"), align.interpolate, exact=True),
    "grad_norm": _Curves(curves.positive("exact/grad_norm"), align.interpolate, exact=True),
    "accuracy": _Curves(curves.recorded("val/accuracy"), align.interpolate, exact=True),
    "validation": _Curves(curves.recorded("val/loss"), align.interpolate, exact=True),
    "averaged": _Curves(curves.recorded("val/loss_averaged"), align.interpolate, exact=True),
    "training": _Curves(curves.recorded("train/loss"), curves.smooth),
    "batch": _Curves(curves.batch_size, align.hold),
    "noise": _Curves(curves.noise_scale, align.interpolate),
    "throughput": _Curves(curves.throughput, align.interpolate),
}


def build(
    sweep: Sweep, schedules: Sequence[Schedule], projection: Projection
) -> tuple[list[Figure], dict[str, Dataset]]:
    """The figures that this sweep's records can fill, and the data they name."""
    datasets: dict[str, Dataset] = {}
    traces = curves.traces(sweep, schedules)
    lines = {
        name: [line for trace in traces if (line := found.curve(trace))] for name, found in _CURVES.items()
    }
    every = [line for found in lines.values() for line in found]
    known = curves.common_axes(every)
    ends = {axis: _end([float(line.x[axis][-1]) for line in every]) for axis in known}
    for name, found in _CURVES.items():
        datasets[f"{name}_runs"] = curves.run_lines(lines[name], known)
        datasets[f"{name}_means"] = curves.mean_lines(lines[name], known, found.resample, found.exact)
    datasets["final_runs"] = curves.final_points(schedules)
    means = curves.final_means(schedules)
    if means["y"]:
        means = panels.labelled(means, panels.final_loss(datasets["final_runs"], means))
    datasets["final_means"] = means
    datasets["projected_time"] = curves.projected(projection, "seconds")
    datasets["projected_gpu_hours"] = curves.projected(projection, "gpu_hours")

    drawing = Drawing(datasets, schedules, panels.axes(ends, common_unit(s.unit for s in schedules)))
    makers = (
        *(_tradeoff, _gap, _gradient, _validation, _averaged, _accuracy, _training, _batch, _noise),
        *(_throughput, _projected),
    )
    figures = [figure for make in makers if (figure := make(drawing))]
    used = {name for figure in figures for panel in figure.panels for name in panel.names}
    return figures, {name: data for name, data in datasets.items() if name in used}


def _end(ends: Sequence[float]) -> float:
    return max((end for end in ends if math.isfinite(end)), default=1.0)


@dataclass(frozen=True)
class Drawing:
    """What the figures are made of."""

    data: dict[str, Dataset]
    schedules: Sequence[Schedule]
    axes: dict[str, Axis]

    @property
    def labels(self) -> list[str]:
        return [schedule.label for schedule in self.schedules]

    @property
    def unit(self) -> str:
        """tokens, or samples"""
        return common_unit(s.unit for s in self.schedules)

    @property
    def batch_unit(self) -> str:
        return batch_unit(self.unit)

    @property
    def first(self) -> tuple[str, ...]:
        """The axis of a file that shows one."""
        return (next(iter(self.axes)),)

    @property
    def lines(self) -> str:
        """What a line is, in words."""
        if any(schedule.finished for schedule in self.schedules):
            return "Bold: mean over seeds; faint: seeds"
        return "Each line is a run, none of which has finished"

    def values(self, name: str) -> list[float]:
        return panels.finite(self.data[f"{name}_runs"])

    def curves(self, name: str, quantity: Quantity) -> list[Panel]:
        """One panel for each axis."""
        has_means = bool(self.data[f"{name}_means"]["y"])
        return [
            panels.curve_panel(name, axis, quantity, self.labels, has_means) for axis in self.axes.values()
        ]

    @property
    def compared(self) -> tuple[str, ...]:
        """The axes of a file: FLOPs are tokens times a constant unless the runs' models differ, and samples
        are full gradients times their number."""
        runs = [run for schedule in self.schedules for run in schedule.runs]
        models = {repr((run.config.model, run.config.data.sequence_length)) for run in runs if run.config}
        redundant = {"tokens"} if "epochs" in self.axes else {"flops"} if len(models) <= 1 else set()
        return tuple(axis for axis in self.axes if axis not in redundant)


def _tradeoff(drawing: Drawing) -> Figure | None:
    runs, means = drawing.data["final_runs"], drawing.data["final_means"]
    if not means["y"]:
        return None
    quantity = panels.final_loss(runs, means)
    shown = tuple(axis for axis in curves.COSTS if axis in means["axis"])
    absent = [s.label for s in drawing.schedules if s.finished and s.label not in means["schedule"]]
    return Figure(
        "tradeoff",
        "The trade: loss against steps and time",
        "Lower is a better model; further left is fewer optimizer steps, or less training time, for the same "
        f"{drawing.unit}. Large marks: mean over seeds, with the 95% interval as a bar, cut at the frame; "
        "small marks: seeds. The dashed line joins the schedules that no other beats in both."
        + (f" Without a final loss, so not drawn: {', '.join(absent)}." if absent else ""),
        f"Final validation loss, optimizer steps and training time. {_ends(drawing.schedules)}",
        [panels.front_panel(drawing.axes[axis], means, quantity, drawing.labels) for axis in shown],
        shown,
    )


def _validation(drawing: Drawing) -> Figure | None:
    if not drawing.values("validation"):
        return None
    runs, means = drawing.data["validation_runs"], drawing.data["validation_means"]
    marked = len(runs["y"]) <= MARKED_POINTS
    quantity = panels.loss("validation loss", runs, means, 0.1, marked)
    points = ", with a point for each evaluation" if marked else ""
    return Figure(
        "validation_loss",
        "Validation loss",
        f"{drawing.lines}{points}. Logarithmic; early evaluations may lie above the frame.",
        f"Validation loss. {_ends(drawing.schedules)}",
        drawing.curves("validation", quantity),
        drawing.compared,
    )


def _averaged(drawing: Drawing) -> Figure | None:
    if not drawing.values("averaged"):
        return None
    quantity = panels.loss(
        "validation loss, mean iterate",
        drawing.data["averaged_runs"],
        drawing.data["averaged_means"],
        share=0.0,
        measured=True,
    )
    ends = "; ".join(
        f"{s.label} {text.fixed(mean)}, its last weights {text.fixed(s.mean('val_loss'))}"
        for s in drawing.schedules
        if (mean := s.mean("val_loss_averaged")) is not None
    )
    return Figure(
        "validation_loss_averaged",
        "Validation loss of the mean iterate",
        f"Of the mean of weights that optim=swa keeps. At the end: {ends}. {drawing.lines}, with a point for "
        "each evaluation. Logarithmic.",
        f"Validation loss of the mean iterate at the end. {ends}",
        drawing.curves("averaged", quantity),
        drawing.compared,
    )


def _gap(drawing: Drawing) -> Figure | None:
    return _falling(
        drawing,
        "gap",
        "optimality_gap",
        "Optimality gap",
        "The objective over all samples that are trained on, minus its least value.",
    )


def _gradient(drawing: Drawing) -> Figure | None:
    return _falling(
        drawing,
        "grad_norm",
        "gradient_norm",
        "Exact gradient norm",
        "Of the objective over all samples that are trained on.",
    )


def _falling(drawing: Drawing, dataset: str, name: str, title: str, caption: str) -> Figure | None:
    """What goes to 0 where a run converges. `dataset`: its name among the numbers of a run as well."""
    values = drawing.values(dataset)
    if not values:
        return None
    ends = "; ".join(f"{s.label}: {text.small(s.mean(dataset))}" for s in drawing.schedules if s.finished)
    return Figure(
        name,
        title,
        f"{caption} Logarithmic: linear convergence is a straight line. {drawing.lines}.",
        f"{title} at the end. {ends}",
        drawing.curves(dataset, panels.falling(title.lower(), values)),
        drawing.compared,
    )


def _accuracy(drawing: Drawing) -> Figure | None:
    values = drawing.values("accuracy")
    if not values:
        return None
    ends = "; ".join(
        f"{s.label}: {text.percent(s.mean('val_accuracy'))}" for s in drawing.schedules if s.finished
    )
    return Figure(
        "validation_accuracy",
        "Validation accuracy",
        f"Share of held-out samples whose label is guessed. {drawing.lines}.",
        f"Validation accuracy at the end. {ends}",
        drawing.curves("accuracy", panels.share("validation accuracy", values)),
        drawing.compared,
    )


def _training(drawing: Drawing) -> Figure | None:
    if not drawing.values("training"):
        return None
    runs, means = drawing.data["training_runs"], drawing.data["training_means"]
    quantity = panels.loss("training loss", runs, means, 0.05, measured=False)
    return Figure(
        "training_loss",
        "Training loss",
        f"{drawing.lines}, as recorded. The means are averaged over windows of {SMOOTHING:.0%} of the axis. "
        "Logarithmic; the first steps lie above the frame.",
        f"Training loss. {_ends(drawing.schedules, 'train_loss')}",
        drawing.curves("training", quantity),
        drawing.compared,
    )


def _batch(drawing: Drawing) -> Figure | None:
    sizes = [y for y in drawing.values("batch") if y > 0]
    if not sizes:
        return None
    quantity = panels.logarithmic(f"batch size ({drawing.batch_unit})", sizes, 2, "step-before")
    final = "; ".join(
        f"{s.label}: mean {text.count(s.mean('mean_batch'))}, final {text.count(s.mean('final_batch'))}"
        for s in drawing.schedules
        if s.finished
    )
    return Figure(
        "batch_size",
        "Batch size",
        f"{drawing.batch_unit.capitalize()} per optimizer step. {drawing.lines}. The last step, "
        "cut to end on the budget, is not drawn.",
        f"Batch size in {drawing.batch_unit}. {final}",
        drawing.curves("batch", quantity),
        drawing.first,
    )


def _noise(drawing: Drawing) -> Figure | None:
    scales = [y for y in drawing.values("noise") if y > 0]
    if not scales:
        return None
    quantity = panels.logarithmic(f"noise scale ({drawing.batch_unit})", scales, 10, "linear")
    return Figure(
        "noise_scale",
        "Gradient noise scale",
        f"The batch, in {drawing.batch_unit}, at which noise and signal of the gradient are equal: running "
        f"median over {MEDIAN_SHARE:.0%} of the measurements, since a single one is often meaningless. "
        f"{drawing.lines}.",
        f"Noise scale, from {text.compact(min(scales))} to {text.compact(max(scales))} {drawing.batch_unit}",
        drawing.curves("noise", quantity),
        drawing.first,
    )


def _throughput(drawing: Drawing) -> Figure | None:
    rates = [y for y in drawing.values("throughput") if y > 0]
    if not rates:
        return None
    means = "; ".join(
        f"{s.label}: {text.compact(s.mean('tokens_per_second'), 3)} {drawing.unit}/s"
        for s in drawing.schedules
        if s.finished
    )
    return Figure(
        "throughput",
        "Throughput",
        f"{drawing.unit.capitalize()} per second of training, without evaluation, over windows of "
        f"{RATE_WINDOW:.0%} of a run's time. {drawing.lines}.",
        f"{drawing.unit.capitalize()} per second of training. {means}",
        drawing.curves("throughput", panels.from_zero(f"{drawing.unit} per second", rates)),
        drawing.first,
    )


def _projected(drawing: Drawing) -> Figure | None:
    times, hours = drawing.data["projected_time"], drawing.data["projected_gpu_hours"]
    if not times["y"]:
        return None
    most = max(times["gpus"])
    rows = zip(times["schedule"], times["gpus"], times["y"], strict=True)
    in_time = panels.time(times["y"])
    in_hours = panels.logarithmic("GPU-hours", hours["y"], 10, "linear")
    ends = "; ".join(f"{label}: {text.duration(s)} on {gpus:,}" for label, gpus, s in rows if gpus == most)
    return Figure(
        "projection",
        "Projection to other numbers of GPUs",
        "Training time and GPU-hours of the logged batches, predicted from the measured time of a "
        "micro-batch and of the rest of a step. Where a line of time is flat, more GPUs have nothing to do.",
        f"Predicted training time by number of GPUs. {ends}",
        [
            panels.gpus_panel("projected_time", times, in_time, "training time (s)", drawing.labels),
            panels.gpus_panel("projected_gpu_hours", hours, in_hours, "GPU-hours", drawing.labels),
        ],
        ("gpus",),
    )


def _ends(schedules: Sequence[Schedule], quantity: Literal["val_loss", "train_loss"] = "val_loss") -> str:
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
    """The figure as one specification, for a file."""
    shown = [panel for panel in figure.panels if panel.axis in figure.over]
    width = {1: 560, 2: 400}.get(len(shown), 300)
    entry = 50 + 7 * max(map(len, labels))  # pixels of a legend's entry
    font = "Helvetica, Arial, Liberation Sans, sans-serif"
    used = {name for panel in shown for name in panel.names}
    config = look.config("light", len(labels), font, max(1, width * len(shown) // entry))
    config["legend"] |= shown[0].symbols
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "title": figure.title,
        "description": figure.alternative,
        "params": [panels.HIDDEN],
        "datasets": {name: curves.rows(data) for name, data in datasets.items() if name in used},
        "hconcat": [{**panel.spec, "width": width} for panel in shown],
        "spacing": 28,
        "config": config,
    }


def images(spec: Spec) -> dict[str, bytes]:
    """The picture by file extension. Text stays text in SVG and PDF, whose fonts are embedded."""
    svg = _clipped_once(vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE))
    return {
        "png": vl_convert.svg_to_png(svg, scale=2),
        "pdf": vl_convert.svg_to_pdf(svg),
        "svg": svg.encode(),
    }


def _clipped_once(svg: str) -> str:
    """The lines of a layer cut at the frame together: Vega cuts each by itself, which makes the same picture
    but of 100 runs takes ten times as long to rasterize."""

    def outwards(group: str) -> str:
        cut = re.compile(r'(<g class="mark-line [^"]*")( clip-path="[^"]*")')
        found = cut.search(group)
        return cut.sub(r"\1", group).replace('pathgroup"', f'pathgroup"{found[2]}', 1) if found else group

    before, *groups = re.split(r'(?=<g class="mark-group role-scope [^"]*pathgroup")', svg)
    return before + "".join(map(outwards, groups))
