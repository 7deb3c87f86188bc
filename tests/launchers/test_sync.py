"""python -m launchers sync: offline runs written by the real client, sent by the real client to a stand-in for
wandb's server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launchers import manifest, sync
from launchers.__main__ import main
from launchers.plan import freeze
from pipeline.config import to_tree
from pipeline.store import RunDirectory, home
from pipeline.track import Tracker, flatten
from tests.launchers.support import plan, tree_of, wait_until
from tests.wandb_server import API_KEY, SENT_KEY, WandbServer

Read = pytest.CaptureFixture[str]
ROWS = 30


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with the sweep `s` of two runs that have ended, and `third` with one more."""
    place = tmp_path_factory.mktemp("logged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRESCENDO_HOME", str(place))
        patch.setenv("WANDB_MODE", "offline")
        for name in ("DATA", "CACHE", "ARTIFACT"):
            patch.setenv(f"WANDB_{name}_DIR", "")  # the tracker sets them
        for sweep, seeds in (("s", "seed=0,1"), ("third", "seed=2")):
            points = plan(
                "experiment=demo", "batch=constant_16", seeds, "track.every=1", f"sweep.name={sweep}"
            )
            freeze(points.valid)
            manifest.write(points, "local")
            for point in points.valid:
                log(point.directory, 1, ROWS)
        yield place


def log(run: RunDirectory, attempt: int, rows: int) -> None:
    """What an attempt leaves that comes to its end."""
    run.update_status(state="RUNNING", attempt=attempt)
    tracker = Tracker(run.config(), run, attempt)
    for row in rows_of(run, attempt, rows):
        tracker.log(row)
    tracker.finish(0)
    run.update_status(state="DONE")


def rows_of(run: RunDirectory, attempt: int, rows: int) -> list[dict[str, Any]]:
    seed = run.config().seed
    return [
        {
            "step": step,
            "tokens": 2**53 + step,
            "attempt": attempt,
            "train/loss": float("inf") if step == 7 else (seed + 1) / (step + 2),
            "batch/reason": "because",
        }
        for step in range(1, rows + 1)
    ]


@pytest.fixture
def there(here: Path, logged: Path, wandb_server: WandbServer) -> Path:
    """The same as a home of the test's own, with a server that has none of it."""
    shutil.copytree(logged, here, symlinks=True, dirs_exist_ok=True)
    return here


def runs(sweep: str = "s") -> list[RunDirectory]:
    return [RunDirectory(home() / "runs" / p["run"]) for p in manifest.load(sweep)["points"]]


def add_to_s(run: RunDirectory) -> None:
    """As the sweep's command with one more point does."""
    found = manifest.load("s")
    found["points"] += [point for point in manifest.load("third")["points"] if point["run"] == run.id]
    manifest.path("s").write_text(json.dumps(found))


def file_of(run: RunDirectory, attempt: int = 1) -> Path:
    (file,) = run.path.glob(f"wandb/offline-run-*/run-{run.id}-a{attempt}.wandb")
    return file


def call(*arguments: str) -> int:
    return main(["sync", *arguments])


def told(capsys: Read, *arguments: str, code: int = 0) -> dict[str, dict[str, Any]]:
    """What --json says of each file, by wandb id."""
    capsys.readouterr()
    assert call(*arguments, "--json") == code
    files = json.loads(capsys.readouterr().out)["files"]
    return {f"{one['run']}-a{one['attempt']}": one for one in files}


def sent_rows(server: WandbServer, id_: str) -> list[dict[str, Any]]:
    """What was logged: without what wandb adds."""
    return [{k: v for k, v in row.items() if k[0] != "_"} for row in server.runs[id_].rows]


def tokens_by_step(server: WandbServer, id_: str) -> list[int]:
    """Of all rows, among which some may be twice, and then alike."""
    rows = server.runs[id_].rows
    by_step = {row["_step"]: row for row in rows}
    assert all(row == by_step[row["_step"]] for row in rows)
    return [by_step[step]["tokens"] for step in sorted(by_step)]


def test_every_run_arrives_once_with_all_that_was_logged(
    there: Path, wandb_server: WandbServer, capsys: Read
) -> None:
    assert call("s") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "s: 2 sent",
        f"see: {wandb_server.url}/team/crescendo",
        "compare: python -m analysis s",
    ]
    assert set(wandb_server.runs) == {f"{run.id}-a1" for run in runs()}
    for run in runs():
        config = run.config()
        sent = wandb_server.runs[f"{run.id}-a1"]
        assert sent_rows(wandb_server, sent.id) == rows_of(run, 1, ROWS)
        assert [row["_step"] for row in sent.rows] == list(range(ROWS))
        sent_config = {key: value for key, value in sent.config.items() if key != "_wandb"}
        assert sent_config == {**flatten(to_tree(config)), "run": run.id, "attempt": 1}
        assert (sent.entity, sent.project, sent.group, sent.job_type) == ("team", "crescendo", "s", "train")
        assert sent.name.endswith(f"seed{config.seed}") and "constant" in sent.tags
        assert (sent.state, sent.exit_code) == ("finished", 0)


