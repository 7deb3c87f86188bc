"""Runs of different tasks in one sweep: their losses are never set against each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.load import load_sweep
from analysis.report import Report, build
from analysis.typeset import latex
from tests.analysis.synthetic import Point, short_run, write_sweep

LONG = "data.sequence_length=256"


def mixed(extra: dict[str, list[str]], losses: dict[str, float]) -> Report:
    """Three seeds of each schedule: `batch` or `batch/name of the extra`."""
    points = [
        Point({"batch": batch, "seed": str(seed)}, short_run(loss + seed / 1000), extra=extra.get(kind, []))
        for name, loss in losses.items()
        for batch, _, kind in [name.partition("/")]
        for seed in range(3)
    ]
    write_sweep("s", points)
    return build(load_sweep("s"), [], 0.0)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (LONG, "data.sequence_length"),
        ("data.validation_fraction=0.2", "data.validation_fraction"),
        ("data.fingerprint=abc", "data.fingerprint"),
        ("eval.sequences=16", "eval.sequences"),
    ],
)
def test_each_schedule_meets_the_baseline_of_its_own_task(home: Path, override: str, key: str) -> None:
    losses = {"constant_16": 2.0, "stages": 1.9, "constant_16/other": 1.0, "stages/other": 1.2}
    report = mixed({"other": [override]}, losses)
    assert [(c.schedule, c.baseline, c.kind) for c in report.comparisons] == [
        ("stages (1)", "constant_16 (1)", "better"),
        ("stages (2)", "constant_16 (2)", "worse"),
    ]
    assert report.headline.startswith("Runs of 2 tasks, whose losses are no comparison. ")
    first, second = report.headline.split(f"{key}=")[1:]
    assert "stages (1) has the lowest" in first and "(2)" not in first
    assert "constant_16 (2) has the lowest" in second and "(1)" not in second
    (caution,) = [words for words in report.cautions if "tasks" in words]
    assert caution.count(f"{key}=") == 2


def test_without_a_baseline_of_its_own_task_nothing_is_compared(home: Path) -> None:
    report = mixed({"other": [LONG]}, {"constant_16": 2.0, "stages": 1.9, "norm_test/other": 1.0})
    kinds = {c.schedule: c.kind for c in report.comparisons}
    assert kinds == {"stages": "better", "norm_test": "no baseline"}
    assert "norm_test has the lowest" not in report.headline
    assert "data.sequence_length=256: norm_test ends at validation loss" in report.headline


def test_the_front_is_drawn_within_a_task(home: Path) -> None:
    report = mixed({"other": [LONG]}, {"constant_16": 2.0, "stages/other": 1.0})
    means = report.datasets["final_means"]
    assert dict(zip(means["schedule"], means["front"], strict=True)) == {"constant_16": True, "stages": True}


def test_another_model_or_mesh_is_no_other_task(home: Path) -> None:
    report = mixed(
        {"other": ["data.micro_batch=4", "data.seed=7"]}, {"constant_16": 2.0, "stages/other": 1.9}
    )
    assert [c.kind for c in report.comparisons] == ["better"]
    assert "tasks" not in report.headline


def test_a_run_that_never_started_is_of_any_task(home: Path) -> None:
    points = [
        Point({"batch": "constant_16", "seed": "0"}, short_run(2.0)),
        Point({"batch": "stages", "seed": "0"}, None, None),
    ]
    write_sweep("s", points)
    (comparison,) = build(load_sweep("s"), [], 0.0).comparisons
    assert (comparison.baseline, comparison.kind) == ("constant_16", "not finished")


def test_nothing_is_bold_for_being_below_another_task(home: Path) -> None:
    points = [
        Point({"batch": batch, "seed": str(seed)}, short_run(loss + seed / 1000), extra=extra)
        for batch, loss, extra in (("constant_16", 2.0, []), ("constant_64", 3.0, ["eval.sequences=64"]))
        for seed in range(3)
    ]
    write_sweep("s", points)
    assert r"\textbf" not in latex(build(load_sweep("s"), [], 0.0))["schedules"]
