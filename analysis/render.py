"""The files of a report: report.html, report.md, report.json, the tables and the figures.

The report has decided everything; here it is only put into words and files, all from the same object.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import math
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import vl_convert

from analysis import figures as charts
from analysis import look, panels, typeset
from analysis import numbers as text
from analysis import settings as facts
from analysis.curves import Dataset
from analysis.look import Spec
from analysis.report import Report
from analysis.tables import plain, tables, to_json
from pipeline.store import write_atomically

AXIS_NAMES = {"epochs": "Full gradients", "step": "Steps", "time": "Time", "flops": "FLOPs"}
TEMPLATES = Path(__file__).parent / "templates"


def write(report: Report, folder: Path) -> list[Path]:
    """All files of the report; returns their paths, report.html first."""
    columns = {f"tables/{name}.parquet": table for name, table in tables(report).items()}
    texts = {
        "report.html": render_html(report),
        "report.md": render("report.md.j2", report),
        "report.json": json.dumps(to_json(report), indent=1, allow_nan=False, ensure_ascii=False) + "\n",
        **{name.replace(".parquet", ".csv"): table.write_csv() for name, table in columns.items()},
        **{f"tables/{name}.tex": source for name, source in typeset.latex(report).items()},
        "tables/lau_table.md": typeset.lau_markdown(report),
    }
    images = folder / "figures"
    images.mkdir(parents=True, exist_ok=True)
    named = {figure.name for figure in report.figures}
    for image in images.iterdir():
        if image.suffix in (".png", ".svg", ".pdf") and image.stem not in named:
            image.unlink(missing_ok=True)  # of an earlier report, which could fill it
    for figure in report.figures:
        _write_images(charts.joined(figure, report.datasets, report.labels), images / figure.name)
    for stale in set(folder.glob("tables/[!.]*.*")) - {folder / name for name in (*texts, *columns)}:
        stale.unlink(missing_ok=True)
    for name, content in texts.items():
        write_atomically(folder / name, content)
    for name, table in columns.items():
        parquet = io.BytesIO()
        table.write_parquet(parquet)
        write_atomically(folder / name, parquet.getvalue())
    pictures = [images / f"{figure.name}.png" for figure in report.figures]
    return [*(folder / name for name in (*texts, *columns)), *pictures]


def _write_images(spec: Spec, path: Path) -> None:
    """`path` with each extension, unless they are there: drawing is most of a report's time.

    The SVG ends with what the figure was made of and is written last, so that it vouches for the others.
    """
    made_of = json.dumps([plain(spec), version("vl-convert-python")], sort_keys=True)
    mark = f"<!-- {hashlib.sha256(made_of.encode()).hexdigest()} -->\n".encode()
    svg = path.with_suffix(".svg")
    if svg.exists() and svg.read_bytes().endswith(mark):
        return
    for extension, content in charts.images(spec).items():
        write_atomically(path.with_suffix(f".{extension}"), content + (mark if extension == "svg" else b""))


def render_html(report: Report) -> str:
    """The page with everything inside: styles, data and the chart library. It loads nothing."""
    font = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
    n = len(report.labels)
    panels_in_all = [(figure, panel) for figure in report.figures for panel in figure.panels]
    page = {
        "charts": {
            chart: {p.axis: {"spec": p.spec, **vars(p.pointed)} for _, p in panels_in_all if p.chart == chart}
            for figure in report.figures
            for chart in figure.charts
        },
        "datasets": {name: _encoded(data) for name, data in report.datasets.items()},
        "config": {s: look.config(s, n, font) for s in look.SCHEMES},
        "parameter": panels.HIDDEN,
    }
    data = json.dumps(plain(page), separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return render(
        "report.html.j2",
        report,
        data=data.replace("<", "\\u003c"),  # so that no text can end the script element
        library=_library(),
        colors={scheme: list(enumerate(look.colors(scheme, n))) for scheme in look.SCHEMES},
        dashes=look.dashes(n),
        axes={
            p.axis: report.unit.capitalize() if p.axis == "tokens" else AXIS_NAMES[p.axis]
            for figure, p in panels_in_all
            if figure.follows_axis
        },
        varied=facts.differences(report.sweep),
    )


@functools.cache
def _library() -> str:
    """Vega, Vega-Lite and the embedder as one script; putting it together takes a second."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=charts.VEGA_LITE)
    return bundle.replace("</script", "<\\/script")


def _encoded(data: Dataset) -> dict[str, Any]:
    """Columns that repeat their values as [value, how many times in a row]: a fraction of the size."""
    packed: dict[str, Any] = {}
    for column, values in data.items():
        stretches = [[value, len(list(same))] for value, same in itertools.groupby(values)]
        packed[column] = {"stretches": stretches} if 3 * len(stretches) < len(values) else values
    return packed


def render(template: str, report: Report, **more: object) -> str:
    """The template of this name, filled. What it names and nothing has raises jinja2.UndefinedError."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "value": _value,
        "fixed": text.fixed,
        "count": text.count,
        "compact": text.compact,
        "duration": text.duration,
        "estimate": typeset.estimate,
        "limits": lambda i: text.MISSING if i is None else text.with_limits(i.mean, i.low, i.high),
        "share": lambda i: text.MISSING if i is None else text.share(i.mean, i.low, i.high),
        "probability": text.probability,
        "difference": lambda compared: typeset.difference(compared.difference if compared else None),
        "speedup": typeset.speedup,
        "measure": lambda value, name: typeset.measure(name, value),
        "date": facts.date,
        "tied": _tied,
        "sentence_case": lambda words: words[:1].upper() + words[1:],
        "cell": typeset.markdown_cell,
    }
    return environment.get_template(template).render(
        report=report, sweep=report.sweep, brief=facts.in_brief(report.sweep), **more
    )


def _value(value: float | None) -> markupsafe.Markup:
    """The attribute by which a cell of numbers is sorted, whatever it shows; empty where it has none."""
    number = "" if value is None or math.isnan(value) else repr(float(value))
    return markupsafe.Markup(' data-value="{}"').format(number)


def _tied(words: str) -> str:
    """No line break inside 1.894 ± 0.021, 18.0 s, 0.047 to 0.151 or (2 seeds)."""
    before = rf"(?<=\d) (?=±|to [{text.MINUS}\d]|(?:s|min|h|d|seeds?)\b)"
    return re.sub(rf"{before}|(?<=±) |(?<=\d to) ", "\N{NO-BREAK SPACE}", words)
