from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launchers import local
from launchers.__main__ import main
from launchers.local import run_plan
from launchers.plan import Plan, freeze, state
from launchers.screen import choose
from pipeline import worker
from pipeline.store import RunDirectory
from tests.launchers.support import Stub, plan, tree_of, wait_until


@pytest.fixture(autouse=True)
def nothing_survives(home: Path) -> Iterator[None]:
    yield
    wait_until(lambda: Stub(home).processes() == [], timeout_s=5)


def sweep(number: int, *more: str) -> Plan:
    return plan("sweep.name=s", f"seed=range({number})", *more)


def ids(p: Plan) -> list[str]:
    return [point.run or "" for point in p.points]


def states(home: Path, p: Plan) -> list[str]:
    """As the files say, read without the project's code."""
    return [json.loads((home / "runs" / run / "status.json").read_text())["state"] for run in ids(p)]


def when_started(stub: Stub, number: int, then: Callable[[], None]) -> threading.Thread:
    def wait() -> None:
        wait_until(lambda: len(stub.events("start")) >= number)
        then()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_it_runs_every_point_once_and_then_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    p, stub = sweep(3), Stub(home)
    assert run_plan(p, stub) == 0
    assert sorted(stub.runs()) == sorted(ids(p)) and states(home, p) == ["DONE"] * 3
    assert capsys.readouterr().out.splitlines()[-1] == "compare: python -m analysis s"

    assert run_plan(sweep(3), stub) == 0
    assert len(stub.runs()) == 3
    again = capsys.readouterr().out
    assert "3 done (skipped)." in again and "started" not in again and ": done" not in again
    assert again.splitlines()[-1] == "compare: python -m analysis s"

    grown = sweep(4)
    assert run_plan(grown, stub) == 0
    assert stub.runs()[3:] == [ids(grown)[3]]
    manifest = json.loads((home / "sweeps" / "s" / "manifest.json").read_text())
    assert [point["run"] for point in manifest["points"]] == ids(grown)
    links = list((home / "sweeps" / "s" / "wandb").iterdir())
    assert len(links) == 4 and all((link / "run.wandb").exists() for link in links)


