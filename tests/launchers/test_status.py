"""python -m launchers …: what it says of sweeps, and what it does about them."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from launchers import control, local, logs, manifest, status
from launchers.__main__ import main
from launchers.local import run_plan
from launchers.plan import freeze
from pipeline.store import RunDirectory
from tests.launchers import made_up
from tests.launchers.made_up import Scheduler
from tests.launchers.support import Stub, plan, tree_of, wait_until

Read = pytest.CaptureFixture[str]


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    directory = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return Scheduler(directory)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "POLL_S", (0.05, 0.05))
    monkeypatch.setattr(control, "_POLL_S", 0.05)
    monkeypatch.setattr(control, "STOP_GRACE_S", 5)
    monkeypatch.setattr(control, "_END_S", 5)
    monkeypatch.setattr(logs, "_POLL_S", 0.02)


def call(*arguments: str) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:  # argparse's
        assert isinstance(stop.code, int)
        return stop.code


def told(capsys: Read, *arguments: str, code: int = 0) -> Any:
    """What a command prints with --json."""
    assert call(*arguments, "--json") == code
    return json.loads(capsys.readouterr().out)


EVERY_STATE = {"failed": "f0", "lost": "10", "preempted": "20", "cancelled": "c0", "running": "30", "queued": "40", "new": "50", "done": "d0"}  # fmt: skip


@pytest.fixture
def every(here: Path, slurm: Scheduler) -> dict[str, Path]:
    """A sweep with a run in every state; its directory by state."""
    made_up.sweep(here, "s", {run: {"seed": str(i)} for i, run in enumerate(reversed(EVERY_STATE.values()))})
    slurm.jobs("12_5|RUNNING|None|node7", "13_0|PENDING|Resources|", "99|RUNNING|None|node1")
    slurm.answers("sacct", "echo '12_1|OUT_OF_MEMORY'")
    make = {
        "failed": (
            "FAILED",
            300,
            {"job": "12_0", "error": "rank 1: ValueError: loss is NaN", "exit_code": 1},
        ),
        "lost": ("RUNNING", 100, {"job": "12_1"}),
        "preempted": ("PREEMPTED", 200, {"job": "12_2"}),
        "cancelled": ("CANCELLED", 400, {"job": "12_3", "error": "cancelled"}),
        "running": ("RUNNING", 500, {"job": "12_5", "host": "elsewhere"}),
        "queued": ("PENDING", 0, {"job": "13_0"}),
        "new": ("PENDING", 0, {}),
        "done": ("DONE", 1000, {"job": "12_7"}),
    }
    return {
        state: made_up.run(here, EVERY_STATE[state], kept, tokens, **more)
        for state, (kept, tokens, more) in make.items()
    }


# --- status


def test_status_for_programs(every: dict[str, Path], slurm: Scheduler, capsys: Read) -> None:
    answer = told(capsys, "status", "s", code=1)
    assert (answer["name"], answer["launcher"], answer["problem"]) == ("s", "slurm", None)
    assert answer["states"] == dict.fromkeys(EVERY_STATE, 1)
    runs = {one["run"]: one for one in answer["runs"]}
    assert {run: one["state"] for run, one in runs.items()} == {r: state for state, r in EVERY_STATE.items()}
    assert len(answer["runs"]) == len(runs) == 8
    running = runs["30"]
    assert (running["tokens"], running["budget"], running["loss"], running["batch"]) == (500, 1000, 2.5, 8)
    assert (running["host"], running["tokens_per_s"], running["attempt"]) == ("node7", 480.0, 1)
    assert running["axes"] == {"seed": "3"}
    assert [runs[EVERY_STATE[state]]["tokens_per_s"] for state in ("done", "failed", "queued")] == [None] * 3
    assert len(slurm.asked("squeue")) == 1


def test_labelled_runs_count_samples(here: Path, capsys: Read) -> None:
    made_up.sweep(here, "labelled", {"a0": {"seed": "0"}, "a1": {"seed": "1"}})
    for run in ("a0", "a1"):
        made_up.run(here, run, "DONE", 1000, unit="samples")
    assert call("status", "labelled") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "labelled: 2 done, 100% of 2k samples"
    assert "samples" in lines[1].split() and "tokens" not in lines[1]


def test_the_states_of_the_json_sum_up(every: dict[str, Path], capsys: Read) -> None:
    answer = told(capsys, "status", "s", code=1)
    assert sum(answer["states"].values()) == len(answer["runs"])


def test_trouble_comes_first_with_what_is_known_of_it(every: dict[str, Path], capsys: Read) -> None:
    assert call("status", "s") == 1
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == (
        "s: 1 failed, 1 lost, 1 preempted, 1 cancelled, 1 running, 1 queued, 1 new, 1 done, "
        "31% of 8k tokens, 480 tokens/s"
    )
    rows = {line.split()[0]: line for line in lines[2:10]}
    assert list(rows) == list(EVERY_STATE.values())
    assert rows["f0"].endswith("rank 1: ValueError: loss is NaN")
    assert rows["10"].endswith("job 12_1 ended: OUT_OF_MEMORY")
    assert rows["40"].endswith("Resources")
    assert "node7" in rows["30"] and "50%" in rows["30"] and "2.500" in rows["30"]
    assert "%" not in rows["50"]
    assert "logs: python -m launchers logs f0" in lines
    assert "resume: python -m launchers resume s" in lines


@pytest.mark.parametrize(
    ("states", "code"),
    [(["DONE", "DONE"], 0), (["DONE", "FAILED"], 1), (["RUNNING"], 1), (["CANCELLED", "PENDING"], 0)],
)
def test_the_exit_code_says_whether_a_run_failed_or_was_lost(
    here: Path, states: list[str], code: int
) -> None:
    made_up.sweep(here, "s", {str(i): {"seed": str(i)} for i in range(len(states))}, "local")
    for i, state in enumerate(states):
        made_up.run(here, str(i), state, 100)
    assert call("status", "s") == code


def test_jobs_that_ended_before_their_runs_began_are_told_of(
    here: Path, slurm: Scheduler, capsys: Read
) -> None:
    """As all do where launch.setup names a module that the nodes do not have."""
    made_up.sweep(here, "s", {"a0": {"seed": "0"}, "b0": {"seed": "1"}})
    of_jobs = here / "sweeps/s/slurm/s.1"
    of_jobs.mkdir(parents=True)
    for number, run in enumerate(("a0", "b0")):
        made_up.run(here, run, job=f"12_{number}")
        (of_jobs / f"12_{number}_0_log.out").write_text("module: no such module\n")
    slurm.answers("sacct", "echo '12_0|FAILED'; echo '12_1|FAILED'")
    runs = told(capsys, "status", "s", code=1)["runs"]
    assert {one["state"] for one in runs} == {"new"} and runs[0]["note"] == "job 12_0 ended: FAILED"
    assert call("watch", "s") == 1 and "logs: " in capsys.readouterr().out
    assert call("logs", "s") == 0 and "no such module" in capsys.readouterr().out


def test_a_lost_run_of_a_cluster_without_accounting(
    every: dict[str, Path], slurm: Scheduler, capsys: Read
) -> None:
    slurm.fails("sacct", "Slurm accounting storage is disabled")
    (lost,) = (one for one in told(capsys, "status", "s", code=1)["runs"] if one["state"] == "lost")
    assert lost["note"] == "job 12_1 ended: no longer in the queue"


@pytest.mark.parametrize("reason", ["JobHeldUser", "JobHeldAdmin"])
def test_a_held_job_is_said_to_be_held(
    every: dict[str, Path], slurm: Scheduler, capsys: Read, reason: str
) -> None:
    slurm.jobs(f"13_0|PENDING|{reason}|")
    (queued,) = (one for one in told(capsys, "status", "s", code=1)["runs"] if one["run"] == "40")
    assert queued["state"] == "queued" and queued["note"].startswith("held")


def test_a_scheduler_that_does_not_answer(every: dict[str, Path], slurm: Scheduler, capsys: Read) -> None:
    words = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    slurm.fails("squeue", words)
    answer = told(capsys, "status", "s", code=1)
    states = {one["run"]: one["state"] for one in answer["runs"]}
    assert states["40"] == "queued" and states["30"] == states["10"] == "running"  # as their files say
    assert words in answer["problem"] and "files" in answer["problem"]
    assert call("status", "s") == 1
    assert words in capsys.readouterr().out


def test_a_machine_without_a_scheduler(
    every: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: Read
) -> None:
    monkeypatch.setenv("PATH", made_up.without(["sbatch", "squeue"], os.environ["PATH"]))
    assert "no squeue" in told(capsys, "status", "s", code=1)["problem"]


def test_jobs_that_the_scheduler_has_forgotten(
    every: dict[str, Path], slurm: Scheduler, capsys: Read
) -> None:
    slurm.fails("squeue", "slurm_load_jobs error: Invalid job id specified")
    states = {one["run"]: one["state"] for one in told(capsys, "status", "s", code=1)["runs"]}
    assert states["30"] == "lost" and states["40"] == "new"


def test_warnings_of_the_scheduler_are_no_jobs(
    every: dict[str, Path], slurm: Scheduler, capsys: Read
) -> None:
    slurm.answers("squeue", "echo 'squeue: warning: primary controller is slow, asking the backup' >&2")
    states = {one["run"]: one["state"] for one in told(capsys, "status", "s", code=1)["runs"]}
    assert states["30"] == "lost" and states["40"] == "new"  # the queue is empty


def test_no_scheduler_is_asked_about_runs_without_jobs(here: Path, slurm: Scheduler) -> None:
    made_up.sweep(here, "s", {"a0": {}}, "local")
    made_up.run(here, "a0", "FAILED", 10)
    slurm.fails("squeue", "down")
    assert call("status", "s") == 1
    assert slurm.asked("squeue") == []


def test_no_scheduler_is_asked_about_runs_that_are_done(here: Path, slurm: Scheduler) -> None:
    made_up.sweep(here, "s", {"a0": {}})
    made_up.run(here, "a0", "DONE", 1000, job="12_0")
    slurm.fails("squeue", "down")
    assert call("status", "s") == 0
    assert slurm.asked("squeue") == []


def test_clocks_that_differ_give_no_negative_age(here: Path, capsys: Read) -> None:
    made_up.sweep(here, "s", {"a0": {}}, "local")
    made_up.run(here, "a0", "DONE", 10, updated=time.time() + 3600)
    assert told(capsys, "status", "s")["runs"][0]["age_s"] == 0


def test_a_run_that_writes_nothing_is_said_to_be_silent(here: Path, slurm: Scheduler, capsys: Read) -> None:
    made_up.sweep(here, "s", {"a0": {}, "b0": {}})
    slurm.jobs("1|RUNNING|None|n1", "2|RUNNING|None|n1")
    made_up.run(here, "a0", "RUNNING", 10, job="1", updated=time.time() - 3000)
    made_up.run(here, "b0", "RUNNING", 10, job="2")
    notes = {one["run"]: one["note"] for one in told(capsys, "status", "s")["runs"]}
    assert notes == {"a0": "silent", "b0": ""}


def test_a_new_attempt_does_not_boast_with_the_numbers_of_the_last(
    here: Path, slurm: Scheduler, capsys: Read
) -> None:
    made_up.sweep(here, "s", {"a0": {}})
    slurm.jobs("1|RUNNING|None|n1")
    directory = made_up.run(here, "a0", "RUNNING", 900, job="1")
    made_up.change_status(directory, attempt=2)
    (one,) = told(capsys, "status", "s")["runs"]
    assert (one["tokens"], one["loss"], one["tokens_per_s"]) == (0, None, None)


def test_a_run_whose_directory_is_gone(here: Path, capsys: Read) -> None:
    made_up.sweep(here, "s", {"a0": {"seed": "0"}, "b0": {"seed": "1"}}, "local")
    made_up.run(here, "a0", "DONE", 1000)
    answer = told(capsys, "status", "s")
    (gone,) = (one for one in answer["runs"] if one["run"] == "b0")
    assert gone["state"] == "new" and "deleted" in gone["note"]
    assert call("cancel", "s", "--yes") == 0
    assert not (here / "runs" / "b0").exists()


def test_a_job_that_ends_while_the_queue_is_asked(here: Path, slurm: Scheduler, capsys: Read) -> None:
    """Its status was read before: RUNNING and gone would be lost."""
    made_up.sweep(here, "s", {"a0": {}})
    directory = made_up.run(here, "a0", "RUNNING", 500, job="1")
    after = directory / "after.json"
    after.write_text(json.dumps(made_up.status(directory) | {"state": "DONE"}))
    slurm.answers("squeue", f"cp '{after}' '{directory}/status.json'")
    assert told(capsys, "status", "s")["states"] == {"done": 1}


# --- which sweep, which runs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status", "demoo"], ["demoo: neither a sweep nor a run in", "Did you mean demo?"]),
        (["logs", "zzz"], ["zzz: neither a sweep nor a run in", "python -m launchers ls"]),
        (["status", ""], ["neither a sweep nor a run"]),
        (["status", "/nowhere/run"], ["neither a sweep nor a run"]),
        (["status", "demo/manifest.json"], ["neither a sweep nor a run"]),
        (["status", "**"], ["neither a sweep nor a run"]),
        (["status", "ab"], ["ab: matches 2 runs"]),
        (["status", "demo", "--only", "sead=1"], ["What varies in demo: seed, batch", "Did you mean seed?"]),
        (["status", "demo", "--only", "seed"], ["not of the form axis=value"]),
        (
            ["status", "demo", "--only", "seed=7"],
            ["no run of demo is such", "seed=0,1", "batch=[8,16],norm_test"],
        ),
        (["status", "ab1", "--only", "seed=1"], ["What varies in ab1: nothing"]),
        (["status", "demo", "--fast"], ["--fast: not understood"]),
        (["resume", "demo", "seed=3"], ["seed=3: only launch.* can change"]),
        (["resume", "demo", "parallel=ddp"], ["parallel=ddp: only launch.* can change"]),
        (["statsu", "demo"], ["statsu"]),
        (["logs", "demo", "--rank", "x"], ["invalid int value: 'x'"]),
    ],
)
def test_a_wrong_request_is_explained(
    here: Path, capsys: Read, arguments: list[str], words: list[str]
) -> None:
    made_up.sweep(here, "demo", {"ab1": {"seed": "0", "batch": "norm_test"}, "ab2": {"seed": "1", "batch": "[8,16]"}}, "local")  # fmt: skip
    for run in ("ab1", "ab2"):
        made_up.run(here, run, "DONE", 1000)
    before = tree_of(here)
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and all(word in err for word in words), err
    assert "Traceback" not in err and tree_of(here) == before


@pytest.mark.parametrize("name", ["c0ffee", "c0", "{home}/runs/c0ffee"])
def test_a_run_by_its_id_a_beginning_of_it_or_its_path(here: Path, capsys: Read, name: str) -> None:
    made_up.run(here, "c0ffee", "DONE", 1000)
    made_up.run(here, "dec0de", "DONE", 1000)
    answer = told(capsys, "status", name.format(home=here))
    assert [one["run"] for one in answer["runs"]] == ["c0ffee"]


@pytest.mark.parametrize(
    ("only", "runs"),
    [
        (["seed=0"], {"00", "01"}),
        (["seed=0,2"], {"00", "01", "20", "21"}),
        (["seed=0,2", "sizes=[8,16]"], {"01", "21"}),
        (["sizes=8"], {"00", "10", "20"}),
    ],
)
def test_only_some_runs(here: Path, capsys: Read, only: list[str], runs: set[str]) -> None:
    points = {f"{i}{j}": {"seed": str(i), "sizes": value} for i in range(3) for j, value in enumerate(["8", "[8,16]"])}  # fmt: skip
    made_up.sweep(here, "s", points, "local")
    for run in points:
        made_up.run(here, run, "DONE", 1000)
    arguments = [word for condition in only for word in ("--only", condition)]
    assert {one["run"] for one in told(capsys, "status", "s", *arguments)["runs"]} == runs


# --- ls


def test_all_sweeps(every: dict[str, Path], here: Path, slurm: Scheduler, capsys: Read) -> None:
    made_up.sweep(here, "other", {"a0": {}}, "local")
    made_up.run(here, "a0", "DONE", 1000)
    found = {one["sweep"]: one for one in told(capsys, "ls")}
    assert found["s"]["states"] == dict.fromkeys(EVERY_STATE, 1) and found["s"]["runs"] == 8
    assert (found["other"]["launcher"], found["other"]["states"]) == ("local", {"done": 1})
    assert call("ls") == 0
    out = capsys.readouterr().out
    assert re.search(r"^other +\d{4}-\d\d-\d\d \d\d:\d\d +local +1 +100% +1 done$", out, re.M)


def test_no_sweeps(here: Path, capsys: Read) -> None:
    assert told(capsys, "ls") == []
    assert call("ls") == 0
    assert "No sweep in" in capsys.readouterr().out


def test_all_sweeps_are_asked_about_at_once(here: Path, slurm: Scheduler, capsys: Read) -> None:
    for i in range(3):
        made_up.sweep(here, f"s{i}", {f"a{i}": {}})
        made_up.run(here, f"a{i}", "RUNNING", 10, job=f"{i + 7}_0")
    slurm.jobs("7_0|RUNNING|None|n", "8_0|PENDING|Priority|")
    states = {one["sweep"]: one["states"] for one in told(capsys, "ls")}
    assert states == {"s0": {"running": 1}, "s1": {"queued": 1}, "s2": {"lost": 1}}
    assert len(slurm.asked("squeue")) == 1


def test_all_sweeps_while_the_scheduler_is_down(
    every: dict[str, Path], slurm: Scheduler, capsys: Read
) -> None:
    slurm.fails("squeue", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    assert call("ls") == 0
    out = capsys.readouterr().out
    assert "Unable to contact slurm controller" in out


# --- many runs


def test_a_thousand_runs_cost_one_question_and_no_config(
    here: Path, slurm: Scheduler, capsys: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = {f"{i:010x}": {"seed": str(i)} for i in range(1000)}
    made_up.sweep(here, "s", points)
    for i, run in enumerate(points):
        made_up.run(here, run, "RUNNING" if i < 400 else "PENDING", 10 if i < 400 else 0, job=f"12_{i}")
    slurm.jobs(*(f"12_{i}|{'RUNNING|None|n' if i < 400 else 'PENDING|Resources|'}" for i in range(1000)))
    read: list[Path] = []
    monkeypatch.setattr(RunDirectory, "config", lambda run: read.append(run.path))
    before = time.process_time()
    answer = told(capsys, "status", "s")
    spent = time.process_time() - before
    assert answer["states"] == {"running": 400, "queued": 600}
    assert len(slurm.asked("squeue")) == 1 and slurm.asked("sacct") == [] and read == []
    assert spent < 10  # a quarter of a second where nobody else is at work


# --- watch


def test_watching_ends_when_nothing_runs_or_waits(here: Path, slurm: Scheduler, capsys: Read) -> None:
    made_up.sweep(here, "s", {"a0": {"seed": "0"}, "b0": {"seed": "1"}})
    first = made_up.run(here, "a0", "RUNNING", 500, job="1")
    second = made_up.run(here, "b0", "PENDING", job="2")
    slurm.jobs("1|RUNNING|None|n", "2|PENDING|Resources|")

    def finish() -> None:
        wait_until(lambda: len(slurm.asked("squeue")) >= 2)
        slurm.jobs("2|RUNNING|None|n")
        made_up.change_status(first, state="DONE")
        seen = len(slurm.asked("squeue"))
        wait_until(lambda: len(slurm.asked("squeue")) >= seen + 2)
        made_up.change_status(second, state="FAILED", error="out of luck")
        slurm.jobs()

    thread = threading.Thread(target=finish)
    thread.start()
    assert call("watch", "s", "--json") == 1
    thread.join()
    lines = [json.loads(line)["states"] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"running": 1, "queued": 1} and lines[-1] == {"failed": 1, "done": 1}
    assert {"running": 1, "done": 1} in lines


def test_watching_does_not_end_between_two_runs_of_a_sweep_here(
    here: Path, capsys: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has ended, and the process of the next has not come to its run yet."""
    monkeypatch.setattr(status, "POLL_S", (0.5, 0.5))
    made_up.sweep(here, "s", {"a0": {"seed": "0"}, "b0": {"seed": "1"}}, "local")
    made_up.run(here, "a0", "DONE", 1000)
    second = made_up.run(here, "b0")

    def start() -> None:
        time.sleep(0.25)
        with RunDirectory(second).lock():
            made_up.change_status(second, state="RUNNING")
            time.sleep(1)
            made_up.change_status(second, state="DONE")

    thread = threading.Thread(target=start)
    thread.start()
    assert call("watch", "s", "--json") == 0
    thread.join()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["states"] == {"done": 2}


