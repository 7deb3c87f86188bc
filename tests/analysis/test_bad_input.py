"""Sweeps of which something is missing or odd: a clear message, or an honest gap in the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from analysis.__main__ import main
from pipeline.store import Row
from tests.analysis.synthetic import Point, short_run, train_row, write_sweep

Read = pytest.CaptureFixture[str]


def reported(home: Path, points: list[Point], code: int = 0) -> dict[str, Any]:
    """report.json of the whole command."""
    write_sweep("s", points)
    assert main(["s"]) == code
    content: dict[str, Any] = json.loads((home / "reports/s/report.json").read_text())
    return content


def point(seed: int, rows: list[Row] | None, **more: Any) -> Point:
    return Point({"batch": "constant_16", "seed": str(seed)}, rows, **more)


def test_a_sweep_that_is_none_names_the_nearest(home: Path, capsys: Read) -> None:
    write_sweep("demo", [point(0, short_run(2.0))])
    assert main(["dmo"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"dmo: no such sweep in {home}/sweeps. Did you mean demo?",
        "Sweeps: demo",
    ]


def test_a_sweep_without_points(home: Path, capsys: Read) -> None:
    write_sweep("s", [])
    assert main(["s"]) == 2
    assert capsys.readouterr().err.startswith("s: a sweep without points")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"points": None}, "points: None"),
        ({"points": [3]}, "3 in point 0 is no mapping"),
        ({"points": [{"run": "a", "axes": None}]}, "axes: None in point 0"),
        ({"points": [{"run": 3, "axes": {}}]}, "run: 3 in point 0"),
        ({"points": [{"axes": {}}]}, "run missing in point 0"),
        ({"command": None}, "command: None"),
        ({"axes": None}, "axes: None"),
        ({"common": None}, "common: None"),
    ],
)
def test_a_manifest_that_is_none(home: Path, changes: dict[str, Any], words: str, capsys: Read) -> None:
    write_sweep("s", [])
    file = home / "sweeps/s/manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert main(["s"]) == 2
    assert f"{file}: not a manifest: {words}" in capsys.readouterr().err


def test_one_row(home: Path) -> None:
    rows = [train_row(1, 1024, 5.0, 8, 1.0)]
    found = reported(home, [point(0, rows, state="FAILED", error="stopped"), point(1, short_run(2.0))])
    first = found["runs"][0]
    assert (first["state"], first["steps"], first["train_loss"]) == ("FAILED", 1, 5.0)
    assert found["schedules"][0]["val_loss"] == 2.0


def test_one_row_is_all_there_is(home: Path) -> None:
    rows = [train_row(1, 1024, 5.0, 8, 1.0)]
    found = reported(home, [point(0, rows, state="FAILED", error="stopped")], code=1)
    assert found["headline"].startswith("No run has finished")


def test_nothing_but_numbers_that_are_none(home: Path) -> None:
    rows = [{**row, **{key: math.nan for key in row if key.endswith("/loss")}} for row in short_run(2.0)]
    found = reported(home, [point(0, rows), point(1, short_run(2.0))])
    (schedule,) = found["schedules"]
    assert schedule["diverged"] == 1 and schedule["val_loss"] == "NaN"
    assert any("ended without a finite validation loss" in words for words in found["cautions"])


def test_metrics_that_some_runs_lack(home: Path) -> None:
    """One was never evaluated, one measured a noise scale, one has neither batch sizes nor requests."""
    measured = [{**row, "stat/noise_scale": 50.0} if "train/loss" in row else row for row in short_run(2.1)]
    bare = [{k: v for k, v in row.items() if not k.startswith("batch/")} for row in short_run(2.2)]
    found = reported(home, [point(0, short_run(2.0)[:-1]), point(1, measured), point(2, bare)])
    assert [run["val_loss"] for run in found["runs"]] == [None, 2.1, 2.2]
    assert [run["final_batch"] for run in found["runs"]][2] is None
    assert found["schedules"][0]["val_loss"] == pytest.approx(2.15)
    assert any("Without an evaluation after the last step: 1" in words for words in found["cautions"])
    assert "figures/noise_scale.png" in found["figures"]


def test_the_same_run_named_twice_is_one(home: Path) -> None:
    found = reported(home, [point(0, short_run(2.0)), point(0, short_run(2.0)), point(1, short_run(2.2))])
    assert [run["axes"]["seed"] for run in found["runs"]] == ["0", "1"]
    assert found["schedules"][0]["finished"] == 2
