"""The stand-in for wandb's server does for the real client what the tests need of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.wandb_server import WandbServer

UPLOAD = """
import wandb
for id_ in "abc":
    with wandb.init(project="p", id=id_, group="g", name=id_.upper(), config={"seed": 1, "batch.size": 8}) as run:
        for step in range(12):
            run.log({"tokens": 100 * step, "loss": 1 / (step + 3)})
"""
READ = """
import json, wandb
runs = wandb.Api().runs("team/p", filters={"group": "g"}, lazy=False, per_page=2)
print(json.dumps([
    [run.id, run.name, run.group, run.state, run.config, run.summary["loss"], list(run.scan_history(page_size=5))]
    for run in runs
]))
"""


@pytest.fixture
def wandb(home: Path, wandb_server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> WandbServer:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.chdir(home)
    return wandb_server


def client(script: str) -> str:
    """What it prints in an interpreter of its own: wandb remembers its settings."""
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, timeout=60
    )
    assert told.returncode == 0, told.stderr
    return told.stdout


def logged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key in ("tokens", "loss")} for row in rows]


def test_runs_arrive_online_and_are_read_again(wandb: WandbServer) -> None:
    client(UPLOAD)
    rows = [{"tokens": 100 * step, "loss": 1 / (step + 3)} for step in range(12)]
    assert [logged(run.rows) for run in wandb.runs.values()] == [rows] * 3
    assert [(run.path, run.state, run.exit_code) for run in wandb.runs.values()] == [
        (f"team/p/{id_}", "finished", 0) for id_ in "abc"
    ]
    for expected, found in zip("abc", json.loads(client(READ).splitlines()[-1]), strict=True):
        id_, name, group, state, config, loss, history = found
        assert (id_, name, group, state) == (expected, expected.upper(), "g", "finished")
        assert config == {"seed": 1, "batch.size": 8}
        assert (loss, logged(history)) == (1 / 14, rows)


def test_a_question_that_it_does_not_know_fails_the_test() -> None:
    with pytest.raises(AssertionError, match="GET /nowhere"), WandbServer() as server:
        assert server.answer("GET", "/nowhere", None, b"") == (404, {})
