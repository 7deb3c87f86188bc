"""Reports of labelled samples: their words, their axes, and what they have beside a validation loss."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from analysis import figures
from analysis.__main__ import main
from analysis.evaluations import EPOCHS, SAMPLES, STEPS, TIME
from analysis.load import load_sweep
from analysis.render import render, render_html
from analysis.report import Report, build
from pipeline.store import Row
from tests.analysis.synthetic import Point, pairs, short_run, write_sweep

COMMON = ("model=logistic", "data=digits", "budget.tokens=4000", "lr.warmup_tokens=0", "batch.max_size=64")
SAMPLES_IN_ALL = 1438


def rows_of(size: int, seed: int, gradients: int = 1, more: bool = True) -> list[Row]:
    """4,000 samples with an evaluation every 1,000, a gap that falls tenfold in each, `gradients` of each sample."""
    rows: list[Row] = []
    for step in range(1, 4000 // size + 1):
        seen = step * size
        clock = {
            "step": step, "tokens": seen, "sequences": seen, "epochs": gradients * seen / SAMPLES_IN_ALL,
            "time": 0.01 * step, "wall": 1e9 + step, "attempt": 1,
        }  # fmt: skip
        rows.append({**clock, "train/loss": 1 + 100 / seen, "batch/size": size, "batch/requested": size})
        if seen % 1000 == 0:
            k = seen // 1000
            evaluated = {"val/loss": 0.3 + 0.5 / k + 0.01 * seed, "val/accuracy": 0.9 + 0.01 * k}
            exact = {"exact/gap": 10.0**-k * (1 + seed), "exact/grad_norm": 0.5 * 10.0**-k} if more else {}
            rows.append({**clock, **evaluated, **exact})
    return rows


def report(gradients: int = 1, more: bool = True) -> Report:
    """Two schedules of two seeds; each sample's gradient is taken `gradients` times by the second."""
    write_sweep(
        "problems",
        [
            Point({"batch.size": str(size), "seed": str(seed)}, rows_of(size, seed, times, more))
            for size, times in ((20, 1), (40, gradients))
            for seed in (0, 1)
        ],
        COMMON,
    )
    return build(load_sweep("problems"), ["batch.size=20"], 0.0)


def test_what_is_counted_are_samples(home: Path):
    found = report()
    settings = {name: value for name, value in found.settings if name != "Common overrides"}
    words = [
        found.headline,
        *(comparison.sentence for comparison in found.comparisons),
        *(equal.where for equal in found.equal),
        *(target.sentence for target in found.targets),
        *found.equal_notes,
        *found.cautions,
        *settings.values(),
        *(f"{figure.title} {figure.caption} {figure.alternative}" for figure in found.figures),
        *(panel.pointed.y for figure in found.figures for panel in figure.panels),
        *(panel.title for figure in found.figures for panel in figure.panels),
    ]
    assert not [text for text in words if "token" in text or "sequence" in text]
    assert "after 4k samples" in found.headline
    markdown = render("report.md.j2", found)
    prose = [line for line in markdown.splitlines() if "budget.tokens" not in line]
    assert not [line for line in prose if "token" in line or "sequence" in line]
    assert "Batches are in samples per step" in markdown and "| samples/s |" in markdown
    assert dict(found.settings)["Model"] == "logistic, cross entropy loss, l2 0"


def test_they_are_compared_at_equal_samples_steps_and_time(home: Path):
    found = report()
    assert found.axes == [SAMPLES, STEPS, TIME]
    assert not {"gradients", "losses"} & found.more.keys()  # they are those of the samples


def test_they_are_compared_at_equal_gradients_where_one_takes_more_of_them(home: Path):
    found = report(gradients=2)
    assert found.axes == [SAMPLES, STEPS, TIME, EPOCHS]
    (equal,) = (e for e in found.equal if e.axis is EPOCHS)
    assert equal.place == pytest.approx(4000 / SAMPLES_IN_ALL)
    assert equal.where == "at 2.78 full gradient evaluations, 2k against 4k samples"
    # There the second has seen 2,000 samples, the first all 4,000.
    assert equal.difference is not None and equal.difference.mean == pytest.approx(0.5 / 2 - 0.5 / 4)
    (steps,) = (e for e in found.equal if e.axis is STEPS)
    assert steps.where == "at 100 steps, 4k against 2k samples"


def test_gradients_that_a_method_takes_again_are_counted(home: Path):
    found = report(gradients=2)
    once, twice = found.schedules
    assert once.mean("gradients") == pytest.approx(4000 / SAMPLES_IN_ALL)
    assert twice.mean("gradients") == pytest.approx(2 * 4000 / SAMPLES_IN_ALL)
    assert "| 2.78 |" in render("report.md.j2", found) and "| 5.56 |" in render("report.md.j2", found)


def beside_a_plain_run(rows: list[Row]) -> Report:
    """Of a run of batches of 20 with these rows, and of one of 40 as any."""
    points = [
        Point({"batch.size": "20", "seed": "0"}, rows),
        Point({"batch.size": "40", "seed": "0"}, rows_of(40, 0)),
    ]
    write_sweep("s", points, COMMON)
    return build(load_sweep("s"), [], 0.0)


