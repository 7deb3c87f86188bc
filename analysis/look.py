"""How the charts look: colours, dashes, shapes, and the configuration that depends on the scheme."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

Spec = dict[str, Any]
Scheme = Literal["light", "dark"]
SCHEMES: tuple[Scheme, ...] = ("light", "dark")
T = TypeVar("T")

# Okabe and Ito's colours, told apart with every common colour blindness. The light set darkens the bright
# ones, the dark set lifts the dark ones: each has a contrast of at least 3:1 on its ground.
PALETTE: dict[Scheme, list[str]] = {
    "light": ["#0072b2", "#d55e00", "#00805f", "#b5628f", "#1a1d21", "#a87500", "#3a8fc4", "#7d7600"],
    "dark": ["#56b4e9", "#e8793a", "#1fbf92", "#dd9cc0", "#f2f2f2", "#e69f00", "#3f8fd6", "#f0e442"],
}
DASHES = [[1, 0], [7, 3], [2, 2], [9, 3, 2, 3], [12, 4], [4, 2, 1, 2], [5, 5], [1, 4]]
SHAPES = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right", "stroke"]


def colors(scheme: Scheme, n: int) -> list[str]:
    """One for each of n schedules; beyond the palette they repeat."""
    return [PALETTE[scheme][i % len(PALETTE[scheme])] for i in range(n)]


def dashes(n: int) -> list[list[int]]:
    """Patterns of `n` lines, in Vega-Lite's pixels on and off."""
    return _shifted(DASHES, n)


def shapes(n: int) -> list[str]:
    """Vega-Lite's names of `n` marks."""
    return _shifted(SHAPES, n)


def _shifted(values: Sequence[T], n: int) -> list[T]:
    """Repeated, one further in each round, so that where a colour comes again its dash is another."""
    size = len(values)
    return [values[(i + i // size) % size] for i in range(n)]


def config(scheme: Scheme, labels: int, font: str, legend_columns: int = 0) -> Spec:
    """Everything that depends on the colour scheme or the place; the page has its own legend."""
    light, dark = ("#ffffff", "#1a1d21", "#5b6470", "#e4e7eb"), ("#14171b", "#eceff3", "#a3adba", "#2c333c")
    ground, ink, muted, line = light if scheme == "light" else dark
    return {
        "background": "white" if legend_columns else "transparent",
        "font": font,
        "padding": 12 if legend_columns else 2,
        "range": {"category": colors(scheme, labels)},
        "view": {"stroke": None},
        "axis": {
            "domainColor": muted,
            "gridColor": line,
            "labelColor": muted,
            "labelFontSize": 11,
            "labelFlush": True,
            "labelOverlap": "greedy",
            "labelSeparation": 8,
            "tickColor": line,
            "tickSize": 4,
            "titleColor": ink,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "titlePadding": 8,
        },
        "axisX": {"grid": False, "tickCount": 5},
        "axisY": {"tickCount": 5, "domain": False, "ticks": False},
        "style": {
            "front": {"color": muted, "strokeWidth": 1, "strokeDash": [3, 3], "opacity": 0.8},
            "halo": {"color": ground, "stroke": ground, "strokeWidth": 4, "strokeJoin": "round"},
        },
        "text": {"fontSize": 12},
        "legend": {
            "disable": not legend_columns,
            "columns": max(legend_columns, 1),
            "orient": "top",
            "labelColor": ink,
            "labelFontSize": 12,
            "symbolOpacity": 1,
            "symbolStrokeWidth": 2.2,
            "labelLimit": 400,
        },
        "title": {"color": ink, "fontSize": 14, "anchor": "start", "fontWeight": 600, "offset": 10},
    }
