"""Runs read from wandb's server with its real client: a stand-in for the server, made-up rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from analysis import online
from analysis.__main__ import main
from analysis.load import load_sweep
from analysis.report import build
from analysis.study import load_study
from analysis.tables import to_json
from pipeline.config import ConfigError, to_tree
from pipeline.store import Row, RunDirectory
from pipeline.track import flatten
from tests.analysis.synthetic import pairs, short_run, write_sweep
from tests.support import ROOT
from tests.wandb_server import ENTITY, Run, WandbServer

PROJECT = f"{ENTITY}/crescendo"
SOURCE = f"wandb:{PROJECT}"

Read = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def few_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB__GRAPHQL_RETRY_MAX", "3")
    monkeypatch.setenv("WANDB__GRAPHQL_RETRY_WAIT_MAX_SECONDS", "2")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture
def sweep(home: Path, wandb_server: WandbServer) -> list[Run]:
    """Sweep s of two schedules and two seeds, here and at the server."""
    write_sweep("s", pairs({"constant_16": [2.0, 2.1], "stages": [1.9, 2.05]}))
    return upload(wandb_server)


def upload(server: WandbServer) -> list[Run]:
    found = []
    for run in load_sweep("s").runs:
        directory = RunDirectory(Path(os.environ["CRESCENDO_HOME"]) / "runs" / str(run.id))
        assert run.config
        config = {**flatten(to_tree(run.config)), "track.every": 1, "run": run.id, "attempt": 1}
        found.append(put(server, f"{run.id}-a1", directory.rows(), config))
    return found


def put(
    server: WandbServer,
    id_: str,
    rows: Sequence[Row],
    config: dict[str, Any],
    state: str = "finished",
    **more: Any,
) -> Run:
    run = Run(ENTITY, "crescendo", id_, config=config, state=state, **more)
    server.runs[id_] = run
    add(run, rows)
    return run


def add(run: Run, rows: Sequence[Row]) -> None:
    start = len(run.rows)
    names = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
    content = [
        json.dumps({k: names.get(str(v), v) for k, v in row.items()} | {"_step": start + i, "_runtime": 1.5})
        for i, row in enumerate(rows)
    ]
    run.stream({"files": {"wandb-history.jsonl": {"offset": start, "content": content}}})


def asked(server: WandbServer) -> list[str]:
    """What it was asked since, of histories."""
    found = [call for call in server.calls if call == "HistoryPage"]
    server.calls.clear()
    return found


def values(source: str) -> dict[str, Any]:
    content = to_json(build(load_sweep("s", source), [], 0.0))
    assert content.pop("source") == source
    content["settings"].pop("Read from")
    return content


def test_the_report_is_that_of_the_record(sweep: list[Run]) -> None:
    assert values(SOURCE) == values("record")
    assert load_sweep("s", SOURCE).record.equals(load_sweep("s").record)


def test_each_run_has_the_address_of_its_page(sweep: list[Run], wandb_server: WandbServer) -> None:
    urls = [run.url for run in load_sweep("s", SOURCE).runs]
    assert urls == [
        f"{wandb_server.url}/{run.path}".replace("crescendo/", "crescendo/runs/") for run in sweep
    ]
    assert {run.url for run in load_sweep("s").runs} == {None}


def test_what_has_not_changed_is_not_fetched_again(sweep: list[Run], wandb_server: WandbServer) -> None:
    first = load_sweep("s", SOURCE).record
    assert len(asked(wandb_server)) == 4
    assert load_sweep("s", SOURCE).record.equals(first)
    assert asked(wandb_server) == []
    add(sweep[2], [{**short_run(1.7, steps=5)[-1], "attempt": 1}])
    assert load_sweep("s", SOURCE).record.filter(point=2)["val/loss"][-1] == 1.7
    assert len(asked(wandb_server)) == 1


def test_ids_that_differ_after_a_dot_are_two_runs(wandb_server: WandbServer, home: Path) -> None:
    for id_, loss in (("v1.0", 2.0), ("v1.1", 3.0)):
        put(wandb_server, id_, short_run(loss), {})
    for _ in range(2):  # fetched, and from the cache
        runs = online.fetch(f"{ENTITY}/crescendo", [{}])
        assert {run.id: run.rows["val/loss"].max() for run in runs} == {"v1.0": 2.0, "v1.1": 3.0}


def test_a_run_that_ended_otherwise_is_fetched_again(sweep: list[Run], wandb_server: WandbServer) -> None:
    sweep[0].state = "running"
    load_sweep("s", SOURCE)
    asked(wandb_server)
    sweep[0].state = "finished"
    load_sweep("s", SOURCE)
    assert len(asked(wandb_server)) == 1


def test_a_pull_that_was_cut_short_goes_on(
    sweep: list[Run], wandb_server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online, "THREADS", 1)
    wandb_server.fail_next(2, 400, "HistoryPage")
    runs = load_sweep("s", SOURCE).runs
    assert [run.state for run in runs] == ["UNREADABLE", "UNREADABLE", "DONE", "DONE"]
    problem = runs[0].problem
    assert problem and "its history cannot be fetched" in problem and "injected by the test" in problem
    wandb_server.fail_next(2, 400, "HistoryPage")
    found = build(load_sweep("s", SOURCE), [], 0.0)
    assert any(
        words.startswith("Not fetched, which the same command tries again") for words in found.cautions
    )
    assert found.resume == [], "no run is missing"
    asked(wandb_server)
    assert [run.state for run in load_sweep("s", SOURCE).runs] == ["DONE"] * 4
    assert len(asked(wandb_server)) == 2


@pytest.mark.parametrize(
    ("times", "status", "call"), [(2, 429, "HistoryPage"), (1, 500, "HistoryPage"), (2, 429, "Runs")]
)
def test_what_passes_is_tried_again(
    sweep: list[Run], wandb_server: WandbServer, times: int, status: int, call: str
) -> None:
    wandb_server.fail_next(times, status, call)
    assert [run.state for run in load_sweep("s", SOURCE).runs] == ["DONE"] * 4


def test_exported_rows_and_newer_ones(sweep: list[Run], wandb_server: WandbServer) -> None:
    """The server gives absent values of exported rows as null; they are not there."""
    for run in sweep[:2]:
        run.export()
    add(sweep[1], [{**short_run(1.7, steps=5)[-1], "attempt": 1}])
    record, expected = load_sweep("s", SOURCE).record, load_sweep("s").record
    assert record.filter(point=0).equals(expected.filter(point=0))
    assert record.filter(point=1)[:-1].equals(expected.filter(point=1))
    assert record.filter(point=1)["val/loss"][-1] == 1.7


def test_a_history_longer_than_a_page_and_more_runs_than_a_page(
    sweep: list[Run], wandb_server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online, "RUNS_PER_PAGE", 3)
    rows = short_run(1.5, steps=2500)
    sweep[0].streams.clear()
    add(sweep[0], rows)
    found = load_sweep("s", SOURCE).record
    assert len(found.filter(point=0)) == 2501 and found["point"].n_unique() == 4
    assert found.filter(point=0)["step"].to_list() == [*range(1, 2501), 2500]


def test_numbers_that_are_none(sweep: list[Run]) -> None:
    rows = short_run(float("nan"))
    rows[1]["train/loss"], rows[2]["train/loss"] = float("inf"), float("-inf")
    sweep[0].streams.clear()
    add(sweep[0], rows)
    found = load_sweep("s", SOURCE).record.filter(point=0)
    assert [str(x) for x in found["train/loss"]] == ["3.0", "inf", "-inf", "3.0", "None"]
    assert [str(x) for x in found["val/loss"]] == ["None"] * 4 + ["nan"]


def test_a_later_attempt_replaces_earlier_rows_from_its_first_step_on(
    sweep: list[Run], wandb_server: WandbServer
) -> None:
    first = short_run(9.0, train_loss=9.0)[:3]
    sweep[0].streams.clear()
    add(sweep[0], first)
    again = [{**row, "attempt": 2} for row in short_run(2.0)[1:]]
    put(wandb_server, sweep[0].id.replace("-a1", "-a2"), again, {**sweep[0].config, "attempt": 2})
    found = load_sweep("s", SOURCE)
    rows = found.record.filter(point=0)
    assert rows["train/loss"].to_list() == [9.0, 3.0, 3.0, 3.0, None]
    assert found.runs[0].url and found.runs[0].url.endswith("-a2")


def test_rows_that_were_sent_twice_count_once(sweep: list[Run]) -> None:
    """As `python -m launchers sync` leaves them of a file that grew: the same `_step`, the same values."""
    expected = load_sweep("s").record
    lines = [json.dumps(row) for row in sweep[0].rows]
    sweep[0].stream({"files": {"wandb-history.jsonl": {"offset": len(lines), "content": lines[:3]}}})
    assert len(sweep[0].rows) == len(lines) + 3
    assert load_sweep("s", SOURCE).record.equals(expected)


def test_rows_that_do_not_come_are_told(sweep: list[Run], wandb_server: WandbServer) -> None:
    sweep[1].line_count = 500
    found = load_sweep("s", SOURCE)
    assert found.cautions == [
        f"Histories that did not come whole, read as far as possible: {sweep[1].id}: 5 rows came, and wandb "
        f"counts 500."
    ]
    assert len(asked(wandb_server)) == 5, "fetched twice"
    load_sweep("s", SOURCE)
    assert len(asked(wandb_server)) == 2, "and again the next time"


def test_a_finished_run_without_rows_is_not_done_wherever_its_directory_is(
    sweep: list[Run], home: Path
) -> None:
    sweep[0].streams.clear()
    here = load_sweep("s", SOURCE).runs[0]
    (home / "runs").rename(home / "elsewhere")
    remote = load_sweep("s", SOURCE).runs
    assert [run.state for run in remote] == ["UNREADABLE", "DONE", "DONE", "DONE"]
    why = f"{SOURCE} holds no training step, though the run is done"
    assert here.problem == remote[0].problem == why


def test_runs_whose_directories_are_elsewhere(sweep: list[Run], home: Path) -> None:
    expected = values(SOURCE)
    (home / "runs").rename(home / "elsewhere")
    sweep[3].state = "crashed"
    found = load_sweep("s", SOURCE)
    assert [run.state for run in found.runs] == ["DONE", "DONE", "DONE", "FAILED"]
    assert found.runs[3].problem == "crashed, says wandb"
    sweep[3].state = "finished"
    again = values(SOURCE)
    assert (
        again["comparisons"] == expected["comparisons"]
        and again["settings"]["Model"] == expected["settings"]["Model"]
    )


def test_the_command_writes_beside_the_report_of_the_record(
    sweep: list[Run], home: Path, capsys: Read
) -> None:
    assert main(["s", "--source", SOURCE]) == 0
    assert "reports/s/wandb-team-crescendo/report.html" in capsys.readouterr().out
    assert (home / "reports/s/wandb-team-crescendo/report.json").exists()


# --- what cannot be done ---------------------------------------------------------------------------------


def refused(source: str = SOURCE) -> str:
    with pytest.raises(ConfigError) as caught:
        load_sweep("s", source)
    return "\n".join(caught.value.problems)


def test_a_wrong_project_names_the_nearest(sweep: list[Run]) -> None:
    words = refused(f"wandb:{ENTITY}/cresendo")
    assert "has no such project, or this login may not read it. Did you mean team/crescendo?" in words
    assert "Projects of team: crescendo" in words and "--source record" in words


def test_a_project_that_one_may_not_read(sweep: list[Run], wandb_server: WandbServer) -> None:
    wandb_server.forbidden.add("crescendo")
    words = refused()
    assert "this login may not read it" in words and "wandb login --relogin" in words
    assert "Projects of team: none" in words


@pytest.mark.parametrize("project", ["", "crescendo", "a/b/c", "team/"])
def test_a_source_that_names_no_project(sweep: list[Run], project: str) -> None:
    assert "It is wandb:ENTITY/PROJECT" in refused(f"wandb:{project}")


@pytest.mark.parametrize("key", ["x" * 40, None])
def test_no_login_or_a_wrong_one(sweep: list[Run], key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key or "")
    words = refused()
    assert "no login at http://127.0.0.1" in words and "wandb login" in words and "--source record" in words
    assert ("invalid API key" if key else "No API key") in words


@pytest.mark.slow
def test_a_terminal_is_not_asked_for_a_login(sweep: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.delenv("WANDB_SILENT")
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "analysis", "s", "--source", SOURCE]
    with subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        assert process.wait(60) == 2
    assert b"No API key configured" in os.read(ours, 100_000)
    os.close(ours)
    os.close(theirs)


def test_a_server_out_of_reach(sweep: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    words = refused()
    assert "http://127.0.0.1:9 is out of reach" in words and "WANDB_BASE_URL" in words


def test_a_server_that_refuses_to_list(sweep: list[Run], wandb_server: WandbServer) -> None:
    wandb_server.fail_next(1, 400, "Runs")
    assert "does not list its runs: injected by the test" in refused()


def test_a_project_without_this_sweep(sweep: list[Run], wandb_server: WandbServer) -> None:
    for run in sweep:
        del wandb_server.runs[run.id]
    put(wandb_server, "other", [], {})
    words = refused()
    assert "has no run of this sweep" in words and "launchers sync" in words


def test_a_sweep_without_a_manifest_gets_a_file_to_begin_with(
    sweep: list[Run], home: Path, capsys: Read
) -> None:
    (home / "sweeps/s/manifest.json").unlink()
    assert main(["s", "--source", SOURCE]) == 2
    words, _, text = capsys.readouterr().err.partition("\n\n")
    assert (
        "s: no such sweep" in words
        and "sweeps/s/manifest.json" in words
        and "give s.yaml instead of s" in words
    )
    (home / "s.yaml").write_text(text)
    found = build(load_study(home / "s.yaml"), ["batch.schedule=constant"], 0.0)
    (comparison,) = found.comparisons
    assert comparison.difference is not None
    assert comparison.difference.mean == pytest.approx(((1.9 - 2.0) + (2.05 - 2.1)) / 2)


# --- while one waits -------------------------------------------------------------------------------------


def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "_SILENCE_S", 0.2)
    silent = threading.Event()
    with pytest.raises(ConfigError, match="no word from the server for 0 s"):
        list(online._in_threads([Run(ENTITY, "crescendo", "a")], lambda run: silent.wait(60)))
    silent.set()


def test_a_long_pull_tells_how_far_it_is(
    sweep: list[Run], monkeypatch: pytest.MonkeyPatch, capsys: Read
) -> None:
    load_sweep("s", SOURCE)
    assert capsys.readouterr().err == "", "it was short"
    monkeypatch.setattr(online, "_PAUSE_S", 0.0)
    load_sweep("s", SOURCE)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"wandb: {n} of 4 runs, {5 * n} rows" for n in range(1, 5)]