def test_watching_outlasts_a_job_that_queues_itself_again(here: Path, slurm: Scheduler, capsys: Read) -> None:
    made_up.sweep(here, "s", {"a0": {}})
    directory = made_up.run(here, "a0", "PREEMPTED", 500, job="1")
    slurm.jobs("1|COMPLETING|None|n")

    def finish() -> None:
        wait_until(lambda: len(slurm.asked("squeue")) >= 3)
        made_up.change_status(directory, state="DONE")
        slurm.jobs()

    thread = threading.Thread(target=finish)
    thread.start()
    assert call("watch", "s") == 0
    thread.join()
    assert capsys.readouterr().out.splitlines()[-1] == "compare: python -m analysis s"


# --- logs


def log(directory: Path, name: str, text: str) -> Path:
    file = directory / "logs" / name
    file.write_text(text)
    return file


def test_a_run_without_a_log_is_told_of_to_programs_too(every: dict[str, Path], capsys: Read) -> None:
    log(every["failed"], "attempt-1.rank-0.log", "I am failed\n")
    answer = {one["run"]: one for one in told(capsys, "logs", "s")}
    assert answer["f0"]["text"] == "I am failed\n"
    assert answer["10"]["path"] is answer["10"]["text"] is None


TRACEBACK = "Traceback (most recent call last):\n  line 7\nValueError: loss is NaN\n"


