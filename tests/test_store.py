"""The run directory: what survives crashes, races and restarts."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from pipeline.config import ConfigError
from pipeline.identity import run_id
from pipeline.store import (
    AlreadyRunning,
    MetricsWriter,
    RunDirectory,
    read_rows,
    report,
    supersede,
    sync_directory,
    write_atomically,
)
from tests.disk import fill
from tests.support import config


def row(step: int, attempt: int = 1, **values: object) -> dict[str, object]:
    return {"step": step, "attempt": attempt, "train/loss": 1.0, **values}


def test_frozen_config_is_read_back(home: Path):
    run = RunDirectory.of(config("batch=norm_test"))
    run.freeze(config("batch=norm_test"))
    assert run.config() == config("batch=norm_test")
    assert (run.status().state, run.status().budget_tokens) == ("PENDING", 1_999_872)


def test_a_run_of_before_there_were_replicas_is_read_and_has_the_same_id(home: Path):
    """A config frozen without the settings that have come since."""
    run = RunDirectory.of(config())
    run.freeze(config())
    tree = yaml.safe_load(run.config_file.read_text())
    del tree["data"]["distribution"], tree["imbalance"]
    tree["sync"] = {"method": "allreduce"}
    run.config_file.write_text(yaml.dump(tree))
    assert run.config() == config() and run_id(run.config()) == run.id
    del tree["seed"]
    run.config_file.write_text(yaml.dump(tree))
    with pytest.raises(ConfigError, match="seed: missing"):
        run.config()


def test_asked_for_again_a_run_takes_over_how_it_is_launched_until_it_is_done(home: Path):
    run = RunDirectory.of(config())
    run.freeze(config())
    run.update_status(state="FAILED", attempt=1)
    run.freeze(config("launch.max_parallel=3", "track=online"))
    assert (run.config().launch.max_parallel, run.config().track.mode) == (3, "online")
    assert (run.status().state, run.status().attempt) == ("FAILED", 1)
    run.update_status(state="DONE")
    run.freeze(config())
    assert run.config().track.mode == "online"


def test_a_run_that_cannot_be_written_to_is_named_with_the_remedy(small_disk: Path):
    run = RunDirectory.of(config())
    run.freeze(config())
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with (
        pytest.raises(ConfigError, match=r"cannot be written to \(Read-only file system\).*CRESCENDO_HOME"),
        run.lock(),
    ):
        pass


def test_a_running_run_keeps_its_config_and_status(home: Path):
    run = RunDirectory.of(config())
    run.freeze(config())
    with run.lock():
        run.update_status(state="RUNNING", attempt=1)
        run.freeze(config("track=online"))
        assert run.config().track.mode == "offline"
        assert run.status().state == "RUNNING"


def test_looking_at_the_lock_does_not_stop_a_taker(home: Path):
    run = RunDirectory.of(config())
    run.freeze(config())
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            run.is_locked()

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(20):
            with run.lock():
                pass
    finally:
        stop.set()
        watcher.join()


def test_find_by_id_prefix_or_path(home: Path):
    run = RunDirectory.of(config())
    run.freeze(config())
    for name in (run.id, run.id[:4], str(run.path)):
        assert RunDirectory.find(name).path == run.path
    with pytest.raises(ConfigError, match="no such run"):
        RunDirectory.find("feed")
    other = RunDirectory.of(config("seed=1"))
    other.freeze(config("seed=1"))
    with pytest.raises(ConfigError, match="matches 2 runs"):
        RunDirectory.find("")


def test_non_finite_numbers_are_strings_in_the_record(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write({**row(1), "a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1, "e": "capped"})
    assert json.loads(path.read_text()) == {
        **row(1),
        "a": "NaN",
        "b": "Infinity",
        "c": "-Infinity",
        "d": 0.1,
        "e": "capped",
    }
    (back,) = read_rows(path)
    assert (
        math.isnan(back["a"]) and back["b"] == math.inf and back["c"] == -math.inf and back["e"] == "capped"
    )


def test_a_torn_last_line_is_ignored_and_then_repaired(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps(row(1)) + "\n"
    for cut in range(1, len(whole)):
        path.write_text(whole + whole[:cut])
        assert len(read_rows(path)) == 1
    writer = MetricsWriter(path)
    writer.write(row(2))
    writer.close()
    assert [r["step"] for r in read_rows(path)] == [1, 2]


def test_a_full_disk_keeps_rows_in_memory_and_tears_none(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
):
    path = small_disk / "metrics.jsonl"
    writer = MetricsWriter(path)
    fill(small_disk, leave=4096)
    for step in range(50):  # one page has room for about 20, the last of them in part
        writer.write(row(step, note="x" * 150))
    written = len(read_rows(path))
    assert 0 < written < 30 and not path.read_bytes().endswith(b"\n")
    with pytest.raises(OSError, match=rf"metrics.jsonl: {50 - written} rows could not be written \(No space"):
        writer.flush()
    (small_disk / "ballast").unlink()
    writer.write(row(50))
    assert [r["step"] for r in read_rows(path)] == list(range(51))
    fill(small_disk, leave=0)
    for step in range(51, 100):
        writer.write(row(step, note="x" * 150))
    with pytest.raises(OSError, match="rows could not be written"):
        writer.close()
    assert capsys.readouterr().out.count("the run goes on") == 1
    (small_disk / "ballast").unlink()
    following = MetricsWriter(path)
    following.write(row(7, attempt=2))
    following.close()
    steps = [r["step"] for r in read_rows(path)]
    assert steps[:-1] == list(range(len(steps) - 1)) and steps[-1] == 7


def test_a_full_disk_leaves_the_old_file_and_nothing_else(small_disk: Path):
    path = small_disk / "status.json"
    write_atomically(path, "the old text")
    fill(small_disk, leave=0)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "x" * 100_000)
    assert path.read_text() == "the old text"
    assert sorted(p.name for p in small_disk.iterdir()) == ["ballast", "status.json"]


def test_a_line_about_a_full_disk_does_not_fail_on_it(small_disk: Path, monkeypatch: pytest.MonkeyPatch):
    with open(small_disk / "log", "w") as log:
        monkeypatch.setattr(sys, "stdout", log)
        fill(small_disk, leave=0)
        report("the first line")
        (small_disk / "ballast").unlink()
        report("the second")
    assert (small_disk / "log").read_text() == "the first line\nthe second\n"


def test_later_attempts_replace_what_they_did_again():
    rows = [row(s) for s in (1, 2, 3, 4)] + [row(s, 2) for s in (3, 4, 5)] + [row(s, 3) for s in (5, 6)]
    kept = [(r["step"], r["attempt"]) for r in supersede(rows)]
    assert kept == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3)]


def test_a_restart_from_scratch_replaces_everything_even_what_it_has_not_reached():
    rows = [row(s) for s in range(1, 10)] + [row(1, 2)]
    assert [(r["step"], r["attempt"]) for r in supersede(rows)] == [(1, 2)]


def test_last_row_is_read_from_the_tail(home: Path):
    run = RunDirectory.of(config())
    assert run.last_row() is None
    writer = MetricsWriter(run.metrics_file)
    for step in range(500):
        writer.write(row(step, note="x" * 100))
    writer.write({"step": 499, "attempt": 1, "val/loss": 2.0})
    assert run.last_row() == row(499, note="x" * 100)


def test_a_reader_sees_the_old_file_or_the_new_one_whole(tmp_path: Path):
    path = tmp_path / "status.json"
    write_atomically(path, "the old text")
    with open(path) as reader:
        assert reader.read(4) == "the "
        write_atomically(path, "another, longer text")
        assert reader.read() == "old text"
    assert path.read_text() == "another, longer text"
    assert list(tmp_path.iterdir()) == [path]


def test_a_replaced_file_and_a_new_record_survive_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Their names, too: the directory is on the disk when they are in it."""
    synced: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append((os.fstat(file).st_ino, sorted(os.listdir(tmp_path))))
    )
    write_atomically(tmp_path / "a", "text")
    assert synced[-1] == (tmp_path.stat().st_ino, ["a"])
    writer = MetricsWriter(tmp_path / "b")
    assert synced[-1] == (tmp_path.stat().st_ino, ["a", "b"])
    writer.write(row(1))
    assert len(synced) == 3  # a row alone does not wait for the disk
    writer.sync()
    assert synced[-1] == ((tmp_path / "b").stat().st_ino, ["a", "b"])
    writer.close()


