"""The tasks of a job, as srun would start them, without SLURM: variables set by hand, signals by hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launchers.job import fate, first_error
from pipeline.config import Config
from pipeline.store import RunDirectory
from tests.launchers.made_up import Scheduler
from tests.launchers.support import wait_until
from tests.support import config

SMALL = [
    "model=tiny", "data.sequence_length=32", "data.micro_batch=2", "batch.size=8", "lr.warmup_tokens=1k",
    "eval.sequences=8", "launch.device=cpu", "launch.cpus_per_task=1", "launch.minutes=10", "launch.warning_s=120",
]  # fmt: skip
SHORT, LONG = "budget.tokens=4k", "budget.tokens=2M"
JOB = "70_2"

TASK = """
import signal, sys
from launchers.job import RunJob
def queue_again(number, frame):
    print("queued again", flush=True)
    sys.exit(255)
signal.signal(signal.SIGUSR2, queue_again)  # stands in for submitit's
RunJob(sys.argv[1:])()
"""


class Job:
    """The tasks of one job on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tasks: list[subprocess.Popen[str]] = []

    def start(self, runs: list[RunDirectory], tasks: int, restarts: int = 0) -> None:
        variables = {
            "SUBMITIT_EXECUTOR": "slurm",
            "SUBMITIT_FOLDER": str(self.folder),
            "SLURM_JOB_ID": "72",
            "SLURM_ARRAY_JOB_ID": "70",
            "SLURM_ARRAY_TASK_ID": "2",
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_NTASKS": str(tasks),
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_NODEID": "0",
            "SLURM_RESTART_COUNT": str(restarts),
        }
        self.tasks = [
            subprocess.Popen(
                [sys.executable, "-c", TASK, *(str(run.path) for run in runs)],
                env={**os.environ, **variables, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(tasks)
        ]

    def signal(self, number: int) -> None:
        """As SLURM does: every process of the job."""
        for task in self.tasks:
            for pid in (task.pid, *children(task.pid)):
                os.kill(pid, number)

    def wait(self, timeout_s: float = 90) -> tuple[list[int], str]:
        """Exit codes, and what the tasks printed."""
        printed = [task.communicate(timeout=timeout_s)[0] for task in self.tasks]
        return [task.returncode for task in self.tasks], "\n".join(printed)


@pytest.fixture
def job(home: Path) -> Iterator[Job]:
    job = Job(home / "job")
    yield job
    for task in job.tasks:
        task.kill()
        task.wait()


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    directory = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return Scheduler(directory)


Frozen = Callable[..., RunDirectory]


@pytest.fixture
def frozen(home: Path, small_corpus: list[str]) -> Frozen:
    def freeze(*overrides: str) -> RunDirectory:
        composed: Config = config(*small_corpus, *SMALL, *overrides)
        run = RunDirectory.of(composed)
        run.freeze(composed)
        run.update_status(job=JOB)
        return run

    return freeze


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(task: subprocess.Popen[str]) -> int:
    (child,) = children(task.pid)
    return child


def steps(run: RunDirectory) -> int:
    row = run.last_row()
    return row["step"] if row else 0


def under_way(run: RunDirectory) -> None:
    wait_until(lambda: steps(run) > 5, 60)


def ended(run: RunDirectory) -> tuple[str, int, str]:
    """State, attempts and error, read without the project's code."""
    told = json.loads((run.path / "status.json").read_text())
    return told["state"], told["attempt"], told["error"] or ""


# --- training


@pytest.mark.slow
def test_wandbs_files_lie_side_by_side_in_the_sweep(job: Job, frozen: Frozen, home: Path) -> None:
    run = frozen(SHORT, "sweep.name=s")
    written = run.path / "wandb" / "offline-run-20260101_000000-x"
    written.mkdir(parents=True)
    job.start([run], 1)
    job.wait()
    (link,) = (home / "sweeps" / "s" / "wandb").iterdir()
    assert link.resolve() == written


def test_one_task_trains_a_run_and_then_finds_it_done(job: Job, frozen: Frozen) -> None:
    run = frozen(SHORT)
    job.start([run], 1)
    codes, printed = job.wait()
    assert codes == [0], printed
    assert ended(run) == ("DONE", 1, "")
    status = run.status()
    assert status and (status.job, status.tokens_seen) == (JOB, run.config().budget_tokens)
    recorded = json.loads((run.logs / "attempt-1.environment.json").read_text())
    assert recorded["slurm"]["SLURM_JOB_ID"] == "72"

    before = {path: path.stat().st_mtime_ns for path in (run.status_file, run.metrics_file)}
    job.start([run], 1, restarts=1)
    codes, printed = job.wait()
    assert codes == [0] and f"run {run.id} is done" in printed
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_two_tasks_train_together(job: Job, frozen: Frozen) -> None:
    run = frozen(SHORT, "parallel=ddp")
    job.start([run], 2)
    codes, printed = job.wait()
    assert codes == [0, 0], printed
    assert ended(run) == ("DONE", 1, "") and steps(run) == 16  # of 8 sequences, the last of 5
    assert all((run.logs / f"attempt-1.rank-{rank}.log").exists() for rank in range(2))


@pytest.mark.slow
def test_two_runs_share_a_job_and_one_fails_alone(job: Job, frozen: Frozen) -> None:
    good, bad = frozen(SHORT), frozen(LONG, "seed=1")
    job.start([good, bad], 3)  # the last job of an array may have tasks to spare
    under_way(bad)
    os.kill(rank_of(job.tasks[1]), signal.SIGKILL)
    codes, printed = job.wait()
    assert codes == [0, 1, 0], printed
    assert ended(good) == ("DONE", 1, "")
    state, _, error = ended(bad)
    assert state == "FAILED" and "rank 0 was killed by SIGKILL" in error


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_other_and_is_named(job: Job, frozen: Frozen, victim: int) -> None:
    run = frozen(LONG, "parallel=ddp")
    job.start([run], 2)
    under_way(run)
    ranks = [rank_of(task) for task in job.tasks]
    os.kill(ranks[victim], signal.SIGKILL)
    before = time.monotonic()
    codes, printed = job.wait(30)
    assert time.monotonic() - before < 20
    assert codes[victim] == 1 and codes[0] == 1, printed  # the task of rank 0 answers for the run
    state, _, error = ended(run)
    assert state == "FAILED" and f"rank {victim}" in error and "was killed by SIGKILL" in error
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert not run.is_locked()


@pytest.mark.slow
def test_a_rank_that_ends_before_it_can_speak_ends_the_other(
    job: Job, frozen: Frozen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a node that lacks a library: the others wait for it where ranks meet."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        "import os\nif os.environ.get('RANK') == '1':\n    os._exit(3)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}")
    run = frozen(LONG, "parallel=ddp")
    job.start([run], 2)
    codes, printed = job.wait(60)
    assert codes == [1, 1], printed
    state, _, error = ended(run)
    assert state == "FAILED" and error.startswith("rank 1: exited with code 3"), error


@pytest.mark.slow
def test_a_damaged_run_does_not_keep_those_that_share_its_job(job: Job, frozen: Frozen) -> None:
    bad, good = frozen(SHORT, "seed=1"), frozen(SHORT)
    bad.config_file.write_text(bad.config_file.read_text().replace("seed: 1", "seed: 2", 1))
    job.start([bad, good], 2)
    codes, printed = job.wait()
    assert codes == [1, 0], printed
    assert ended(good) == ("DONE", 1, "")
    state, _, error = ended(bad)
    assert state == "FAILED" and "is not what was frozen" in error


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_does_not_outlive_one_that_failed(job: Job, frozen: Frozen, victim: int) -> None:
    run = frozen(LONG, "parallel=ddp")
    job.start([run], 2)
    under_way(run)
    ranks = [rank_of(task) for task in job.tasks]
    os.kill(ranks[1 - victim], signal.SIGSTOP)  # as in a collective that will never complete
    os.kill(ranks[victim], signal.SIGKILL)
    job.wait(30)
    state, _, error = ended(run)
    assert state == "FAILED" and f"rank {victim}" in error and "was killed by SIGKILL" in error
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.slow
def test_what_a_rank_says_of_its_failure_is_the_error(
    job: Job, frozen: Frozen, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = frozen(SHORT, "launch.device=cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    job.start([run], 1)
    codes, printed = job.wait()
    state, _, error = ended(run)
    assert codes == [2] and state == "FAILED", printed
    assert error.startswith("rank 0: ConfigError: launch.device=cuda")


def test_a_request_that_is_wrong_by_now_fails_before_ranks_start(job: Job, frozen: Frozen) -> None:
    run = frozen(SHORT, "parallel=ddp")
    text = run.config_file.read_text().partition("\n")[2]  # without the seal, as of an earlier version
    assert "warning_s: 120" in text
    run.config_file.write_text(text.replace("warning_s: 120", "warning_s: 590"))
    job.start([run], 2)
    codes, printed = job.wait()
    assert codes == [2, 0], printed
    state, _, error = ended(run)
    assert state == "FAILED" and "launch.warning_s=590" in error
    assert not list(run.logs.glob("attempt-1.rank-*"))


def test_a_run_that_is_done_ends_all_tasks_at_once(job: Job, frozen: Frozen) -> None:
    run = frozen(SHORT, "parallel=ddp")
    run.update_status(state="DONE", attempt=1)
    job.start([run], 2)
    codes, printed = job.wait()
    assert codes == [0, 0] and "is done" in printed
    assert ended(run) == ("DONE", 1, "")


# --- signals

RUNNING = "JobId=72 ArrayJobId=70 ArrayTaskId=2 JobName=s UserId=u(1) JobState=RUNNING Reason=None Requeue=1 Restarts=0 PreemptTime=2026-01-01T00:00:00 BatchFlag=1"  # fmt: skip
COMPLETING = RUNNING.replace("RUNNING", "COMPLETING")
REQUEUED = COMPLETING.replace("Restarts=0", "Restarts=1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "answer", "state", "again"),
    [
        (signal.SIGUSR2, "exit 1", "PREEMPTED", True),
        (signal.SIGTERM, f"echo '{RUNNING}'", "PREEMPTED", True),
        (signal.SIGTERM, f"echo '{COMPLETING}'", "CANCELLED", False),
        (signal.SIGTERM, f"echo '{REQUEUED}'", "PREEMPTED", False),  # SLURM has done so itself
    ],
    ids=["warned", "preempted", "cancelled", "requeued"],
)
def test_a_signal_stops_a_run_with_a_checkpoint(
    job: Job, frozen: Frozen, slurm: Scheduler, number: int, answer: str, state: str, again: bool
) -> None:
    slurm.answers("scontrol", answer)
    run = frozen(LONG, "parallel=ddp")
    job.start([run], 2)
    under_way(run)
    job.signal(number)
    codes, printed = job.wait(60)
    assert ended(run)[:2] == (state, 1), printed
    assert ("queued again" in printed) == again and codes[0] != 0 and codes[1] == 0
    (checkpoint,) = run.complete_checkpoints()[-1:]
    assert int(checkpoint.name.partition("-")[2]) == steps(run)
    assert not run.stop_file.exists() and "Traceback" not in printed


@pytest.mark.slow
def test_the_next_incarnation_goes_on_where_the_last_stopped(
    job: Job, frozen: Frozen, slurm: Scheduler
) -> None:
    run = frozen("budget.tokens=100k")
    job.start([run], 1)
    under_way(run)
    job.signal(signal.SIGUSR2)
    job.wait()
    stopped_at = steps(run)
    assert ended(run)[:2] == ("PREEMPTED", 1) and stopped_at < run.config().budget_sequences // 8
    job.start([run], 1, restarts=1)
    codes, printed = job.wait()
    assert codes == [0] and ended(run) == ("DONE", 2, ""), printed
    assert min(row["step"] for row in run.rows() if row["attempt"] == 2) in (stopped_at, stopped_at + 1)


@pytest.mark.parametrize(
    ("answer", "restarts", "expected"),
    [
        (f"echo '{RUNNING}'", None, "preempted"),
        (f"echo '{RUNNING.replace('RUNNING', 'SIGNALING')}'", None, "preempted"),
        (f"echo '{RUNNING.replace('2026-01-01T00:00:00', 'None')}'", None, "failed"),
        (f"echo '{COMPLETING}'", None, "cancelled"),
        (f"echo '{COMPLETING}'", "0", "cancelled"),
        (f"echo '{COMPLETING.replace('Restarts=0', 'Restarts=3')}'", "3", "cancelled"),
        (f"echo '{COMPLETING.replace('COMPLETING', 'CANCELLED')}'", None, "cancelled"),
        (f"echo '{REQUEUED}'", None, "requeued"),
        (f"echo '{REQUEUED}'", "0", "requeued"),
        (f"echo '{COMPLETING.replace('Restarts=0', 'Restarts=4')}'", "3", "requeued"),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", None, "requeued"),
        ("exec sleep 60", None, "requeued"),
    ],
)
def test_why_slurm_sends_sigterm(
    slurm: Scheduler, monkeypatch: pytest.MonkeyPatch, answer: str, restarts: str | None, expected: str
) -> None:
    monkeypatch.setattr("launchers.job._ANSWER_S", 0.5)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if restarts is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    slurm.answers("scontrol", answer)
    assert fate("70_2") == expected
    assert slurm.asked("scontrol") == [["show", "job", "-o", "70_2"]]


def test_without_scontrol_a_job_counts_as_requeued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert fate("70_2") == "requeued"


def test_the_first_error_of_this_attempt_counts(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.logs.mkdir()
    assert first_error(run, 2) is None
    for name, when in (("1.rank-3", 1), ("2.rank-10", 5), ("2.rank-2", 4), ("22.rank-0", 2)):
        file = run.logs / f"attempt-{name}.error"
        file.write_text("")
        os.utime(file, (when, when))
    assert first_error(run, 2) == 2