@pytest.fixture
def failed(here: Path) -> Path:
    """A run of two attempts on two ranks."""
    directory = made_up.run(here, "c0ffee", "FAILED", 500, attempt=2, error="rank 1: ValueError: loss is NaN")
    log(directory, "attempt-1.rank-0.log", "first attempt\n" + TRACEBACK)
    log(directory, "attempt-2.rank-0.log", "only noticed\n")
    log(directory, "attempt-2.rank-1.log", "step 7\n" + TRACEBACK)
    log(directory, "launcher.log", "around\n")
    return directory


@pytest.mark.parametrize(
    ("options", "file"),
    [
        ([], "attempt-2.rank-1.log"),
        (["--rank", "0"], "attempt-2.rank-0.log"),
        (["--attempt", "1"], "attempt-1.rank-0.log"),
        (["--attempt", "2", "--rank", "1"], "attempt-2.rank-1.log"),
    ],
)
def test_the_log_that_tells_most(failed: Path, capsys: Read, options: list[str], file: str) -> None:
    (one,) = told(capsys, "logs", "c0ffee", *options)
    assert one["path"] == str(failed / "logs" / file)
    assert one["text"] == (failed / "logs" / file).read_text() and one["run"] == "c0ffee"
    assert call("logs", "c0", *options) == 0
    out = capsys.readouterr().out
    assert f"runs/c0ffee/logs/{file}" in out and (failed / "logs" / file).read_text().strip() in out
    assert "c0ffee failed" in out and "  rank 1: ValueError: loss is NaN" in out