def test_again_sends_nothing_and_a_run_that_came_later_alone(
    there: Path, wandb_server: WandbServer, capsys: Read
) -> None:
    assert call("s") == 0
    calls = len(wandb_server.calls)
    assert {one["state"] for one in told(capsys, "s").values()} == {"unchanged"}
    assert call("s") == 0
    assert capsys.readouterr().out.splitlines()[0] == "s: 2 unchanged (sent before)"
    assert len(wandb_server.calls) == calls

    (third,) = runs("third")
    add_to_s(third)
    files = told(capsys, "s")
    assert {id_: one["state"] for id_, one in files.items()} == {
        **{f"{run.id}-a1": "unchanged" for run in runs()},
        f"{third.id}-a1": "sent",
    }
    assert files[f"{third.id}-a1"]["url"] == f"{wandb_server.url}/team/crescendo/runs/{third.id}-a1"
    assert [wandb_server.runs[f"{run.id}-a1"].received for run in runs()] == [ROWS] * 3


def test_some_runs_or_one(there: Path, wandb_server: WandbServer, capsys: Read) -> None:
    first, second = runs()
    assert call("s", "--only", "seed=1") == 0
    assert list(wandb_server.runs) == [f"{second.id}-a1"]
    assert call(first.id) == 0
    out = capsys.readouterr().out
    assert f"see: {wandb_server.url}/team/crescendo/runs/{first.id}-a1\n" in out
    assert out.endswith(f"status: python -m launchers status {first.id}\n")
    assert len(wandb_server.runs) == 2


def test_an_entity_and_a_project_of_the_config(there: Path, wandb_server: WandbServer) -> None:
    (run,) = runs("third")
    track = replace(run.config().track, entity="others", project="elsewhere")
    run.update_status(state="FAILED")
    run.freeze(replace(run.config(), track=track))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        for name in ("DATA", "CACHE", "ARTIFACT"):
            patch.setenv(f"WANDB_{name}_DIR", "")
        log(run, 2, 3)
    assert call(run.id) == 0
    assert wandb_server.runs[f"{run.id}-a1"].path == f"team/crescendo/{run.id}-a1"
    assert wandb_server.runs[f"{run.id}-a2"].path == f"others/elsewhere/{run.id}-a2"


# --- a server that fails


@pytest.mark.parametrize(("times", "status"), [(1, 500), (2, 429)])
def test_what_passes_is_tried_again(there: Path, wandb_server: WandbServer, times: int, status: int) -> None:
    wandb_server.fail_next(times, status, "file_stream")
    assert call("s") == 0
    assert [len(run.rows) for run in wandb_server.runs.values()] == [ROWS] * 2


@pytest.mark.parametrize(
    ("operation", "words"), [("file_stream", "Fatal error"), ("UpsertBucket", "injected")]
)
def test_a_refused_run_is_reported_and_sent_by_the_next_command(
    operation: str, words: str, there: Path, wandb_server: WandbServer, capsys: Read
) -> None:
    wandb_server.fail_next(1, 400, operation)
    assert call("s") == 1
    out = capsys.readouterr().out
    assert out.startswith("s: 1 failed, 1 sent\n") and words in out
    assert SENT_KEY not in out and API_KEY not in out
    assert out.endswith("again: python -m launchers sync s\n")
    files = told(capsys, "s")
    assert sorted(one["state"] for one in files.values()) == ["sent", "unchanged"]
    assert [run.received for run in wandb_server.runs.values()] == [ROWS] * 2


@pytest.mark.slow
def test_a_server_that_never_recovers_is_given_up(
    there: Path, wandb_server: WandbServer, capsys: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "_SILENCE_S", 4.0)
    wandb_server.fail_next(1000, 500, "UpsertBucket")
    files = told(capsys, "s", code=1)
    assert {one["error"] for one in files.values()} == {"no word from wandb for 4 s"}


def test_no_login(there: Path, monkeypatch: pytest.MonkeyPatch, capsys: Read) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    assert call("s") == 2
    error = capsys.readouterr().err
    assert "No API key configured" in error and "python -m wandb login" in error and "WANDB_API_KEY" in error


