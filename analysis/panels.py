"""One chart as a Vega-Lite specification. It names its data; `figures` holds the data once for all charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from analysis.curves import Dataset
from analysis.look import Spec, dashes, shapes


@dataclass(frozen=True)
class Pointed:
    """What the pointer finds, and what its numbers are."""

    data: list[tuple[str, str]]  # dataset, its column of x; y is y
    x: str
    y: str
    size: float  # of the unit in which the x-axis counts


@dataclass(frozen=True)
class Panel:
    """One set of axes. The panels of one chart show the same over different axes: the page one at a time."""

    chart: str
    axis: str
    title: str
    spec: Spec
    pointed: Pointed
    symbols: Spec  # of the legend in a file

    @property
    def names(self) -> set[str]:
        """The datasets that it draws."""
        return {layer["data"]["name"] for layer in self.spec["layer"]}


@dataclass(frozen=True)
class Axis:
    """What a panel is drawn over."""

    field: str
    title: str
    unit: str  # of the values, for the tooltip; the axis may count in a larger one
    end: float
    spec: Spec
    size: float = 1.0  # of the unit in which it counts


# 0.5, 800k, 2B
_SI = "datum.value < 1 ? format(datum.value, '~g') : replace(format(datum.value, '~s'), 'G', 'B')"

_POWER = "datum.value == 0 ? '0' : replace(format(datum.value, '.3~e'), 'e+', 'e')"  # 1.5e12


def axes(ends: dict[str, float], unit: str = "tokens") -> dict[str, Axis]:
    """Those of `ends`; `unit`: of what the axis "tokens" counts."""
    gradients = "full gradient evaluations"
    found = (
        Axis("epochs", gradients, gradients, ends.get("epochs", 0.0), {"labelExpr": _SI}),
        Axis("tokens", unit, unit, ends["tokens"], {"labelExpr": _SI}),
        Axis("step", "optimizer steps", "optimizer steps", ends["step"], {"labelExpr": _SI}),
        _time_axis(ends["time"]),
        Axis("flops", "model FLOPs", "model FLOPs", ends.get("flops", 0.0), {"labelExpr": _POWER}),
    )
    return {axis.field: axis for axis in found if axis.field in ends}


def _time_axis(seconds: float) -> Axis:
    """In the unit that suits the longest time."""
    unit, size = ("s", 1) if seconds < 300 else ("min", 60) if seconds < 3 * 3600 else ("h", 3600)
    step = _nice_step(seconds / size) * size
    ticks = [i * step for i in range(int(seconds / step) + 1)]
    clock: Spec = {"labelExpr": f"format(datum.value / {size}, '~g')", "values": ticks}
    return Axis("time", f"training time ({unit})", "training time (s)", seconds, clock, size)


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


@dataclass(frozen=True)
class Quantity:
    """What a panel draws, and how."""

    title: str
    scale: Spec
    axis: Spec
    line: Literal["linear", "step-before"] = "linear"
    measured: bool = False  # mark the points of each run


def curve_panel(
    dataset: str, axis: Axis, quantity: Quantity, labels: Sequence[str], has_means: bool
) -> Panel:
    """Runs faint, means bold."""
    color, dash, _ = _schedule_scales(labels)
    x: Spec = {"field": "x", "type": "quantitative", "title": axis.title, "axis": axis.spec}
    x |= {"scale": {"nice": False, "domain": [0, axis.end]}}
    y: Spec = {"field": "y", "type": "quantitative", "title": quantity.title}
    y |= {"scale": quantity.scale, "axis": quantity.axis}
    line: Spec = {"type": "line", "interpolate": quantity.line, "clip": True, "aria": False}
    point = {"size": 14, "opacity": 0.5} if quantity.measured else False
    runs_layer: Spec = {
        "data": {"name": f"{dataset}_runs"},
        "transform": [_SHOWN],
        "mark": {**line, "strokeOpacity": 0.28 if has_means else 0.8, "strokeWidth": 1, "point": point},
        "encoding": {"x": {**x, "field": axis.field}, "y": y, "color": color, "detail": {"field": "run"}},
    }
    means_layer: Spec = {
        "data": {"name": f"{dataset}_means"},
        "transform": [{"filter": f"datum.axis == '{axis.field}'"}, _SHOWN],
        "mark": {**line, "strokeWidth": 2.2},
        "encoding": {"x": x, "y": y, "color": color, "strokeDash": dash},
    }
    found = [(f"{dataset}_means", "x")] if has_means else [(f"{dataset}_runs", axis.field)]
    return Panel(
        dataset,
        axis.field,
        f"over {axis.title}",
        {"height": 230, "layer": [runs_layer, means_layer]},
        Pointed(found, axis.unit, quantity.title, axis.size),
        {"symbolType": "stroke", "symbolSize": 500},
    )


def front_panel(axis: Axis, means: Dataset, quantity: Quantity, labels: Sequence[str]) -> Panel:
    """One mark per schedule, one smaller per run, and the steps of what no other schedule beats."""
    costs = [x for x, field in zip(means["x"], means["axis"], strict=True) if field == axis.field]
    ends = _front_ends(costs)
    color, _, shape = _schedule_scales(labels)
    # Labelled in place; a file has a legend as well where not every mark could be.
    legend: Spec = {} if "" in means["label"] else {"legend": None}
    plain, outline = {**color, **legend}, {**shape, **legend}
    x: Spec = {
        "field": "x",
        "type": "quantitative",
        "title": axis.title,
        "scale": {"type": "log", "nice": False, "domain": ends},
        "axis": {"labelExpr": axis.spec["labelExpr"], **_log_ticks(axis, ends)},
    }
    y: Spec = {"field": "y", "type": "quantitative", "title": quantity.title}
    y |= {"scale": quantity.scale, "axis": quantity.axis}
    of_axis = {"filter": f"datum.axis == '{axis.field}'"}
    layer: Spec = {"data": {"name": "final_means"}, "transform": [of_axis, _SHOWN]}
    point: Spec = {"type": "point", "aria": False, "clip": True}
    label: Spec = {
        "type": "text",
        "align": {"expr": "datum.left ? 'right' : 'left'"},
        "dx": {"expr": "datum.left ? -9 : 9"},
        "dy": {"expr": "datum.below ? 15 : -11"},
        "baseline": "middle",
        "fontWeight": 600,
        "clip": True,
        "aria": False,
    }
    layers: list[Spec] = [
        {
            **layer,
            "transform": [of_axis, {"filter": "datum.front"}, _SHOWN],
            "mark": {
                "type": "line",
                "interpolate": "step-after",
                "aria": False,
                "style": "front",
                "clip": True,
            },
            "encoding": {"x": x, "y": y},
        },
        {
            **layer,
            "mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.55, "clip": True, "aria": False},
            "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": plain},
        },
        {
            "data": {"name": "final_runs"},
            "transform": [_SHOWN],
            "mark": {**point, "size": 30, "opacity": 0.6},
            "encoding": {"x": {**x, "field": axis.field}, "y": y, "color": plain, "shape": outline},
        },
        {
            **layer,
            "mark": {**point, "filled": True, "size": 110, "opacity": 1},
            "encoding": {
                "x": x,
                "y": y,
                "color": plain,
                "shape": outline,
            },
        },
        {
            **layer,
            "mark": {**label, "style": "halo"},  # of the ground, where a label crosses a line
            "encoding": {"x": x, "y": y, "text": {"field": "label"}},
        },
        {
            **layer,
            "mark": label,
            "encoding": {"x": x, "y": y, "color": plain, "text": {"field": "label"}},
        },
    ]
    return Panel(
        f"front_{axis.field}",
        axis.field,
        f"against {axis.title}",
        {"height": FRONT_HEIGHT, "layer": layers},
        Pointed([("final_means", "x"), ("final_runs", axis.field)], axis.unit, quantity.title, axis.size),
        {"symbolType": "circle", "symbolSize": 90},
    )


def _front_ends(costs: Sequence[float]) -> list[float]:
    margin = 1.05 * (max(costs) / min(costs)) ** 0.04
    return [min(costs) / margin, max(costs) * margin]


def _log_ticks(axis: Axis, ends: list[float]) -> Spec:
    """Of a logarithmic axis, in the unit in which its linear sibling counts."""
    if "values" not in axis.spec:
        return _log_axis(ends[0], ends[1], 10)
    found = _log_axis(ends[0] / axis.size, ends[1] / axis.size, 10)
    if "values" not in found:
        return {"tickCount": 6}
    return {"values": [tick * axis.size for tick in found["values"]], "tickCount": found["tickCount"]}


def gpus_panel(name: str, data: Dataset, quantity: Quantity, unit: str, labels: Sequence[str]) -> Panel:
    """One line for each schedule. `unit`: of the values, for the tooltip."""
    color, dash, _ = _schedule_scales(labels)
    counts = sorted(set(data["gpus"]))
    ticks = counts[:: -math.ceil(len(counts) / 5)]  # the last one in any case
    x: Spec = {
        "field": "gpus",
        "type": "quantitative",
        "title": "GPUs",
        "scale": {"type": "log", "base": 2, "nice": False, "domain": [counts[0], counts[-1]]},
        "axis": {"values": ticks, "tickCount": len(ticks), "labelExpr": "format(datum.value, ',')"},
    }
    y: Spec = {"field": "y", "type": "quantitative", "title": quantity.title}
    y |= {"scale": quantity.scale, "axis": quantity.axis}
    layer: Spec = {
        "data": {"name": name},
        "transform": [_SHOWN],
        "mark": {"type": "line", "strokeWidth": 2.2, "clip": True, "aria": False},
        "encoding": {"x": x, "y": y, "color": color, "strokeDash": dash},
    }
    return Panel(
        name,
        "gpus",
        "by number of GPUs",
        {"height": 230, "layer": [layer]},
        Pointed([(name, "gpus")], "GPUs", unit, 1.0),
        {"symbolType": "stroke", "symbolSize": 500},
    )


FRONT_HEIGHT = 320
MOST_WHOLE_DECADES = 3  # beyond which only powers of ten have ticks
_FRONT_WIDTH = 300  # pixels inside the axes on a phone, where the room for labels is smallest
_LETTER, _LINE, _MARK = 7.2, 15, 7  # pixels: width and height of bold text, half a mark


def labelled(means: Dataset, quantity: Quantity) -> Dataset:
    """Where the label of each mark goes: above or below it, to a side, where it covers neither another label
    nor a mark nor leaves the frame, and no interval if possible; "" where there is no such place.

    What nobody beats is labelled first.
    """
    out: Dataset = {**means, **{column: [None] * len(means["x"]) for column in ("label", "left", "below")}}
    for axis in dict.fromkeys(means["axis"]):
        rows = [i for i, found in enumerate(means["axis"]) if found == axis]
        low, high = map(math.log, _front_ends([means["x"][i] for i in rows]))
        bottom, top = quantity.scale["domain"]
        x = {i: _FRONT_WIDTH * (math.log(means["x"][i]) - low) / (high - low) for i in rows}
        y = {i: FRONT_HEIGHT * (top - means["y"][i]) / (top - bottom) for i in rows}
        taken = {i: _Box(x[i] - _MARK, x[i] + _MARK, y[i] - _MARK, y[i] + _MARK) for i in rows}
        bars = {i: _Box(x[i], x[i], *_span(means, i, y[i], bottom, top)) for i in rows}
        labels: list[_Box] = []
        for i in sorted(rows, key=lambda i: not means["front"][i]):
            others = [*labels, *(box for j, box in taken.items() if j != i)]
            crossed = [bar for j, bar in bars.items() if j != i]
            text, inwards = str(means["schedule"][i]), x[i] > _FRONT_WIDTH / 2
            places = [(left, below) for left in (inwards, not inwards) for below in (False, True)]
            boxes = {place: _label_box(x[i], y[i], len(text), *place) for place in places}
            free = [place for place, box in boxes.items() if box.inside() and not any(map(box.meets, others))]
            free.sort(key=lambda place: sum(map(boxes[place].meets, crossed)))
            out["label"][i] = text if free else ""
            out["left"][i], out["below"][i] = free[0] if free else places[0]
            labels += [boxes[place] for place in free[:1]]
    return out


def _span(means: Dataset, i: int, y: float, bottom: float, top: float) -> tuple[float, float]:
    """Upper and lower end of an interval in pixels; the mark where there is none."""
    high, low = (means[end][i] for end in ("high", "low"))
    if high is None:
        return y, y
    return FRONT_HEIGHT * (top - high) / (top - bottom), FRONT_HEIGHT * (top - low) / (top - bottom)


@dataclass(frozen=True)
class _Box:
    left: float
    right: float
    top: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        apart = self.right < other.left or other.right < self.left
        return not (apart or self.bottom < other.top or other.bottom < self.top)

    def inside(self) -> bool:
        return self.left >= 0 and self.right <= _FRONT_WIDTH and self.top >= 0 and self.bottom <= FRONT_HEIGHT


def _label_box(x: float, y: float, letters: int, left: bool, below: bool) -> _Box:
    near = x - 9 if left else x + 9
    far = near + (-1 if left else 1) * letters * _LETTER
    middle = y + (15 if below else -11)
    return _Box(min(near, far), max(near, far), middle - _LINE / 2, middle + _LINE / 2)


def loss(title: str, runs: Dataset, means: Dataset, share: float, measured: bool) -> Quantity:
    """Logarithmic, from the lowest value to the highest mean after the first `share` of the tokens.

    The first steps, far above what is compared, would leave the interesting part a thin strip.
    """
    drawn = finite(runs)
    along = [
        (x, y)
        for x, y, axis in zip(means["x"], means["y"], means["axis"], strict=True)
        if axis == "tokens" and x is not None and y is not None
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
    span = max(max(values) - min(values), 0.002 * abs(max(values))) or 1.0
    low, high = min(values) - 0.25 * span, max(values) + 0.25 * span
    scale: Spec = {"zero": False, "nice": False, "domain": [_rounded(low), _rounded(high)]}
    return Quantity(title, scale, {"format": _tick_format(high - low)})


def logarithmic(
    title: str, values: Sequence[float], base: int, line: Literal["linear", "step-before"]
) -> Quantity:
    """`values` are above 0 and at least one; a curve of `line` between its points."""
    low, high = min(values) * 0.9, max(values) * 1.1
    if base == 2 and high < 2 * low:  # of a single size: ticks at its half and its double
        low, high = low / 2, high * 2
    scale: Spec = {"type": "log", "base": base, "nice": False, "domain": [_rounded(low), _rounded(high)]}
    return Quantity(title, scale, _log_axis(low, high, base), line)


def time(seconds: Sequence[float]) -> Quantity:
    """Training time on a logarithmic axis."""
    axis = _time_axis(max(seconds))
    ends = [_rounded(0.9 * min(seconds)), _rounded(1.1 * max(seconds))]
    scale: Spec = {"type": "log", "nice": False, "domain": ends}
    return Quantity(axis.title, scale, {"labelExpr": axis.spec["labelExpr"], **_log_ticks(axis, ends)})


def falling(title: str, values: Sequence[float]) -> Quantity:
    """Logarithmic, over as many powers of ten as it takes."""
    found = logarithmic(title, values, 10, "linear")
    low, high = found.scale["domain"]
    ends = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    if len(ends) <= MOST_WHOLE_DECADES:
        return found
    ticks = [10.0**k for k in ends][:: -math.ceil(len(ends) / 8)]
    axis: Spec = {"labelExpr": "format(datum.value, '~e')", "values": ticks, "tickCount": len(ticks)}
    return Quantity(title, found.scale, axis)


def share(title: str, values: Sequence[float]) -> Quantity:
    """Linear, in percent."""
    low, high = min(values), max(values)
    margin = 0.04 * (high - low) or 0.01
    ends = [_rounded(max(0.0, low - margin)), _rounded(min(1.0, high + margin))]
    return Quantity(title, {"zero": False, "nice": False, "domain": ends}, {"format": ".3~p"})


def from_zero(title: str, values: Sequence[float]) -> Quantity:
    """Linear, up to what nearly all values stay below: a single burst must not flatten the rest."""
    ordered = sorted(values)
    high = 1.1 * ordered[int(0.99 * (len(ordered) - 1))]
    return Quantity(title, {"nice": False, "domain": [0, _rounded(high)]}, {"labelExpr": _SI})


def _log_axis(low: float, high: float, base: int) -> Spec:
    """Ticks at the powers of two, or at 1, 2, 3 and 5 times the powers of ten; Vega's own if few."""
    exponents = range(math.floor(math.log(low, base)), math.ceil(math.log(high, base)) + 1)
    ticks = [m * float(base) ** k for k in exponents for m in ((1,) if base == 2 else (1, 2, 3, 5))]
    inside = [tick for tick in ticks if low <= tick <= high]
    if len(inside) < 2:
        return {"labelExpr": _SI, "tickCount": 6}
    return {"labelExpr": _SI, "values": inside, "tickCount": len(inside)}  # else it thins them


def finite(data: Dataset) -> list[float]:
    """What is drawn: without gaps."""
    return [y for y in data["y"] if y is not None]


def _tick_format(span: float) -> str:
    return ".1f" if span > 0.5 else ".2f" if span > 0.05 else ".3f" if span > 0.01 else ".4f"


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
