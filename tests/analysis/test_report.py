from __future__ import annotations

import csv
import dataclasses
import html
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import altair
import numpy as np
import pytest
import vl_convert
from PIL import Image

from analysis import curves, figures, look, panels, settings
from analysis.__main__ import main
from analysis.load import load_sweep
from analysis.render import render, render_html
from analysis.report import build
from analysis.tables import schedules_table, to_json
from tests.analysis.synthetic import (
    Point,
    command_of,
    pairs,
    realistic,
    realistic_run,
    rerun,
    short_run,
    train_row,
    write_sweep,
)
from tests.support import ROOT

MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module")
def content(demo: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((demo / "report.json").read_text())
    return found


# --- files -----------------------------------------------------------------------------------------------


def test_all_files_are_there_and_small(demo: Path) -> None:
    names = {path.relative_to(demo).as_posix() for path in demo.rglob("*") if path.is_file()}
    images = {
        *("tradeoff", "validation_loss", "training_loss", "batch_size", "noise_scale", "throughput"),
        "projection",
    }
    assert names == {
        *("report.html", "report.md", "report.json", "tables/lau_table.md"),
        *(
            f"tables/{name}.{kind}"
            for name in ("schedules", "runs", "equal", "targets", "projection", "lau_table")
            for kind in ("csv", "parquet", "tex")
        ),
        *(f"figures/{name}.{extension}" for name in images for extension in ("png", "svg", "pdf")),
    }
    assert (demo / "report.html").stat().st_size < 2e6
    for image in (demo / "figures").glob("*.png"):
        data = image.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert int.from_bytes(data[16:20]) > 1000  # pixels wide: twice the size on the page


def test_the_files_for_print_keep_text_as_text(demo: Path) -> None:
    """The SVG names its fonts, the PDF embeds them."""
    for name, word in (("tradeoff", "optimizer steps"), ("batch_size", "batch size (sequences)")):
        tree = ElementTree.parse(demo / f"figures/{name}.svg")
        texts = ["".join(element.itertext()) for element in tree.iter("{http://www.w3.org/2000/svg}text")]
        assert word in texts and {"constant_16", "norm_test"} <= set(texts)
        pdf = (demo / f"figures/{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF") and b"/FontFile" in pdf and b"/ToUnicode" in pdf


def test_only_changed_figures_are_drawn_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def images(spec: look.Spec) -> dict[str, bytes]:
        drawn.append(spec["title"])
        return {"png": b"image", "pdf": b"document", "svg": b"<svg/>"}

    monkeypatch.setattr(figures, "images", images)
    write_sweep("s", pairs({"constant_16": [2.0], "norm_test": [2.1]}))
    assert main(["s"]) == 0 and len(drawn) == 5 == len(set(drawn))
    assert main(["s"]) == 0 and len(drawn) == 5
    run = load_sweep("s").runs[0].id
    record = home / "runs" / str(run) / "metrics.jsonl"
    record.write_text(record.read_text().replace('"val/loss": 2.0', '"val/loss": 1.5'))
    assert main(["s"]) == 0
    assert drawn[5:] == ["The trade: loss against steps and time", "Validation loss"]


def test_runs_csv_has_every_run_with_full_precision(demo: Path, content: dict[str, Any]) -> None:
    with open(demo / "tables/runs.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 10 == len(content["runs"])
    for row, run in zip(table, content["runs"], strict=True):
        assert (row["run"] or None) == run["run"] and row["batch"] == run["axes"]["batch"]
        for number in ("val_loss", "train_loss", "mean_batch", "seconds"):
            assert (float(row[number]) if row[number] else None) == run[number]
    assert [row["state"] for row in table].count("DONE") == 8
    assert table[8]["problem"] == "RuntimeError: <b>full</b> | disk"
    assert table[9]["state"] == "INVALID"


@pytest.mark.parametrize("name", ["equal", "targets"])
def test_the_comparisons_of_the_json_are_those_of_the_tables(
    demo: Path, content: dict[str, Any], name: str
) -> None:
    with open(demo / f"tables/{name}.csv", newline="") as file:
        table = list(csv.DictReader(file))
    known = content["equal"] if name == "equal" else [s for t in content["targets"] for s in t["schedules"]]
    assert len(table) == len(known) == 4 * (4 if name == "equal" else 5)  # axes, and a baseline has a target
    for row, found in zip(table, known, strict=True):
        for key, cell in row.items():
            value = found[key]
            assert value == (None if cell == "" else cell if isinstance(value, str) else float(cell)), key
    assert content["tables"] == [
        f"tables/{t}.csv" for t in ("schedules", "runs", "equal", "targets", "projection", "lau_table")
    ]


def test_the_statistics_are_those_of_the_record_not_of_the_thinned_curves(
    demo: Path, content: dict[str, Any]
) -> None:
    """Recomputed from the made-up rows themselves."""
    means = {s["schedule"]: s for s in content["schedules"]}
    losses: dict[str, list[float]] = {}
    for point in realistic():
        assert point.rows is not None
        losses.setdefault(point.axes["batch"], []).append(point.rows[-1]["val/loss"])
    for label, (first, second) in losses.items():
        assert means[label]["val_loss"] == pytest.approx((first + second) / 2)
        half = 12.7062 * abs(first - second) / 2  # s/√2 of two values is half their distance
        assert means[label]["val_loss_high"] - means[label]["val_loss"] == pytest.approx(half, rel=1e-4)
    for comparison in content["comparisons"][:3]:
        gaps = [a - b for a, b in zip(losses[comparison["schedule"]], losses["constant_16"], strict=True)]
        assert comparison["difference"] == pytest.approx(sum(gaps) / 2)


# --- markdown --------------------------------------------------------------------------------------------


def cells(text: str, heading: str) -> list[dict[str, str]]:
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(table[0], row, strict=True)) for row in table[2:]]