def test_a_wrong_key(there: Path, monkeypatch: pytest.MonkeyPatch, capsys: Read) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert call("s") == 1
    assert "invalid API key" in capsys.readouterr().out


def test_a_server_out_of_reach(there: Path, monkeypatch: pytest.MonkeyPatch, capsys: Read) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert call("s") == 2
    error = capsys.readouterr().err
    assert "http://127.0.0.1:9: out of reach" in error and "WANDB_BASE_URL" in error


@pytest.mark.slow
def test_ctrl_c_ends_wandb_too_and_the_same_command_goes_on(there: Path, wandb_server: WandbServer) -> None:
    wandb_server.fail_next(1000, 500, "file_stream")
    command = [sys.executable, "-m", "launchers", "sync", "s"]
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(root)})
    wait_until(lambda: wandb_server.calls.count("file_stream") > 1)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    wandb_server.recover()
    assert call("s") == 0
    for run in runs():
        assert tokens_by_step(wandb_server, f"{run.id}-a1") == [
            row["tokens"] for row in rows_of(run, 1, ROWS)
        ]


# --- files that are not whole


def test_an_attempt_that_still_runs_is_left_out(there: Path, wandb_server: WandbServer, capsys: Read) -> None:
    first, second = runs()
    shutil.copytree(
        file_of(first).parent,
        there / "runs" / first.id / "wandb" / f"offline-run-20300101_000000-{first.id}-a2",
    )
    again = first.path / "wandb" / f"offline-run-20300101_000000-{first.id}-a2"
    (again / f"run-{first.id}-a1.wandb").rename(again / f"run-{first.id}-a2.wandb")
    first.update_status(state="RUNNING", attempt=2)
    with first.lock():
        assert call("s") == 0
    out = capsys.readouterr().out
    assert out.startswith("s: 1 running (left out until they end), 2 sent\n")
    assert out.endswith("again: python -m launchers sync s\n")
    assert set(wandb_server.runs) == {f"{first.id}-a1", f"{second.id}-a1"}
    assert not Path(f"{file_of(first, 2)}.synced").exists()


@pytest.mark.slow
def test_what_was_added_after_somebody_sent_a_run_is_sent(
    there: Path, wandb_server: WandbServer, capsys: Read
) -> None:
    run, _ = runs()
    file = file_of(run)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    subprocess.run([sys.executable, "-m", "wandb", "sync", str(file)], check=True, capture_output=True)
    Path(f"{file}.synced").touch()  # wandb leaves it where the part ends between two records
    some = wandb_server.runs[f"{run.id}-a1"].received
    assert 0 < some < ROWS
    file.write_bytes(whole)
    assert told(capsys, run.id)[f"{run.id}-a1"]["state"] == "sent"
    assert tokens_by_step(wandb_server, f"{run.id}-a1") == [row["tokens"] for row in rows_of(run, 1, ROWS)]
    assert wandb_server.runs[f"{run.id}-a1"].state == "finished"


def test_a_killed_run_is_sent_as_far_as_it_is_whole(
    there: Path, wandb_server: WandbServer, capsys: Read
) -> None:
    run, _ = runs()
    with open(file_of(run), "r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) * 2 // 3)
    run.update_status(state="RUNNING")
    assert call("s") == 0
    sent = wandb_server.runs[f"{run.id}-a1"]
    assert 0 < len(sent.rows) < ROWS
    assert (sent.state, sent.exit_code) == ("failed", 1)
    assert {one["state"] for one in told(capsys, "s").values()} == {"unchanged"}


@pytest.mark.slow
def test_files_without_a_beginning_hold_up_no_others(
    there: Path, wandb_server: WandbServer, capsys: Read
) -> None:
    first, second = runs()
    (third,) = runs("third")
    os.truncate(file_of(first), 7)
    os.truncate(file_of(first), 40)  # with zeros, as after a power cut
    os.truncate(file_of(third), 7)
    add_to_s(third)
    assert call("s") == 1
    out = capsys.readouterr().out
    assert out.startswith("s: 1 failed, 1 empty (nothing was logged), 1 sent\n") and "Failed to read" in out
    assert out.endswith("again: python -m launchers sync s\n")
    assert set(wandb_server.runs) == {f"{second.id}-a1"}


def test_nothing_was_logged_offline(there: Path, wandb_server: WandbServer, capsys: Read) -> None:
    for run in runs():
        shutil.rmtree(run.path / "wandb")
    before = tree_of(there)
    assert call("s") == 0
    assert capsys.readouterr().out.startswith("s: nothing was logged offline\n")
    assert (tree_of(there), wandb_server.calls) == (before, [])