@pytest.mark.parametrize("options", [["--rank", "5"], ["--attempt", "3"], ["--attempt", "1", "--rank", "1"]])
def test_a_log_that_is_missing_names_those_there_are(failed: Path, capsys: Read, options: list[str]) -> None:
    assert call("logs", "c0ffee", *options) == 2
    err = capsys.readouterr().err
    assert "There are: attempt 1 rank 0, attempt 2 rank 0, attempt 2 rank 1" in err and "Traceback" not in err


def test_a_run_that_never_started(here: Path, capsys: Read) -> None:
    made_up.run(here, "c0ffee")
    assert call("logs", "c0ffee") == 2
    assert "There are: none yet" in capsys.readouterr().err


def test_the_output_around_ranks_that_printed_nothing(here: Path, slurm: Scheduler, capsys: Read) -> None:
    directory = made_up.run(here, "c0ffee", "FAILED", error="the worker was killed by SIGKILL")
    around = log(directory, "launcher.log", "ImportError: no torch\n")
    assert told(capsys, "logs", "c0ffee")[0]["path"] == str(around)
    made_up.change_status(directory, job="12_3")
    job = here / "sweeps" / "s" / "slurm" / "s.abc" / "12_3_0_log.out"
    job.parent.mkdir(parents=True)
    job.write_text("srun: error\n")
    assert told(capsys, "logs", "c0ffee")[0]["path"] == str(job)