@pytest.mark.parametrize(("number", "raised"), [(22, False), (5, True)])
def test_a_file_system_that_cannot_sync_directories_is_no_error(
    number: int, raised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fsync(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError) if raised else contextlib.nullcontext():
        sync_directory(tmp_path)


HOLDER = """
import sys, time
from pipeline.store import RunDirectory
with RunDirectory(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock_names_its_holder_and_is_free_when_the_holder_is_killed(tmp_path: Path):
    run = RunDirectory(tmp_path / "abc")
    assert not run.is_locked()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        assert run.is_locked()
        with (
            pytest.raises(AlreadyRunning, match=f"run abc is being run by process {holder.pid} on "),
            run.lock(),
        ):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with run.lock():
            assert run.is_locked()
    finally:
        holder.kill()
        holder.wait()
    assert not run.is_locked()


def _take(path: str, barrier: multiprocessing.Barrier, wins: multiprocessing.Queue) -> None:
    barrier.wait()
    try:
        with RunDirectory(path).lock():
            wins.put(os.getpid())
            time.sleep(0.5)
    except AlreadyRunning:
        pass


def test_of_many_takers_at_once_one_wins(tmp_path: Path):
    barrier, wins = multiprocessing.Barrier(4), multiprocessing.Queue()
    takers = [
        multiprocessing.Process(target=_take, args=(str(tmp_path / "r"), barrier, wins)) for _ in range(4)
    ]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join(30)
    assert wins.qsize() == 1


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"state": "DONF"}', '{"state": "DONE", "attempt": "2"}', "\0" * 20]
)
def test_a_damaged_status_is_a_failure_that_says_so_and_no_attempt_is_counted_twice(text: str, home: Path):
    composed = config()
    run = RunDirectory.of(composed)
    run.freeze(composed)
    run.update_status(state="RUNNING", attempt=3)
    writer = MetricsWriter(run.metrics_file)
    writer.write(row(7, attempt=4))
    writer.close()
    run.logs.mkdir()
    (run.logs / "attempt-5.rank-0.log").touch()
    run.status_file.write_text(text)
    status = run.status()
    assert status and (status.state, status.attempt) == ("FAILED", 5)
    assert status.error and status.error.startswith("status.json cannot be read (")
    with pytest.raises(ValueError, match=r"\w"):
        run.read_status()
    run.update_status(step=8)  # by the run that is at work
    assert run.read_status().state == "RUNNING" and run.read_status().attempt == 5


@pytest.mark.parametrize("damage", ["seed: 1", "truncated", "[", "!!python/name:os.system", "\udc80", "- 3"])
def test_a_config_that_is_not_what_was_frozen_is_refused(damage: str, home: Path):
    composed = config("seed=7")
    run = RunDirectory.of(composed)
    run.freeze(composed)
    text = run.config_file.read_text()
    bad = {"seed: 1": text.replace("seed: 7", "seed: 1"), "truncated": text[:-40]}.get(damage, damage)
    run.config_file.write_bytes(bad.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"config\.yaml: is not what was frozen \(.*\)\. Bring it back"):
        run.config()
    run.config_file.write_text(text.partition("\n")[2])  # of an earlier version
    assert run.config() == composed


def test_a_record_goes_on_only_where_it_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "metrics.jsonl"

    def rows_left(*lines: str, step: int = 3, seconds: float | None = None) -> int:
        path.write_text("".join(lines))
        writer = MetricsWriter(path)
        try:
            writer.go_on_after(step, step if seconds is None else seconds, evaluation_tokens=200)
        finally:
            writer.close()
        return len(read_rows(path))

    def line(step: int, **values: object) -> str:
        return json.dumps(row(step, tokens=100 * step, **{"time": float(step), **values})) + "\n"

    one, two, three, four = map(line, (1, 2, 3, 4))
    evaluation = json.dumps({"step": 2, "tokens": 200, "attempt": 1, "val/loss": 3.0}) + "\n"
    assert rows_left(one, two, evaluation, three, four) == 5
    assert rows_left(one, two, evaluation, three, "\0" * 9 + "\n", four) == 4
    assert "line 5 is no row; cut off there, after step 3" in capsys.readouterr().out
    assert rows_left("nonsense\n", one, step=0) == 0  # all is trained again
    for lines, where in (
        ((one, "{}\n", evaluation, three), "line 2 is no row"),
        ((one, evaluation, three, four), "step 2 is missing"),
        ((one, two, three, four), "step 2 is missing"),  # its evaluation
        ((one, two, evaluation), "step 3 is missing"),
        ((), "step 1 is missing"),
    ):
        with pytest.raises(
            ConfigError, match=rf"metrics\.jsonl: {where}, and the run would go on after step 3\."
        ):
            rows_left(*lines)
        assert path.read_text() == "".join(lines)

    # A second attempt did steps 2 and 3 again, and saved a checkpoint after them.
    again, later = (line(n, attempt=2, time=n + 0.5) for n in (2, 3))
    done = one, two, evaluation, three, four
    assert rows_left(*done, again, evaluation, later, seconds=3.5) == 8
    for lines, where in (
        ((*done, "{}\n", again, evaluation, later), "line 6 is no row"),  # not to be cut off there
        (done, "step 3 as its checkpoint has it is missing"),  # a copy from before
        ((*done, again, later), "step 2 is missing"),  # its evaluation, of the second attempt
    ):
        with pytest.raises(ConfigError, match=rf"metrics\.jsonl: {where}, and the run would go on after"):
            rows_left(*lines, seconds=3.5)
        assert path.read_text() == "".join(lines)