def shows(cell: str, *values: float | None) -> bool:
    """Whether the numbers in the cell are `values`, rounded to the digits shown."""
    shown = re.findall(rf"[{MINUS}+]?\d[\d,]*\.?\d*", cell)
    if not shown:
        return values == (None,) or all(value is None for value in values)
    known = [value for value in values if value is not None]
    return len(shown) == len(known) and all(
        abs(float(text.replace(MINUS, "-").replace(",", "")) - value)
        <= 0.5001 * 10.0 ** -len(text.partition(".")[2])
        for text, value in zip(shown, known, strict=True)
    )


def half(numbers: dict[str, Any], name: str) -> float | None:
    return None if numbers[f"{name}_high"] is None else numbers[f"{name}_high"] - numbers[name]


def test_every_number_of_the_markdown_is_in_the_json(demo: Path, content: dict[str, Any]) -> None:
    text = (demo / "report.md").read_text()
    table = cells(text, "Schedules")
    assert len(table) == len(content["schedules"]) == 5
    for row, numbers in zip(table, content["schedules"], strict=True):
        assert row["schedule"].removesuffix(" (baseline)") == numbers["schedule"]
        assert shows(row["validation loss"], numbers["val_loss"], half(numbers, "val_loss"))
        assert shows(row["training loss"], numbers["train_loss"], half(numbers, "train_loss"))
        assert shows(row["difference to baseline"], numbers["difference"], half(numbers, "difference"))
        assert shows(row["p, corrected"], numbers["p_adjusted"])
        shares = [numbers[f"improvement{end}"] for end in ("", "_low", "_high")]
        assert shows(row["probability of improvement"], *(None if x is None else 100 * x for x in shares))
        for column, name in (
            ("steps", "steps"),
            ("mean batch", "mean_batch"),
            ("final batch", "final_batch"),
        ):
            assert shows(row[column], numbers[name]), (column, row)
        assert shows(row["training time"], numbers["seconds"])
        assert row["runs"] == f"{numbers['finished']}/{numbers['runs']}"
    for row, run in zip(cells(text, "Runs"), content["runs"], strict=True):
        assert shows(row["validation loss"], run["val_loss"]) and shows(
            row["training loss"], run["train_loss"]
        )
        assert shows(row["steps"], run["steps"]) and row["state"] == run["state"]
    for sentence in (content["headline"], *content["verdicts"], *content["cautions"]):
        assert sentence in text


def test_sentences_carry_the_numbers_of_the_json(content: dict[str, Any]) -> None:
    means = {s["schedule"]: s for s in content["schedules"]}
    for comparison, sentence in zip(content["comparisons"][:3], content["verdicts"][:3], strict=True):
        own = means[comparison["schedule"]]
        words = sentence.replace(comparison["schedule"], "", 1).replace(comparison["baseline"], "")
        words = re.sub(r"95% interval|\(\S+%\)|, \d seeds", "", words)
        assert shows(
            words,
            own["val_loss"],
            half(own, "val_loss"),
            abs(comparison["difference"]),
            comparison["difference_low"],
            comparison["difference_high"],
            comparison["steps"],
            comparison["baseline_steps"],
            comparison["seconds"],
            comparison["baseline_seconds"],
        ), sentence


def test_failed_and_refused_runs_are_listed_with_the_way_on(demo: Path, content: dict[str, Any]) -> None:
    text = (demo / "report.md").read_text()
    failed, refused = cells(text, "Not finished")
    assert failed["state"] == "FAILED" and failed["problem"] == r"RuntimeError: &lt;b>full&lt;/b> \| disk"
    assert refused["state"] == "INVALID" and "batch.size=6" in refused["problem"]
    assert "\n    python -m pipeline -m experiment=demo batch=constant_16," in text
    assert "8 of 10 runs finished" in text
    assert content["finished"] == 8 and content["runs_in_all"] == 10
    page = (demo / "report.html").read_text()
    assert "RuntimeError: &lt;b&gt;full&lt;/b&gt; | disk" in page and "<b>full" not in page