def test_the_logs_of_a_sweep_are_those_of_its_failures(every: dict[str, Path], capsys: Read) -> None:
    for state, directory in every.items():
        log(directory, "attempt-1.rank-0.log", f"I am {state}\n")
    assert call("logs", "s") == 0
    assert re.findall("I am (.*)", capsys.readouterr().out) == ["failed", "lost"]
    assert [one["run"] for one in told(capsys, "logs", "s")] == ["f0", "10"]
    assert call("logs", "-f", "s") == 2
    assert "-f: follows one run" in capsys.readouterr().err


def test_a_failed_run_without_a_log_does_not_hide_the_others(every: dict[str, Path], capsys: Read) -> None:
    log(every["lost"], "attempt-1.rank-0.log", "I am lost\n")
    assert call("logs", "s") == 0
    out = capsys.readouterr().out
    assert "I am lost" in out and "There are: none yet" in out


def test_the_logs_of_a_sweep_without_failures(here: Path, capsys: Read) -> None:
    made_up.sweep(here, "s", {"a0": {}, "b0": {}}, "local")
    for run in ("a0", "b0"):
        made_up.run(here, run, "DONE", 1000)
    assert told(capsys, "logs", "s") == []
    assert call("logs", "s") == 0
    assert "No run of s failed" in capsys.readouterr().out


def test_following_prints_what_is_added_and_ends_with_the_run(
    here: Path, slurm: Scheduler, capsys: Read
) -> None:
    directory = made_up.run(here, "c0ffee", "RUNNING", 10, job="7")
    slurm.jobs("7|RUNNING|None|n")
    file = log(directory, "attempt-1.rank-0.log", "begin\n")

    def go_on() -> None:
        wait_until(lambda: len(slurm.asked("squeue")) >= 2)
        with open(file, "a") as end:
            end.write("middle ")
            end.flush()
            time.sleep(0.1)
            end.write("of the line\n")
        made_up.change_status(directory, state="PREEMPTED")
        slurm.jobs("7|PENDING|BeginTime|")
        time.sleep(0.1)
        log(directory, "attempt-2.rank-0.log", "second attempt\n")
        made_up.change_status(directory, state="DONE", attempt=2)

    thread = threading.Thread(target=go_on)
    thread.start()
    assert call("logs", "-f", "c0ffee") == 0
    thread.join()
    out = capsys.readouterr().out
    assert out.endswith("begin\nmiddle of the line\n— attempt 2\nsecond attempt\n")