def test_losses_of_a_line_search_are_told_beside_gradients(home: Path):
    searching = rows_of(20, 0)
    for row in searching:
        if "train/loss" in row:  # two trials in each step
            row |= {"gradient_evaluations": row["tokens"], "loss_evaluations": 2 * row["tokens"]}
    found = beside_a_plain_run(searching)
    assert [schedule.mean("losses") for schedule in found.schedules] == [
        pytest.approx(2 * 4000 / SAMPLES_IN_ALL),
        None,
    ]
    markdown = render("report.md.j2", found)
    assert "| full loss evaluations |" in markdown and "| 5.56 |" in markdown
    assert "Full gradient evaluations do not include them" in markdown


def test_the_mean_iterate_stands_beside_the_last(home: Path):
    averaging = rows_of(20, 0)
    for row in averaging:
        if row["tokens"] >= 3000 and "val/loss" in row:
            row |= {"val/loss_averaged": row["val/loss"] - 0.1, "val/accuracy_averaged": 0.975}
    found = beside_a_plain_run(averaging)
    own, other = found.schedules
    assert own.val_loss is not None and own.val_loss.mean == pytest.approx(0.425)  # still of the last one
    assert own.mean("val_loss_averaged") == pytest.approx(0.325) and other.mean("val_loss_averaged") is None
    markdown = render("report.md.j2", found)
    assert "| validation loss, mean iterate | validation accuracy, mean iterate |" in markdown
    assert "| 0.325 | 97.5% |" in markdown
    assert found.datasets["averaged_runs"]["tokens"] == [3000, 4000]
    (figure,) = (figure for figure in found.figures if figure.name == "validation_loss_averaged")
    assert "0.325, its last weights 0.425" in figure.caption
    assert figures.images(figures.joined(figure, found.datasets, found.labels))["svg"]


def test_gap_and_gradient_are_drawn_over_full_gradients(home: Path):
    found = report()
    by_name = {figure.name: figure for figure in found.figures}
    assert {"optimality_gap", "gradient_norm", "validation_accuracy"} <= by_name.keys()
    gap = by_name["optimality_gap"]
    assert gap.over == ("epochs", "step", "time") and by_name["batch_size"].over == ("epochs",)
    assert gap.panels[0].spec["layer"][0]["encoding"]["y"]["scale"]["type"] == "log"
    runs = found.datasets["gap_runs"]
    assert runs["y"][:4] == [0.1, 0.01, 0.001, 0.0001]
    assert runs["epochs"][:4] == pytest.approx([1000 * k / SAMPLES_IN_ALL for k in (1, 2, 3, 4)], rel=1e-4)
    for name in ("optimality_gap", "gradient_norm", "validation_accuracy"):
        assert figures.images(figures.joined(by_name[name], found.datasets, found.labels))["svg"]
    page = render_html(found)
    assert page.index('value="epochs"') < page.index('value="tokens"') and "<span>Samples</span>" in page


def test_a_gap_that_rounding_made_negative_is_not_drawn(home: Path):
    rows = rows_of(20, 0)
    last = rows[-1]
    last["exact/gap"] = -1e-17
    write_sweep("s", [Point({"batch.size": "20", "seed": "0"}, rows)], COMMON)
    found = build(load_sweep("s"), [], 0.0)
    assert found.datasets["gap_runs"]["y"] == [0.1, 0.01, 0.001]
    assert found.schedules[0].mean("gap") == -1e-17


def test_columns_of_the_tables(home: Path):
    found = report()
    assert main(["problems"]) == 0
    folder = home / "reports" / "problems"
    with open(folder / "tables/schedules.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["gap"]) for row in rows] == pytest.approx([1.5e-4, 1.5e-4])
    assert [float(row["val_accuracy"]) for row in rows] == pytest.approx([0.94, 0.94])
    assert (
        "| validation accuracy | optimality gap | exact gradient norm |" in (folder / "report.md").read_text()
    )
    assert "| 94.0% | 0.00015 | 5e\N{MINUS SIGN}05 |" in (folder / "report.md").read_text()
    latex = (folder / "tables/schedules.tex").read_text()
    assert "optimality gap" in latex and r"94.0\%" in latex
    assert found.more == {
        "val_accuracy": "validation accuracy",
        "gap": "optimality gap",
        "grad_norm": "exact gradient norm",
    }


def test_without_them_nothing_is_added(home: Path):
    found = report(more=False)
    assert list(found.more) == ["val_accuracy"]
    assert not {"optimality_gap", "gradient_norm"} & {figure.name for figure in found.figures}


def test_text_has_none_of_it(home: Path):
    write_sweep("s", pairs({"constant_16": [2.0, 2.1], "norm_test": [2.1, 2.2]}))
    found = build(load_sweep("s"), [], 0.0)
    assert not found.more and found.unit == "tokens" and found.batch_unit == "sequences"
    assert not any("epochs" in data or "gap" in name for name, data in found.datasets.items())


def test_a_mixture_counts_tokens(home: Path):
    write_sweep("s", [
        Point({"model": "logistic", "seed": "0"}, rows_of(20, 0), extra=["data=digits", "lr.warmup_tokens=0"]),
        Point({"model": "10m", "seed": "0"}, short_run(2.0), extra=["data=stdlib"]),
    ], ("budget.tokens=800k",))  # fmt: skip
    found = build(load_sweep("s"), [], 0.0)
    assert found.unit == "tokens" and "2 tasks" in found.headline
    assert render_html(found)


def test_models_of_samples_are_not_projected(home: Path):
    found = report()
    assert set(found.projection.missing.values()) == {"only language models are projected"}
