"""One chart as a Vega-Lite specification. It names its data; `figures` holds the data once for all charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from analysis.curves import Dataset
from analysis.look import Spec, dashes, shapes


@dataclass(frozen=True)
class Panel:
    name: str
    title: str
    spec: Spec


@dataclass(frozen=True)
class Axis:
    field: str
    title: str
    unit: str  # of the values, for the tooltip; the axis may count in a larger one
    end: float
    spec: Spec


# 0.5, 800k, 2B
_SI = "datum.value < 1 ? format(datum.value, '~g') : replace(format(datum.value, '~s'), 'G', 'B')"


def axes(ends: dict[str, float]) -> tuple[Axis, Axis, Axis]:
    """Tokens, steps and time; time in the unit that suits the longest run."""
    seconds = ends["time"]
    unit, size = ("s", 1) if seconds < 300 else ("min", 60) if seconds < 3 * 3600 else ("h", 3600)
    step = _nice_step(seconds / size) * size
    ticks = [i * step for i in range(int(seconds / step) + 1)]
    clock: Spec = {"labelExpr": f"format(datum.value / {size}, '~g')", "values": ticks}
    return (
        Axis("tokens", "tokens", "tokens", ends["tokens"], {"labelExpr": _SI}),
        Axis("step", "optimizer steps", "optimizer steps", ends["step"], {"labelExpr": _SI}),
        Axis("time", f"training time ({unit})", "training time (s)", seconds, clock),
    )


def _nice_step(span: float) -> float:
    """A round distance that divides `span` into about five."""
    rough = max(span, 1e-9) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(m for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def _schedule_scales(labels: Sequence[str]) -> tuple[Spec, Spec, Spec]:
    """Colour, dash and shape by schedule: the same in every figure, since the domain is fixed."""
    field = {"field": "schedule", "type": "nominal", "title": None}

    domain = {"domain": list(labels)}
    return (
        {**field, "scale": domain},  # the range is config.range.category
        {**field, "scale": {**domain, "range": dashes(len(labels))}},
        {**field, "scale": {**domain, "range": shapes(len(labels))}},
    )


HIDDEN = {"name": "hidden", "value": []}  # the page's legend fills it
_SHOWN = {"filter": "indexof(hidden, datum.schedule) < 0"}


def _tooltip(*entries: tuple[str, str, str | None]) -> Spec:
    """Title, field and number format of each line, as an expression.

    Vega-Lite's own list of fields loses the texts where the nearest point is sought (6.4: it looks them up on
    the cell around the point, not on the point).
    """
    shown = []
    for title, field, form in entries:
        value = f"(datum.datum || datum)['{field}']"
        shown.append(f"'{title}': " + (f"format({value}, '{form}')" if form else f"{value} + ''"))
    return {"value": {"expr": "{" + ", ".join(shown) + "}"}}


@dataclass(frozen=True)
class Quantity:
    title: str
    scale: Spec
    axis: Spec
    line: Literal["linear", "step-before"] = "linear"
    measured: bool = False  # mark the points of each run: they are few


def curve_panel(dataset: str, axis: Axis, quantity: Quantity, labels: Sequence[str]) -> Panel:
    """Runs faint, means bold, and the nearest mean point with its numbers under the pointer."""
    color, dash, _ = _schedule_scales(labels)
    x: Spec = {"field": "x", "type": "quantitative", "title": axis.title, "axis": axis.spec}
    x |= {"scale": {"nice": False, "domain": [0, axis.end]}}
    y: Spec = {"field": "y", "type": "quantitative", "title": quantity.title}
    y |= {"scale": quantity.scale, "axis": quantity.axis}
    line: Spec = {"type": "line", "interpolate": quantity.line, "clip": True, "aria": False}
    means: Spec = {
        "data": {"name": f"{dataset}_means"},
        "transform": [{"filter": f"datum.axis == '{axis.field}'"}, _SHOWN],
    }
    runs_layer: Spec = {
        "data": {"name": f"{dataset}_runs"},
        "transform": [_SHOWN],
        "mark": {
            **line,
            "opacity": 0.28,
            "strokeWidth": 1,
            "point": {"size": 14, "opacity": 0.5} if quantity.measured else False,
        },
        "encoding": {"x": {**x, "field": axis.field}, "y": y, "color": color, "detail": {"field": "run"}},
    }
    means_layer: Spec = {
        **means,
        "mark": {**line, "strokeWidth": 2.2},
        "encoding": {"x": x, "y": y, "color": color, "strokeDash": dash},
    }
    pointer = f"nearest_{dataset}_{axis.field}"
    select = {"type": "point", "nearest": True, "on": "pointerover", "clear": "pointerout"}
    pointer_layer: Spec = {
        **means,
        "params": [{"name": pointer, "select": {**select, "encodings": ["x", "y"]}}],
        "mark": {"type": "point", "filled": True, "size": 55, "clip": True, "aria": False},
        "encoding": {
            "x": x,
            "y": y,
            "color": color,
            "opacity": {"condition": {"param": pointer, "empty": False, "value": 1}, "value": 0},
            "tooltip": _tooltip(
                ("schedule", "schedule", None),
                (axis.unit, "x", ",.4~r"),
                (quantity.title, "y", ".4~r"),
                ("seeds", "seeds", None),
            ),
        },
    }
    spec: Spec = {"height": 230, "layer": [runs_layer, means_layer, pointer_layer]}
    return Panel(f"{dataset}_{axis.field}", f"over {axis.title}", spec)


def front_panel(labels: Sequence[str], steps: Sequence[float], quantity: Quantity) -> Panel:
    """One mark per schedule, one smaller per run, and the steps of what no other schedule beats."""
    margin = 1.05 * (max(steps) / min(steps)) ** 0.04
    ends = [min(steps) / margin, max(steps) * margin]
    color, _, shape = _schedule_scales(labels)
    plain, outline = {**color, "legend": None}, {**shape, "legend": None}  # labelled in place instead
    x: Spec = {
        "field": "step",
        "type": "quantitative",
        "title": "optimizer steps",
        "scale": {"type": "log", "nice": False, "domain": ends},
        "axis": _log_axis(ends[0], ends[1], 10),
    }
    y: Spec = {"field": "y", "type": "quantitative", "title": quantity.title}
    y |= {"scale": quantity.scale, "axis": quantity.axis}
    numbers = (("optimizer steps", "step", ",~r"), (quantity.title, "y", ".4f"))
    means: Spec = {"data": {"name": "final_means"}, "transform": [_SHOWN]}
    point: Spec = {"type": "point", "aria": False}
    label: Spec = {
        "type": "text",
        "align": {"expr": "datum.left ? 'right' : 'left'"},
        "dx": {"expr": "datum.left ? -9 : 9"},
        "dy": {"expr": "datum.below ? 15 : -11"},
        "baseline": "middle",
        "fontWeight": 600,
    }
    layers: list[Spec] = [
        {
            **means,
            "transform": [{"filter": "datum.front"}, _SHOWN],
            "mark": {"type": "line", "interpolate": "step-after", "aria": False, "style": "front"},
            "encoding": {"x": x, "y": y},
        },
        {
            **means,
            "mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.55, "clip": True, "aria": False},
            "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": plain},
        },
        {
            "data": {"name": "final_runs"},
            "transform": [_SHOWN],
            "mark": {**point, "size": 30, "opacity": 0.6},
            "encoding": {
                "x": x,
                "y": y,
                "color": plain,
                "shape": outline,
                "tooltip": _tooltip(("run", "run", None), *numbers),
            },
        },
        {
            **means,
            "mark": {**point, "filled": True, "size": 110, "opacity": 1},
            "encoding": {
                "x": x,
                "y": y,
                "color": plain,
                "shape": outline,
                "tooltip": _tooltip(("schedule", "schedule", None), *numbers, ("seeds", "seeds", None)),
            },
        },
        {
            **means,
            "mark": {**label, "aria": False, "limit": 260},
            "encoding": {"x": x, "y": y, "color": plain, "text": {"field": "schedule"}},
        },
    ]
    return Panel("front", "final validation loss against optimizer steps", {"height": 320, "layer": layers})


def loss(title: str, runs: Dataset, means: Dataset, share: float, measured: bool) -> Quantity:
    """Logarithmic, from the lowest value to the highest mean after the first `share` of the tokens.

    The first steps, far above what is compared, would leave the interesting part a thin strip.
    """
    drawn = finite(runs)
    along = [
        (x, y)
        for x, y, axis in zip(means["x"], means["y"], means["axis"], strict=True)
        if axis == "tokens" and y is not None
    ]
    end = max((x for x, _ in along), default=0)
    late = [y for x, y in along if x >= share * end] or drawn
    low, high = 0.985 * min([*drawn, *late]), 1.03 * max(late)
    scale: Spec = {"type": "log", "nice": False, "domain": [_rounded(low), _rounded(high)]}
    return Quantity(title, scale, {"format": _tick_format(high - low)}, measured=measured)


def final_loss(runs: Dataset, means: Dataset) -> Quantity:
    """Around the points: an interval of two seeds may be far longer and is cut at the frame."""
    title = "final validation loss"
    values = [*finite(runs), *finite(means)]
    span = max(values) - min(values) or 0.05 * abs(max(values)) or 1.0
    low, high = min(values) - 0.25 * span, max(values) + 0.25 * span
    scale: Spec = {"zero": False, "nice": True, "domain": [_rounded(low), _rounded(high)]}
    return Quantity(title, scale, {"format": _tick_format(high - low)})


def logarithmic(
    title: str, values: Sequence[float], base: int, line: Literal["linear", "step-before"]
) -> Quantity:
    low, high = min(values) * 0.9, max(values) * 1.1
    scale: Spec = {"type": "log", "base": base, "nice": False, "domain": [_rounded(low), _rounded(high)]}
    return Quantity(title, scale, _log_axis(low, high, base), line)


def _log_axis(low: float, high: float, base: int) -> Spec:
    """Ticks at the powers of two, or at 1, 2, 3 and 5 times the powers of ten; Vega's own if few."""
    exponents = range(math.floor(math.log(low, base)), math.ceil(math.log(high, base)) + 1)
    ticks = [m * float(base) ** k for k in exponents for m in ((1,) if base == 2 else (1, 2, 3, 5))]
    inside = [tick for tick in ticks if low <= tick <= high]
    if len(inside) < 2:
        return {"labelExpr": _SI, "tickCount": 6}
    return {"labelExpr": _SI, "values": inside, "tickCount": len(inside)}  # else it thins them


def finite(data: Dataset) -> list[float]:
    return [y for y in data["y"] if y is not None]


def _tick_format(span: float) -> str:
    return ".1f" if span > 0.5 else ".2f" if span > 0.05 else ".3f"


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