def test_following_does_not_lose_a_runs_last_words(here: Path, slurm: Scheduler, capsys: Read) -> None:
    """Written after the log was read and before the scheduler said that the job is over."""
    directory = made_up.run(here, "c0ffee", "RUNNING", 10, job="7")
    file = log(directory, "attempt-1.rank-0.log", "begin\n")
    end = f"sed -i s/RUNNING/FAILED/ {directory}/status.json; echo 'last words' >> {file}"
    asked = f"echo >> {directory}/asked; case $(wc -l < {directory}/asked) in"
    slurm.answers("squeue", f"{asked} 1) echo '7|RUNNING|None|n';; 2) {end};; esac")
    assert call("logs", "-f", "c0ffee") == 0
    assert capsys.readouterr().out.count("last words") == 1


# --- cancel


@pytest.fixture
def stopping(every: dict[str, Path]) -> Iterator[list[str]]:
    """The running run does what it is asked to; what it read."""
    read: list[str] = []
    over = threading.Event()

    def obey() -> None:
        stop = every["running"] / "stop"
        while not over.wait(0.02):
            if stop.exists() and stop.read_text():
                read.append(stop.read_text())
                made_up.change_status(every["running"], state="CANCELLED", error="stopped")
                return

    thread = threading.Thread(target=obey)
    thread.start()
    yield read
    over.set()
    thread.join()


def states(every: dict[str, Path]) -> dict[str, str]:
    return {state: made_up.status(directory)["state"] for state, directory in every.items()}


UNTOUCHED = {"failed": "FAILED", "lost": "RUNNING", "preempted": "PREEMPTED", "cancelled": "CANCELLED", "done": "DONE"}  # fmt: skip


def test_cancelling_ends_what_waits_and_asks_what_runs_to_stop(
    every: dict[str, Path], stopping: list[str], slurm: Scheduler, capsys: Read
) -> None:
    assert call("cancel", "s", "--yes") == 0
    assert stopping == ["CANCELLED"]
    assert slurm.asked("scancel") == [["13_0"]]  # what runs ends by itself, with a checkpoint
    assert states(every) == UNTOUCHED | {"running": "CANCELLED", "queued": "CANCELLED", "new": "CANCELLED"}
    assert not (every["running"] / "stop").exists()  # or the next attempt would stop at once
    out = capsys.readouterr().out
    assert "3 cancelled." in out and out.splitlines()[-1] == "resume: python -m launchers resume s"


def test_what_was_cancelled_for_programs(every: dict[str, Path], stopping: list[str], capsys: Read) -> None:
    answer = told(capsys, "cancel", "s", "--yes")
    assert answer["still_running"] == [] and set(answer["cancelled"]) == {"30", "40", "50"}


def test_cancelling_only_what_waits(every: dict[str, Path], slurm: Scheduler) -> None:
    assert call("cancel", "s", "--pending", "--yes") == 0
    assert slurm.asked("scancel") == [["13_0"]]
    assert states(every) == UNTOUCHED | {"running": "RUNNING", "queued": "CANCELLED", "new": "CANCELLED"}
    assert not (every["running"] / "stop").exists()


def test_cancelling_at_once(every: dict[str, Path], slurm: Scheduler) -> None:
    assert call("cancel", "s", "--now", "--yes") == 0
    assert sorted(slurm.asked("scancel")) == [["12_5"], ["13_0"]]
    assert states(every) == UNTOUCHED | {"running": "CANCELLED", "queued": "CANCELLED", "new": "CANCELLED"}


def test_cancelling_at_once_what_has_no_job_of_its_own(here: Path) -> None:
    """A run on this machine: no scheduler ends it, so it is asked to stop."""
    directory = made_up.run(here, "c0ffee", "RUNNING", 10)

    def obey() -> None:
        with RunDirectory(directory).lock():
            wait_until(lambda: (directory / "stop").exists())
            made_up.change_status(directory, state="CANCELLED", error="stopped")

    thread = threading.Thread(target=obey)
    thread.start()
    wait_until(RunDirectory(directory).is_locked)
    assert call("cancel", "c0ffee", "--now", "--yes") == 0
    thread.join()


def test_a_run_that_does_not_stop_in_time_loses_its_job(
    every: dict[str, Path], slurm: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "STOP_GRACE_S", 0.2)
    assert call("cancel", "s", "--yes") == 0
    assert slurm.asked("scancel") == [["13_0"], ["12_5"]]
    assert states(every)["running"] == "CANCELLED"


def test_a_run_that_cannot_be_ended_is_said_to_run_on(
    every: dict[str, Path], slurm: Scheduler, monkeypatch: pytest.MonkeyPatch, capsys: Read
) -> None:
    monkeypatch.setattr(control, "STOP_GRACE_S", 0.2)
    monkeypatch.setattr(control, "_END_S", 0.2)
    slurm.answers("scancel", "true")
    answer = told(capsys, "cancel", "s", "--yes", code=1)
    assert answer["still_running"] == ["30"] and "30" not in answer["cancelled"]
    assert states(every)["running"] == "RUNNING"