def test_what_a_worker_is_given(home: Path) -> None:
    p, stub = sweep(1, "parallel=ddp", "launch.max_parallel=1"), Stub(home)
    run_plan(p, stub)
    (event,) = stub.events("start")
    assert int(event["threads"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    assert event["session"] == event["pid"] != os.getsid(0)
    chosen, other = sweep(2, "launch.cpus_per_task=7"), Stub(home)
    run_plan(chosen, other)
    assert other.events("start")[-1]["threads"] == "7"
    assert (home / "runs" / ids(p)[0] / "logs" / "launcher.log").exists()


def test_a_failure_does_not_stop_the_rest(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    p = sweep(3)
    bad = ids(p)[1]
    stub = Stub(home, {bad: "fail"})
    assert run_plan(p, stub) == 1
    assert states(home, p) == ["DONE", "FAILED", "DONE"]
    out = capsys.readouterr().out
    failure = out[out.index("1 failed: seed=1") :]
    assert "rank 1: ValueError: loss is NaN" in failure
    assert "│ Traceback (most recent call last):" in failure and "attempt-1.rank-1.log" in failure
    assert "rank 0 only noticed" not in out and out.count("loss is NaN") == 1
    assert re.search(r"^retry: python -m pipeline", failure, re.M)

    assert run_plan(sweep(3), Stub(home)) == 0  # whatever was wrong is mended
    assert stub.runs()[3:] == [bad] and states(home, p) == ["DONE"] * 3


def test_a_worker_that_dies_without_a_word_has_failed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    p = sweep(1)
    assert run_plan(p, Stub(home, {ids(p)[0]: "die"})) == 1
    assert states(home, p) == ["FAILED"]
    status = RunDirectory(home / "runs" / ids(p)[0]).status()
    assert status and status.exit_code == -9 and "killed by SIGKILL" in str(status.error)
    assert "killed by SIGKILL" in capsys.readouterr().out


@pytest.mark.parametrize("limit", [1, 3])
def test_as_many_at_a_time_as_asked(home: Path, limit: int) -> None:
    stub = Stub(home, seconds=0.3)
    assert run_plan(sweep(4, f"launch.max_parallel={limit}"), stub) == 0
    changes = [(e["time"], 1) for e in stub.events("start")] + [(e["time"], -1) for e in stub.events("end")]
    running, most = 0, 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    assert most == limit


def test_a_cancelled_sweep_ends_though_its_runs_were_begun_before(home: Path) -> None:
    """What waits to go on is as much cancelled as what waits to begin."""
    p, stub = sweep(3), Stub(home, seconds=1)
    freeze(p.points)
    for point in p.points:
        point.directory.update_status(state="FAILED", attempt=1, error="of before")
    cancelled: list[int] = []
    thread = when_started(stub, 1, lambda: cancelled.append(main(["cancel", "s", "--pending", "--yes"])))
    run_plan(p, stub)
    thread.join()
    assert cancelled == [0] and len(stub.runs()) == 1
    assert sorted(states(home, p)) == ["CANCELLED", "CANCELLED", "DONE"]


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_ends_the_workers_and_says_how_to_go_on(
    home: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals, name: str
) -> None:
    p = sweep(3, "launch.max_parallel=2")
    stub = Stub(home, seconds=60)
    before = signal.getsignal(number)
    killer = when_started(stub, 2, lambda: os.kill(os.getpid(), number))
    start = time.monotonic()
    assert run_plan(p, stub) == 128 + number
    killer.join()
    assert time.monotonic() - start < 20  # SIGTERM was enough
    assert stub.processes() == [] and signal.getsignal(number) is before
    assert states(home, p) == ["CANCELLED", "CANCELLED", "PENDING"]
    out = capsys.readouterr().out
    assert out.count("Stopping at the next step, with a checkpoint. Once more to stop at once.") == 1
    assert f"Stopped by {name}: 2 cancelled, 1 waiting." in out
    assert out.count("; ") == 1 and " left" not in out  # the summary, once
    assert out.splitlines()[-1].startswith("continue: python -m pipeline")

    assert run_plan(p, Stub(home)) == 0
    assert states(home, p) == ["DONE"] * 3


def test_a_worker_that_ignores_sigterm_is_killed_with_its_children(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "GRACE_S", 0.3)
    p = sweep(1)
    stub = Stub(home, {ids(p)[0]: "stubborn"}, seconds=60)
    killer = when_started(stub, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert run_plan(p, stub) == 130
    killer.join()
    wait_until(lambda: stub.processes() == [])
    assert states(home, p) == ["CANCELLED"]


def test_a_worker_has_longer_than_it_takes_itself() -> None:
    """To save a checkpoint, or to give that up and end its ranks."""
    assert local.GRACE_S >= worker.STOP_GRACE_S + worker.SHUTDOWN_TIMEOUT_S + 5


def test_a_second_ctrl_c_does_not_wait(home: Path) -> None:
    p = sweep(1)
    stub = Stub(home, {ids(p)[0]: "stubborn"}, seconds=60)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    killer = when_started(stub, 1, twice)
    start = time.monotonic()
    assert run_plan(p, stub) == 130
    killer.join()
    assert time.monotonic() - start < 20
    wait_until(lambda: stub.processes() == [])


def test_an_error_in_the_launcher_leaves_no_worker(home: Path) -> None:
    p = sweep(2, "launch.max_parallel=2")
    stub = Stub(home, seconds=60)

    def broken(run: Path) -> list[str]:
        if run.name == ids(p)[1]:
            wait_until(lambda: stub.events("start"))
            raise RuntimeError("a bug")
        return stub(run)

    with pytest.raises(RuntimeError, match="a bug"):
        run_plan(p, broken)
    assert stub.processes() == [] and states(home, p) == ["CANCELLED", "PENDING"]


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with local.stop_signal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.number is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_another_process_holds_is_left_alone(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    p, stub = sweep(2), Stub(home)
    freeze(p.valid)
    with RunDirectory(home / "runs" / ids(p)[0]).lock():
        assert run_plan(p, stub) == 0
        assert stub.runs() == [ids(p)[1]]
        assert state(p.points[0], {}) == "running"
    out = capsys.readouterr().out
    assert "1 running (elsewhere, skipped), 1 new." in out and "1 elsewhere, 1 done" in out
    assert "1 run is still being run by another process (seed=0): compare again when it has ended." in out


@pytest.mark.parametrize(("left", "code"), [("DONE", 0), ("FAILED", 1)])
def test_what_became_of_a_run_that_another_process_held(
    home: Path, capsys: pytest.CaptureFixture[str], left: str, code: int
) -> None:
    p, stub = sweep(2, "launch.max_parallel=1"), Stub(home, seconds=0.5)
    freeze(p.valid)
    held = RunDirectory(home / "runs" / ids(p)[0])
    with contextlib.ExitStack() as elsewhere:
        elsewhere.enter_context(held.lock())

        def end() -> None:
            held.update_status(state=left, attempt=1)
            elsewhere.close()

        thread = when_started(stub, 1, end)
        assert run_plan(p, stub) == code
        thread.join()
    out = capsys.readouterr().out
    assert f"1 {left.lower()}, 1 done" in out or "2 done" in out
    assert "still being run" not in out and "1 elsewhere, 1 done" not in out
    assert ("retry: " in out) == bool(code)


def test_two_launchers_at_once_run_no_point_twice(home: Path) -> None:
    p, stub = sweep(6), Stub(home, seconds=0.1)
    context = multiprocessing.get_context("fork")
    launchers = [context.Process(target=lambda: os._exit(run_plan(p, stub))) for _ in range(2)]
    for launcher in launchers:
        launcher.start()
    for launcher in launchers:
        launcher.join(30)
    assert [launcher.exitcode for launcher in launchers] == [0, 0]
    assert sorted(stub.runs()) == sorted(ids(p)) and states(home, p) == ["DONE"] * 6


def test_invalid_points_are_left_out_or_in_strict_mode_fatal(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("sweep.name=s", "batch.size=2,16")
    stub = Stub(home)
    assert run_plan(plan(*arguments, "sweep.strict=true"), stub) == 2
    assert run_plan(plan("sweep.name=s", "batch.size=2,3"), stub) == 2
    assert tree_of(home) == {}
    assert "Nothing was run: sweep.strict=true and a point is invalid." in capsys.readouterr().out
    assert run_plan(plan(*arguments), stub) == 0
    assert len(stub.runs()) == 1 and "invalid: batch.size=2" in capsys.readouterr().out


def test_a_low_screen_shows_what_matters(home: Path) -> None:
    p = sweep(6)
    shown = dict(zip(ids(p), ["done", "done", "failed", "running", "waiting", "waiting"], strict=True))
    seeds = [[point.axes["seed"] for point in choose(p.points, shown, room)] for room in (0, 2, 3, 4, 9)]
    assert seeds == [["3"], ["2", "3"], ["2", "3", "4"], ["2", "3", "4", "5"], list("012345")]
