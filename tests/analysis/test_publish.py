"""The W&B Report, written by wandb's own package into the stand-in for its server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis.__main__ import main
from analysis.look import colors
from tests.analysis.synthetic import Point, realistic, short_run, write_sweep
from tests.wandb_server import ENTITY, Run, WandbServer

pytestmark = pytest.mark.slow


def publish(folder: Path, server: WandbServer, *arguments: str, expect: int = 0) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-m", "analysis", "demo", "--json", "--publish", *arguments],
        env=os.environ | server.environment(folder) | {"CRESCENDO_HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == expect, result.stderr
    return json.loads(result.stdout) if expect == 0 else {"said": result.stderr}


@pytest.fixture
def server() -> Iterator[WandbServer]:
    """With the project of the runs."""
    with WandbServer() as stand_in:
        stand_in.runs["a"] = Run(ENTITY, "crescendo", "a")
        yield stand_in


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CRESCENDO_HOME", str(tmp_path))
    write_sweep("demo", realistic())
    return tmp_path


def test_the_report_is_mirrored_and_brought_up_to_date(sweep: Path, server: WandbServer) -> None:
    first = publish(sweep, server)
    again = publish(sweep, server)
    (view,) = server.views.values()
    assert first["published"] == again["published"]
    assert f"/{ENTITY}/crescendo/reports/" in first["published"] and first["published"].endswith(view["id"])
    assert (view["displayName"], view["description"]) == (
        "demo: batch-size schedules compared",
        first["headline"],
    )
    blocks = json.loads(view["spec"])["blocks"]
    words = "\n".join(block["content"] for block in blocks if block["type"] == "markdown-block")
    for verdict in first["verdicts"]:
        assert verdict in words
    assert "figures/" not in words and "## Batch size" in words
    grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    drawn = [
        panel["config"]["metrics"][0] for grid in grids for panel in grid["panelBankSectionConfig"]["panels"]
    ]
    assert {"val/loss", "train/loss", "batch/size", "stat/noise_scale"} <= set(drawn)
    # The runs of the sweep, in the colours that their schedules have in the report.
    (runset,) = grids[0]["runSets"]
    ids = [run["run"] for run in first["runs"]]
    (condition,) = runset["filters"]["filters"]
    assert (condition["key"]["name"], condition["value"]) == ("run", ids)
    expected = dict(zip((s["schedule"] for s in first["schedules"]), colors("light", 4), strict=True))
    assert grids[0]["customRunColors"] == {
        f"{run['run']}-a1": expected[run["schedule"]] for run in first["runs"]
    }


def test_what_wandb_refuses_is_told_with_the_remedy(sweep: Path, server: WandbServer) -> None:
    told = publish(sweep, server, "cresendo", expect=2)["said"]
    assert "wandb has no project team/cresendo. Did you mean crescendo?" in told
    assert "launchers sync demo" in told
    server.fail_next(1, 400, "upsertView")
    told = publish(sweep, server, expect=2)["said"]
    assert "--publish: wandb refuses: " in told and "injected by the test" in told
    assert not server.views and not (sweep / "reports/demo/published.json").exists()


def test_runs_in_several_projects_need_one_to_be_named(sweep: Path, server: WandbServer) -> None:
    here = Point({"batch": "constant_16", "seed": "7"}, short_run(2.0), extra=["track.project=other"])
    write_sweep("demo", [*realistic(), here])
    told = publish(sweep, server, expect=2)["said"]
    assert "the runs are in 2 projects of wandb (team/crescendo, team/other)" in told
    assert publish(sweep, server, "team/crescendo")["published"]


def test_without_the_extra_its_name_is_told(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "analysis.publish", raising=False)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main(["demo", "--publish"]) == 2
    assert "'.[publish]'" in capsys.readouterr().err