def test_a_preempted_run_is_cancelled_before_its_job_starts_again(here: Path, slurm: Scheduler) -> None:
    directory = made_up.run(here, "c0ffee", "PREEMPTED", 10, job="7")
    slurm.jobs("7|COMPLETING|None|n")
    assert call("cancel", "c0ffee", "--yes") == 0
    assert slurm.asked("scancel") == [["7"]] and made_up.status(directory)["state"] == "CANCELLED"


def test_cancelling_some_runs(every: dict[str, Path], slurm: Scheduler) -> None:
    assert call("cancel", "s", "--only", "seed=1", "--yes") == 0  # the new one
    assert slurm.asked("scancel") == []
    assert states(every) == UNTOUCHED | {"running": "RUNNING", "queued": "PENDING", "new": "CANCELLED"}


@pytest.mark.parametrize("name", ["a0", "other"])
def test_runs_that_share_the_job_of_a_cancelled_one_keep_it(here: Path, slurm: Scheduler, name: str) -> None:
    """Also where the run is named alone, or as part of another sweep than the job's."""
    made_up.sweep(here, "s", {"a0": {}, "b0": {}})
    made_up.sweep(here, "other", {"a0": {}})
    file = here / "sweeps/s/manifest.json"
    job = {"name": "s.1", "kind": "runs", "runs": [["a0", "b0"]], "ids": ["7"], "released": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"jobs": [job]}))
    runs = [made_up.run(here, run, job="7") for run in ("a0", "b0")]
    slurm.jobs("7|PENDING|Resources|")
    assert call("cancel", name, "--yes") == 0
    assert slurm.asked("scancel") == []
    assert [made_up.status(run)["state"] for run in runs] == ["CANCELLED", "PENDING"]


def test_what_is_printed_for_programs_is_nothing_else(here: Path, capsys: Read) -> None:
    """Also when another submission must be waited for."""
    made_up.sweep(here, "s", {"a0": {}}, "local")
    made_up.run(here, "a0")
    held = threading.Event()

    def submit() -> None:
        with manifest.only_submitter():
            held.set()
            time.sleep(0.5)

    thread = threading.Thread(target=submit)
    thread.start()
    held.wait()
    assert told(capsys, "cancel", "s", "--yes")["cancelled"] == ["a0"]
    thread.join()