def test_figures_of_the_markdown_exist(demo: Path) -> None:
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (demo / "report.md").read_text())
    assert len(links) == 7 and all((demo / link).exists() for link in links)


FIVE = [2.0, 2.1, 2.3, 2.9, 2.2]


@pytest.mark.parametrize(
    ("seeds", "there"), [(1, (False, False, False)), (4, (False, True, True)), (5, (True, True, True))]
)
def test_columns_come_with_the_seeds_that_they_need(
    home: Path, seeds: int, there: tuple[bool, bool, bool]
) -> None:
    write_sweep("s", pairs({"constant_16": FIVE[:seeds], "norm_test": FIVE[:seeds]}))
    report = build(load_sweep("s"), [], 0.0)
    columns = ("interquartile mean", "p, corrected", "probability of improvement")
    markdown = render("report.md.j2", report)
    assert tuple(column in cells(markdown, "Schedules")[0] for column in columns) == there
    page = render_html(report).replace("<br>", " ")
    assert tuple(f">{column}</th>" in page for column in columns) == there
    for text in (markdown, page):
        assert ("95% bootstrap interval, from 5 seeds on" in text) == (seeds > 1)


def test_the_interquartile_mean_stands_where_the_seeds_suffice(home: Path) -> None:
    """A dash elsewhere. Of the four shared seeds all tie."""
    write_sweep("s", pairs({"constant_16": FIVE, "norm_test": FIVE[:4]}))
    report = build(load_sweep("s"), [], 0.0)
    numbers, few = to_json(report)["schedules"]
    middle, low, high = (numbers[f"val_loss_iqm{end}"] for end in ("", "_low", "_high"))
    assert middle == pytest.approx(0.3 * 2.1 + 0.4 * 2.2 + 0.3 * 2.3) and 2.0 <= low < middle < high <= 2.9
    shown = cells(render("report.md.j2", report), "Schedules")
    assert shows(shown[0]["interquartile mean"], middle, low, high)
    assert shown[1]["interquartile mean"] == "–" and few["val_loss_iqm"] is None
    assert (shown[1]["p, corrected"], shown[1]["probability of improvement"][:4]) == ("1.00", "50% ")
    table = list(csv.DictReader(schedules_table(report).write_csv().splitlines()))
    assert [float(table[0][f"val_loss_iqm{end}"]) for end in ("", "_low", "_high")] == [middle, low, high]
    assert [table[1][name] for name in ("p", "p_adjusted", "improvement")] == ["1.0", "1.0", "0.5"]


# --- html ------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.styles: list[str] = []
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data: str) -> None:
        if self._open == "style":
            self.styles.append(data)


@pytest.fixture(scope="module")
def page(demo: Path) -> Page:
    parser = Page()
    parser.feed((demo / "report.html").read_text())
    return parser


def test_the_page_loads_nothing(page: Page) -> None:
    loading = ("src", "srcset", "data", "poster", "background", "action", "xlink:href")
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img"), (tag, attributes)
        assert not [name for name in loading if name in attributes], (tag, attributes)
        assert re.match(r"#|figures/\w+\.(png|svg|pdf)$", attributes.get("href") or "#"), (tag, attributes)
    assert page.styles and not re.search(r"url\(|@import", "".join(page.styles))
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy and "http" not in policy