def test_nobody_to_confirm(
    every: dict[str, Path], here: Path, capsys: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    before = tree_of(here)
    assert call("cancel", "s") == 2
    err = capsys.readouterr().err
    assert "1 running, 1 queued, 1 new" in err and "--yes" in err
    assert tree_of(here) == before


@pytest.mark.parametrize(("answer", "code"), [("", 3), ("n", 3), ("nonsense", 3), ("y", 0), ("YES", 0)])
def test_asking_first(
    every: dict[str, Path], stopping: list[str], monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    questions: list[str] = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(Console, "input", lambda _, question: questions.append(question) or answer)
    assert call("cancel", "s") == code
    assert questions == ["Cancel 1 running, 1 queued, 1 new of s? [y/N] "]
    assert states(every)["queued"] == ("PENDING" if code else "CANCELLED")


def test_nothing_to_cancel(here: Path, capsys: Read) -> None:
    made_up.sweep(here, "s", {"a0": {}}, "local")
    made_up.run(here, "a0", "DONE", 1000)
    assert call("cancel", "s") == 0  # nor anything to confirm
    assert "Nothing waits or runs." in capsys.readouterr().out


def test_a_run_that_was_done_sooner_is_not_called_cancelled(
    every: dict[str, Path], slurm: Scheduler, capsys: Read
) -> None:
    done = f"sed -i s/RUNNING/DONE/ {every['running']}/status.json"
    slurm.answers("scancel", done)  # meanwhile
    answer = told(capsys, "cancel", "s", "--yes")
    assert states(every)["running"] == "DONE" and "30" not in answer["cancelled"]


def test_nothing_is_cancelled_while_the_scheduler_does_not_answer(
    every: dict[str, Path], here: Path, slurm: Scheduler, capsys: Read
) -> None:
    slurm.fails("squeue", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    before = tree_of(here)
    assert call("cancel", "s", "--yes") == 2
    assert "Unable to contact slurm controller" in capsys.readouterr().err
    assert tree_of(here) == before


# --- resume


@pytest.fixture
def stub(here: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """In place of the workers that a command starts."""
    stub = Stub(here)
    monkeypatch.setattr(local, "run_plan", lambda plan, known=False: run_plan(plan, stub, known))
    return stub


def flat(tree: object, key: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {key: tree}
    return {k: v for name, each in tree.items() for k, v in flat(each, f"{key}.{name}".lstrip(".")).items()}


def frozen(directory: Path) -> dict[str, object]:
    return flat(yaml.safe_load((directory / "config.yaml").read_text()))


def kept_points(here: Path) -> tuple[object, ...]:
    manifest = json.loads((here / "sweeps" / "s" / "manifest.json").read_text())
    return tuple(manifest[key] for key in ("points", "command", "axes", "common", "created", "launcher"))


def test_resuming_runs_what_is_missing_and_leaves_the_manifest_alone(
    here: Path, stub: Stub, capsys: Read
) -> None:
    p = plan("sweep.name=s", "seed=range(4)", "launch.max_parallel=2")
    ids = [point.run or "" for point in p.points]
    stub.behaviour = {ids[1]: "fail", ids[2]: "die"}
    assert run_plan(p, stub) == 1
    stub.behaviour = {}
    made_up.change_status(here / "runs" / ids[3], state="PREEMPTED")
    before, ran = kept_points(here), len(stub.runs())
    assert call("resume", "s") == 0
    assert sorted(stub.runs()[ran:]) == sorted(ids[1:]) and kept_points(here) == before
    assert {path.name for path in (here / "runs").iterdir()} == set(ids)
    capsys.readouterr()
    assert call("resume", "s") == 0
    assert len(stub.runs()) == ran + 3 and "4 done (skipped)." in capsys.readouterr().out


def test_resuming_some_runs(here: Path, stub: Stub) -> None:
    p = plan("sweep.name=s", "seed=range(3)")
    freeze(p.valid)
    made_up.sweep(here, "s", {point.run or "": point.axes for point in p.points}, "local")
    assert call("resume", "s", "--only", "seed=1") == 0
    assert stub.runs() == [p.points[1].run]


def test_a_change_on_resuming_changes_that_and_nothing_else(here: Path, stub: Stub) -> None:
    p = plan("sweep.name=s", "seed=0,1", "batch=norm_test", "launch.minutes=60")
    freeze(p.valid)
    made_up.sweep(here, "s", {point.run or "": point.axes for point in p.points}, "local")
    directories = [point.directory.path for point in p.points]
    before = [frozen(directory) for directory in directories]
    assert call("resume", "s", "launch.minutes=90", "launch.setup=[a, b]") == 0
    assert sorted(stub.runs()) == sorted(point.run or "" for point in p.points)
    for directory, old in zip(directories, before, strict=True):
        assert frozen(directory) == old | {"launch.minutes": 90, "launch.setup": ["a", "b"]}
    assert set((here / "runs").iterdir()) == set(directories)


def test_resuming_a_run_alone(here: Path, stub: Stub) -> None:
    p = plan("sweep.name=s", "seed=0,1")
    freeze(p.valid)
    run = p.points[1].run or ""
    assert call("resume", run[:6]) == 0
    assert stub.runs() == [run]


def test_a_run_alone_goes_on_where_its_sweep_does(
    here: Path, stub: Stub, slurm: Scheduler, capsys: Read
) -> None:
    p = plan("sweep.name=s", "seed=0,1", "launch.device=cpu")
    freeze(p.valid)
    run = p.points[1].run or ""
    made_up.sweep(here, "s", {point.run or "": point.axes for point in p.points}, "slurm")
    assert call("resume", run) == 2  # as sbatch answers here
    assert "nothing is submitted here" in capsys.readouterr().err
    assert stub.runs() == [] and slurm.asked("sbatch") == [["--test-only"]]


def test_a_run_of_no_sweep_cannot_be_resumed_on_a_cluster(
    here: Path, stub: Stub, slurm: Scheduler, capsys: Read
) -> None:
    p = plan("sweep.name=s", "seed=0")
    freeze(p.valid)
    assert call("resume", p.points[0].run or "", "--launcher", "slurm") == 2
    assert "belongs to no sweep" in capsys.readouterr().err
    assert slurm.asked("sbatch") == [] and stub.runs() == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("launch.minuets=5", "launch.minuets: no such setting. Did you mean launch.minutes?"),
        ("launch.minutes=soon", "launch.minutes=soon: a whole number is needed"),
        ("launch.minutes=2", "launch.warning_s=120: takes more than half of launch.minutes=2"),
        ("launch.nodes=3", "1 ranks cannot be spread equally over launch.nodes=3"),
        ("launch.pack=-1", "launch.pack=-1: must be above 0"),
    ],
)
def test_a_wrong_change_is_refused(here: Path, stub: Stub, capsys: Read, change: str, words: str) -> None:
    p = plan("sweep.name=s", "seed=0", "launch.minutes=60", "launch.warning_s=120")
    freeze(p.valid)
    before = tree_of(here)
    assert call("resume", p.points[0].run or "", change) == 2
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err
    assert tree_of(here) == before and stub.runs() == []


def test_what_fails_again_says_how_to_resume_again(
    here: Path, stub: Stub, capsys: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = plan("sweep.name=s", "seed=0,1")
    freeze(p.valid)
    made_up.sweep(here, "s", {point.run or "": point.axes for point in p.points}, "local")
    stub.behaviour = {p.points[0].run or "": "fail"}
    arguments = ["resume", "s", "launch.minutes=90"]
    monkeypatch.setattr(sys, "argv", [f"{Path(control.__file__).parent}/__main__.py", *arguments])
    assert call(*arguments) == 1
    assert "retry: python -m launchers resume s launch.minutes=90" in capsys.readouterr().out.splitlines()


def test_resuming_on_a_machine_without_a_cluster(
    every: dict[str, Path], here: Path, capsys: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = plan("sweep.name=t", "seed=0,1")
    freeze(p.valid)
    made_up.sweep(here, "t", {point.run or "": point.axes for point in p.points})
    monkeypatch.setenv("PATH", made_up.without(["sbatch"], os.environ["PATH"]))
    assert call("resume", "t") == 2
    assert "there is no sbatch on" in capsys.readouterr().err


def test_a_sweep_with_a_run_whose_directory_is_gone_is_not_resumed(
    here: Path, stub: Stub, capsys: Read
) -> None:
    made_up.sweep(here, "s", {"a0": {}}, "local")
    assert call("resume", "s") == 2
    err = capsys.readouterr().err
    assert "a0" in err and "begins again with python -m pipeline -m seed=0" in err