def test_the_page_is_accessible(page: Page) -> None:
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(headings))
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.tags if tag == "th")
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for _, attributes in page.tags:
        if reference := attributes.get("aria-labelledby"):
            assert reference in identifiers
    charts = [attributes for _, attributes in page.tags if "data-chart" in attributes]
    assert len(charts) == 9
    assert all(len(str(chart["aria-label"])) > 60 and chart["role"] == "img" for chart in charts)
    scrolling = [attributes for _, attributes in page.tags if attributes.get("class") == "scroll"]
    assert len(scrolling) == 6 and all(a["tabindex"] == "0" and a["aria-label"] for a in scrolling)


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(("scheme", "ground"), [("light", "#ffffff"), ("dark", "#14171b")])
def test_colours_stand_out_from_the_page(scheme: look.Scheme, ground: str) -> None:
    """WCAG asks for 3:1 of graphics."""
    assert len(set(look.PALETTE[scheme])) == 8
    for color in look.PALETTE[scheme]:
        bright, dim = sorted((luminance(color), luminance(ground)), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 3, color


def test_a_repeated_colour_has_another_dash() -> None:
    looks = list(zip(look.colors("light", 24), map(tuple, look.dashes(24)), strict=True))
    assert len(set(looks)) == 24


# --- figures ---------------------------------------------------------------------------------------------


def test_figures_are_valid_and_one_schedule_looks_the_same_everywhere(home: Path) -> None:
    write_sweep("s", realistic())
    report = build(load_sweep("s"), [], 0.0)
    domains = set()
    for figure in report.figures:
        whole = figures.joined(figure, report.datasets, report.labels)
        altair.HConcatChart.from_dict({**whole, "datasets": {}})  # raises off the schema
        assert figure.alternative and figure.caption
        for panel in figure.panels:
            for layer in panel.spec["layer"]:
                for channel in ("color", "strokeDash", "shape"):
                    if channel in layer["encoding"]:
                        domains.add(tuple(layer["encoding"][channel]["scale"]["domain"]))
    assert domains == {("constant_16", "constant_64", "stages", "norm_test")}
    assert [f.name for f in report.figures] == [
        "tradeoff",
        "validation_loss",
        "training_loss",
        "batch_size",
        "noise_scale",
        "throughput",
        "projection",
    ]


def test_lines_cut_together_make_the_same_picture(home: Path) -> None:
    """Vega's own SVG, in which each line has its own frame, drawn by the same library."""
    write_sweep("s", realistic(1))
    report = build(load_sweep("s"), [], 0.0)
    training = next(figure for figure in report.figures if figure.name == "training_loss")
    spec = figures.joined(training, report.datasets, report.labels)
    apart = vl_convert.vegalite_to_svg(spec, vl_version=figures.VEGA_LITE)
    together = figures.images(spec)["svg"].decode()
    assert together.count('clip-path="') < apart.count('clip-path="')
    pixels = [
        np.asarray(Image.open(io.BytesIO(vl_convert.svg_to_png(svg)))).astype(int)
        for svg in (apart, together)
    ]
    assert np.abs(pixels[0] - pixels[1]).max() <= 4  # of 255: rounding where lines cross


def test_a_figure_is_described_by_its_own_quantity(home: Path) -> None:
    write_sweep("s", pairs({"constant_16": [2.0]}, constant_16={"train_loss": 3.25}))
    words = {figure.name: figure.alternative for figure in build(load_sweep("s"), [], 0.0).figures}
    assert words["validation_loss"].endswith("constant_16: 2.000 after 4 steps")
    assert words["training_loss"].endswith("constant_16: 3.250 after 4 steps")


def test_the_trade_has_ticks_all_along_its_steps(home: Path) -> None:
    steps = {"constant_64": 98, "norm_test": 195, "constant_16": 391}
    points = pairs({batch: [2.0] for batch in steps}, **{b: {"steps": n} for b, n in steps.items()})
    write_sweep("s", points)
    trade = build(load_sweep("s"), [], 0.0).figures[0]
    x = trade.panels[0].spec["layer"][0]["encoding"]["x"]
    assert x["axis"]["values"] == [100, 200, 300]


@pytest.mark.parametrize(
    ("seconds", "title", "ticks"),
    [
        (18.0, "training time (s)", [0, 5, 10, 15]),
        (1500.0, "training time (min)", [0, 300, 600, 900, 1200, 1500]),
        (36_000.0, "training time (h)", [0, 7200, 14_400, 21_600, 28_800, 36_000]),
    ],
)
def test_time_is_shown_in_the_unit_that_suits(seconds: float, title: str, ticks: list[float]) -> None:
    time = panels.axes({"tokens": 1.0, "step": 1.0, "time": seconds})["time"]
    assert (time.title, time.spec["values"]) == (title, ticks)


def test_curves_are_thinned_for_drawing_only(home: Path) -> None:
    rows = realistic_run(lambda share: 8, 0)
    write_sweep("s", [Point({"batch": "constant_16", "seed": "0"}, rows)])
    report = build(load_sweep("s"), [], 0.0)
    training = [row for row in rows if "train/loss" in row]
    assert len(training) > 700 > curves.POINTS_PER_LINE
    drawn = report.datasets["training_runs"]
    assert len(drawn["y"]) <= curves.POINTS_PER_LINE + 2
    for extreme in (min, max):
        assert extreme(drawn["y"]) == pytest.approx(extreme(row["train/loss"] for row in training), rel=1e-4)
    assert report.numbers[0].steps == len(training)


def test_mean_curves_are_means_at_equal_tokens(home: Path) -> None:
    """Two seeds of 2 and 3 evaluations: 4 → 2 and 6 → 5 → 2; at 400k tokens the mean of 3 and 5 is 4."""
    evaluations = {
        "0": [(1, 200_000, 4.0), (2, 600_000, 2.0)],
        "1": [(1, 200_000, 6.0), (2, 400_000, 5.0), (3, 600_000, 2.0)],
    }
    points = []
    for seed, found in evaluations.items():
        rows = short_run(2.0)[:-1]
        rows = [*rows, *({**short_run(loss)[-1], "step": i, "tokens": t} for i, t, loss in found)]
        points.append(Point({"batch": "constant_16", "seed": seed}, rows))
    write_sweep("s", points)
    means = build(load_sweep("s"), [], 0.0).datasets["validation_means"]
    over_tokens = [
        (x, y) for x, y, axis in zip(means["x"], means["y"], means["axis"], strict=True) if axis == "tokens"
    ]
    assert over_tokens == [(200_000, 5.0), (400_000, 4.0), (600_000, 2.0)]


def test_the_front_holds_what_no_other_schedule_beats(home: Path) -> None:
    """stages takes as many steps as constant_64 for a higher loss; the others trade one for the other."""
    points = pairs(
        {"constant_16": [2.0], "constant_64": [2.5], "stages": [2.6], "norm_test": [2.2]},
        constant_16={"steps": 50},
        constant_64={"steps": 10},
        stages={"steps": 10},
        norm_test={"steps": 25},
    )
    write_sweep("s", points)
    means = build(load_sweep("s"), [], 0.0).datasets["final_means"]
    found = zip(means["axis"], means["schedule"], means["front"], strict=True)
    assert {schedule: front for axis, schedule, front in found if axis == "step"} == {
        "constant_64": True,
        "stages": False,
        "norm_test": True,
        "constant_16": True,
    }


def test_what_is_fast_in_steps_may_be_slow_in_time(home: Path) -> None:
    points = pairs(
        {"constant_16": [2.0], "norm_test": [2.1]},
        constant_16={"steps": 50, "seconds": 9.0},
        norm_test={"steps": 25, "seconds": 12.0},
    )
    write_sweep("s", points)
    report = build(load_sweep("s"), [], 0.0)
    means = report.datasets["final_means"]
    rows = list(zip(means["axis"], means["schedule"], means["x"], means["front"], strict=True))
    assert rows == [
        *(("step", "norm_test", 25, True), ("step", "constant_16", 50, True)),
        *(("time", "constant_16", 9, True), ("time", "norm_test", 12, False)),
    ]
    assert [panel.chart for panel in report.figures[0].panels] == ["front_step", "front_time"]


def test_labels_of_many_schedules_do_not_overlap() -> None:
    """25 in a heap: those that fit are read as text boxes on a plot 300 pixels wide, as on a phone."""
    names = [f"size={16 + 8 * i}" for i in range(25)]
    heap: curves.Dataset = {
        "schedule": names,
        "axis": ["step"] * 25,
        "x": [100 - 3 * i for i in range(25)],
        "y": [2 + 0.01 * (i * 7 % 25) for i in range(25)],
        **{column: [None] * 25 for column in ("low", "high")},
        **{"seeds": [1] * 25, "front": [i % 5 == 0 for i in range(25)]},
    }
    quantity = panels.final_loss(heap, heap)
    means = panels.labelled(heap, quantity)
    axis = panels.axes({"tokens": 1.0, "step": 100.0, "time": 1.0})["step"]
    spec = panels.front_panel(axis, means, quantity, names).spec
    x, y = (spec["layer"][0]["encoding"][channel]["scale"]["domain"] for channel in ("x", "y"))
    boxes = []
    for i, label in enumerate(means["label"]):
        across = 300 * math.log(means["x"][i] / x[0]) / math.log(x[1] / x[0])
        down = 320 * (y[1] - means["y"][i]) / (y[1] - y[0]) + (15 if means["below"][i] else -11)
        width = 6.7 * len(label)  # of bold Helvetica with 12 pixels
        left = across - 9 - width if means["left"][i] else across + 9
        boxes += [(left, left + width, down - 6, down + 6)] if label else []
    assert 5 <= len(boxes) < 25
    for (a, b, c, d), (e, f, g, h) in itertools.combinations(boxes, 2):
        assert b < e or f < a or d < g or h < c
    assert all(a >= 0 and b <= 300 and c >= 0 and d <= 320 for a, b, c, d in boxes)
    assert "'legend': None" not in str(spec)  # a file explains the marks without a label


def test_a_label_keeps_off_the_interval_of_another_where_it_can() -> None:
    """Right of `second` stands the interval of `third`, which reaches far above its mark."""
    means: curves.Dataset = {
        "schedule": ["first", "second", "third", "last"],
        "axis": ["step"] * 4,
        "x": [10, 30, 36, 200],
        "y": [2.0, 2.05, 2.2, 2.1],
        "low": [None, None, 2.0, None],
        "high": [None, None, 2.4, None],
        "front": [True] * 4,
    }
    found = panels.labelled(means, panels.final_loss(means, means))
    assert found["label"] == means["schedule"] and found["left"] == [False, True, False, True]


def test_throughput_is_tokens_over_time_whatever_the_steps(home: Path) -> None:
    """10,000 tokens/s, then 40,000: the second half of the tokens takes a fifth of the time."""
    rows = [train_row(i, 4_000 * i, 3.0, 31, 0.4 * i) for i in range(1, 101)]
    rows += [train_row(100 + i, 400_000 + 16_000 * i, 3.0, 125, 40 + 0.4 * i) for i in range(1, 26)]
    write_sweep("s", [Point({"batch": "constant_16", "seed": "0"}, rows)])
    runs = build(load_sweep("s"), [], 0.0).datasets["throughput_runs"]
    for seconds, rate in zip(runs["time"], runs["y"], strict=True):
        if abs(seconds - 40) > 0.5:
            assert rate == pytest.approx(10_000 if seconds < 40 else 40_000, rel=1e-3)
    tokens = [t if t <= 40 else 40 + 4 * (t - 40) for t in runs["time"]]
    assert runs["tokens"] == pytest.approx([10_000 * t for t in tokens], rel=1e-3)


def test_a_resumed_run_has_no_infinite_throughput(home: Path) -> None:
    """Rows without time between them, as after a clock that was restored."""
    rows = [train_row(i, 4_000 * i, 3.0, 31, 0.4 * (i // 2 + 1)) for i in range(1, 101)]
    write_sweep("s", [Point({"batch": "constant_16", "seed": "0"}, rows)])
    runs = build(load_sweep("s"), [], 0.0).datasets["throughput_runs"]
    assert max(runs["y"]) < 1.6 * 20_000 and min(runs["y"]) > 0


def test_flops_are_those_of_the_model(home: Path) -> None:
    """6 per parameter outside the embedding and 12·L·T·D for the scores of attention, per token."""
    write_sweep("s", pairs({"constant_16": [2.0]}))
    report = build(load_sweep("s"), [], 0.0)
    config = report.runs[0].config
    assert config is not None and not config.model.tied
    m = config.model
    multiplied = m.parameters - m.vocab * m.width  # an embedding is looked up
    per_token = 6 * multiplied + 12 * m.layers * config.data.sequence_length * m.width
    runs = report.datasets["training_runs"]
    assert runs["flops"] == pytest.approx([per_token * tokens for tokens in runs["tokens"]], rel=1e-4)
    assert report.figures[1].over == ("tokens", "step", "time")  # in a file they would repeat the tokens


def test_runs_of_unlike_models_are_drawn_over_flops(home: Path) -> None:
    points = [
        Point({"model.layers": layers, "seed": "0"}, short_run(2.0), extra=["batch=constant_16"])
        for layers in ("1", "2")
    ]
    write_sweep("s", points)
    report = build(load_sweep("s"), [], 0.0)
    validation = next(figure for figure in report.figures if figure.name == "validation_loss")
    assert validation.over == ("tokens", "step", "time", "flops")


def test_each_run_names_the_settings_in_which_it_differs(home: Path) -> None:
    points = [
        Point({"batch": batch, "seed": seed}, short_run(2.0), extra=["optim.lr=0.002"] if rate else [])
        for batch, seed, rate in (("constant_16", "0", False), ("constant_64", "1", True))
    ]
    points.append(Point({"batch": "constant_6", "seed": "0"}, problem="batch.size=6: too small"))
    write_sweep("s", points)
    sweep = load_sweep("s")
    found = settings.differences(sweep)
    lr = sweep.runs[0].config.optim.lr if sweep.runs[0].config else None
    assert found[0] == {"seed": "0", "batch.size": "16", "optim.lr": str(lr)} | {
        key: value for key, value in found[0].items() if key == "data.seed"
    }
    assert found[1]["batch.size"] == "64" and found[1]["optim.lr"] == "0.002" and found[1]["seed"] == "1"
    assert 2 not in found
    page = render_html(build(sweep, [], 0.0))
    assert '<span class="unit">batch.size</span> 64' in page and "batch.size=6: too small" in page


def test_a_run_links_to_wandb_where_its_address_is_known(home: Path) -> None:
    write_sweep("s", pairs({"constant_16": [2.0], "norm_test": [2.1]}))
    sweep = load_sweep("s")
    url = "https://wandb.ai/lab/crescendo/runs/a1?x=1&y=2"
    runs = [dataclasses.replace(sweep.runs[0], url=url), *sweep.runs[1:]]
    page = render_html(build(dataclasses.replace(sweep, runs=runs), [], 0.0))
    link = f'<a href="{html.escape(url)}" rel="noreferrer">{runs[0].id}</a>'
    assert page.count(link) == 1 and page.count("wandb.ai") == 1
    assert "The names lead to the runs in wandb." in page


def test_the_cut_last_step_is_not_drawn_as_a_batch(home: Path) -> None:
    """6,250 sequences are 97 batches of 64 and one of 42."""
    rows = realistic_run(lambda share: 64, 0)
    assert rows[-2]["batch/size"] == 42
    write_sweep("s", [Point({"batch": "constant_64", "seed": "0"}, rows)])
    assert set(build(load_sweep("s"), [], 0.0).datasets["batch_runs"]["y"]) == {64}


def test_a_diverged_run_is_a_gap_in_its_curve(home: Path) -> None:
    rows = realistic_run(lambda share: 16, 0)
    for row in rows[200:]:
        row |= {key: math.nan for key in ("train/loss", "val/loss") if key in row}
    write_sweep("s", [Point({"batch": "constant_16", "seed": "0"}, rows)])
    report = build(load_sweep("s"), [], 0.0)
    means = report.datasets["training_means"]
    assert means["y"][10] is not None and means["y"][190] is None
    trade = build(load_sweep("s"), [], 0.0).figures[0]
    assert trade.name != "tradeoff"  # nothing to draw
    write_sweep("t", pairs({"constant_16": [math.nan], "norm_test": [2.0]}))
    caption = build(load_sweep("t"), [], 0.0).figures[0].caption
    assert caption.endswith("Without a final loss, so not drawn: constant_16.")
    assert json.dumps(to_json(report), allow_nan=False).count('"NaN"') >= 2


@pytest.fixture
def no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes a second each, and the demo's are drawn."""
    kinds = dict.fromkeys(("png", "pdf", "svg"), b"image")
    monkeypatch.setattr(figures, "images", lambda spec: kinds)


# --- command ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_images")
def test_nothing_finished_is_a_report_and_exit_1(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = [
        Point({"batch": "constant_16", "seed": "0"}, realistic_run(lambda share: 16, 0, stop=0.2), "RUNNING"),
        Point({"batch": "norm_test", "seed": "0"}, None, "FAILED", "out of memory"),
    ]
    write_sweep("s", points)
    assert main(["s"]) == 1
    shown = capsys.readouterr()
    assert shown.err == "s: no run has finished; the report shows how far they got\n"
    assert "0 of 2 runs finished" in shown.out and "python -m pipeline -m experiment=demo" in shown.out
    text = (home / "reports/s/report.md").read_text()
    assert "No run has finished, so there is nothing to compare yet." in text and "out of memory" in text
    assert (home / "reports/s/figures/training_loss.png").exists()


@pytest.mark.usefixtures("no_images")
def test_the_missing_runs_are_asked_for_by_their_own_commands(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = pairs({"constant_16": [2.0], "norm_test": [2.1], "stages": [2.2], "constant_64": [2.3]})
    points[1].state = points[2].state = points[3].state = "FAILED"
    points.append(Point({"batch": "constant_6", "seed": "0"}, problem="batch.size=6: too small"))
    write_sweep("s", points)
    for number, words in enumerate(["batch=constant_16", "batch=norm_test,stages", "batch=norm_test,stages"]):
        command_of("s", number, "-m", words)
    command_of("s", 4, "-m", "batch=constant_6")
    manifest = json.loads((home / "sweeps/s/manifest.json").read_text())
    last = " ".join(manifest["command"])  # of the point that names none
    start = "python -m pipeline -m batch="
    assert main(["s"]) == 0
    shown = capsys.readouterr().out
    assert f"1 of 5 runs finished. Next, the missing ones:\n  {start}norm_test,stages\n  {last}\n" in shown
    assert shown.endswith(f"  {last}\n")
    text = (home / "reports/s/report.md").read_text()
    assert f"To continue them:\n\n    {start}norm_test,stages\n    {last}\n" in text
    body, footer = (home / "reports/s/report.html").read_text().split("<footer")
    commands = [re.findall(r'<code class="command"[^>]*>(.*)</code>', part) for part in (body, footer)]
    assert commands == [
        [f"{start}norm_test,stages", last],
        [f"{start}constant_16", f"{start}norm_test,stages", last, f"{start}constant_6"],
    ]


@pytest.mark.usefixtures("no_images")
def test_refused_runs_are_not_asked_for_again(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = Point({"batch": "constant_6", "seed": "0"}, problem="batch.size=6: too small")
    write_sweep("s", [*pairs({"constant_16": [2.0]}), refused])
    assert main(["s"]) == 0
    shown = capsys.readouterr().out
    assert "python -m pipeline" not in shown and "Next, read it:" in shown
    for name in ("report.md", "report.html"):
        assert "To continue them" not in (home / "reports/s" / name).read_text()


@pytest.mark.usefixtures("no_images")
def test_superseded_runs_are_listed_and_said(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep("s", pairs({"constant_16": [2.0, 2.1], "norm_test": [2.1, 2.3]}))
    runs = [str(run.id) for run in load_sweep("s").runs]
    for run in runs:
        rerun("s", run, None, "DONE", time.time() + 60)
    assert main(["s", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in found["runs"] if run["state"] == "SUPERSEDED"] == runs
    assert (found["finished"], found["runs_in_all"]) == (4, 4)
    note = "4 runs are superseded by newer ones of the same schedule and seed: each seed counts only once."
    assert note in found["cautions"]
    assert "2 seeds)" in found["headline"] and found["comparisons"][0]["seeds"] == ["0", "1"]
    text = (home / "reports/s/report.md").read_text()
    assert [row["state"] for row in cells(text, "Runs")] == ["SUPERSEDED"] * 4 + ["DONE"] * 4
    assert "4 of 4 runs finished" in text and "Not finished" not in text
    assert (home / "reports/s/report.html").read_text().count('<td class="text">SUPERSEDED</td>') == 4


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_left_is_no_error(
    home: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], unbuffered: str
) -> None:
    """Unbuffered, the first line fails; else what is left to write at the end does."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    write_sweep("s", pairs({"constant_16": [2.0]}))
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "analysis", "s", *options]
        done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.usefixtures("no_images")
def test_nothing_recorded_at_all(home: Path) -> None:
    write_sweep("s", [Point({"batch": "constant_16", "seed": "0"}, None, None)])
    assert main(["s"]) == 1
    assert "MISSING" in (home / "reports/s/report.html").read_text()


def test_wrong_requests_exit_2_without_a_traceback(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep("demo", pairs({"constant_16": [2.0], "norm_test": [2.1]}))
    assert main(["dmo"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "Did you mean demo?" in shown.err and "Sweeps: demo" in shown.err
    assert main(["demo", "--baseline", "batch=constant_61"]) == 2
    assert "Choices: batch=constant_16, batch=norm_test" in capsys.readouterr().err
    assert not (home / "reports").exists()


@pytest.mark.usefixtures("no_images")
def test_json_is_the_report_and_its_paths(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep("s", pairs({"constant_16": [2.0, 2.1], "norm_test": [2.1, 2.2]}))
    assert main(["s", "--json", "--baseline", "batch=norm_test"]) == 0
    shown = json.loads(capsys.readouterr().out)
    files = [Path(path) for path in shown.pop("files")]
    assert all(path.exists() for path in files) and files[0].name == "report.html"
    assert shown == json.loads((home / "reports/s/report.json").read_text())
    assert shown["baseline"] == {"batch": "norm_test"}


@pytest.mark.usefixtures("no_images")
@pytest.mark.parametrize(
    "name", ["figures/noise_scale.png", "figures/noise_scale.pdf", "tables/equal.parquet"]
)
def test_a_figure_or_table_that_no_longer_exists_is_removed(home: Path, name: str) -> None:
    write_sweep("s", pairs({"constant_16": [2.0]}))
    stale = home / "reports/s" / name
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"old")
    assert main(["s"]) == 0
    assert not stale.exists()


@pytest.mark.usefixtures("no_images")
def test_what_somebody_puts_beside_the_figures_is_left_alone(home: Path) -> None:
    write_sweep("s", pairs({"constant_16": [2.0]}))
    notes = home / "reports/s/figures/notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_bytes(b"mine")
    assert main(["s"]) == 0
    assert notes.read_bytes() == b"mine"


def test_labels_can_break_neither_the_table_nor_the_page(home: Path) -> None:
    write_sweep("s", pairs({"constant_16": [2.0], "norm_test": [2.1]}))
    manifest = home / "sweeps/s/manifest.json"
    manifest.write_text(manifest.read_text().replace('"batch": "norm_test"', '"batch": "a|b</script><i>"'))
    report = build(load_sweep("s"), [], 0.0)
    assert report.labels == ["constant_16", "a|b</script><i>"]
    text = render("report.md.j2", report)
    assert cells(text, "Schedules")[1]["schedule"] == r"a\|b&lt;/script>&lt;i>" and "<i>" not in text
    page = render_html(report)
    assert page.count("</script>") == 4 and "<i>" not in page


def test_the_analysis_needs_no_torch() -> None:
    """It runs on login nodes and laptops: importing torch would take longer than the report."""
    code = "import sys, analysis.__main__; sys.exit('torch' in sys.modules or 'wandb' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.usefixtures("no_images")
def test_files_that_another_command_is_writing_are_left_alone(home: Path) -> None:
    write_sweep("s", pairs({"constant_16": [2.0]}))
    half_written = home / "reports/s/tables/.equal.csv.1234"
    half_written.parent.mkdir(parents=True)
    half_written.write_bytes(b"half")
    assert main(["s"]) == 0 and half_written.exists()


def test_a_place_that_takes_no_report_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep("s", pairs({"constant_16": [2.0]}))
    (home / "reports").write_text("in the way")
    assert main(["s"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_flops_of_a_large_model_are_drawn(home: Path) -> None:
    """Whole numbers beyond 2^64, which the chart library does not take as such."""
    points = pairs({"constant_16": [2.0]})
    for point in points:
        point.extra = ["model=tinyllama_1b"]
        point.rows = [{**row, "tokens": row["tokens"] * 100_000} for row in point.rows or []]
    write_sweep("s", points)
    report = build(load_sweep("s"), [], 0.0)
    validation = next(figure for figure in report.figures if figure.name == "validation_loss")
    numbers = [x for x in report.datasets["validation_runs"]["flops"] if x]
    assert max(numbers) > 2**64
    over_flops = dataclasses.replace(validation, over=("flops",))
    assert figures.images(figures.joined(over_flops, report.datasets, report.labels))["svg"]


@pytest.mark.parametrize("counter", ["time", "tokens"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_counter_that_is_no_number_ends_no_axis(home: Path, counter: str, value: float) -> None:
    points = pairs({"constant_16": [2.0, 2.1]})
    points[0].rows = [{**row, counter: value} for row in points[0].rows or []]
    write_sweep("s", points)
    report = build(load_sweep("s"), [], 0.0)
    assert "Validation loss" in render_html(report)
    for figure in report.figures:
        assert figures.images(figures.joined(figure, report.datasets, report.labels))["svg"]
