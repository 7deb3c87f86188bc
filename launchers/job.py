"""Inside a SLURM job. One task per rank; each task supervises its rank, which is a process of its own
(pipeline.worker), so that somebody is free to answer signals.

    srun ─ task of rank 0 ─ rank 0      takes the run's lock, begins the attempt, writes how it ended
         ─ task of rank 1 ─ rank 1      waits for word of the attempt, starts its rank, follows it

A job is given nothing but run directories: what is left to do, and from which checkpoint, is found there.
Where several runs share a job, the first tasks are those of the first run, and so on.

Signals. A warning (SIGUSR2) comes before the time limit and, where the cluster is set up so, before
preemption: the ranks stop at their next step with a checkpoint, then the job queues itself again and goes on
as the next attempt. SIGTERM comes with preemption, too, with scancel and scontrol requeue, and from srun when
a task was killed; which of them it was is asked for (`fate`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from submitit import JobEnvironment
from submitit.helpers import Checkpointable

from launchers.manifest import link_wandb
from pipeline import rendezvous, worker
from pipeline.config import Config, ConfigError, check
from pipeline.store import AlreadyRunning, RunDirectory, report, write_atomically
from pipeline.worker import Outcome

WARNING = signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]  # SIGUSR2, unless submitit is told otherwise
POLL_S = 0.2
# The lock of an attempt that was just killed, perhaps with its node, is free when its file system says so.
LOCK_PATIENCE_S = 120
SILENCE_S = 2 * LOCK_PATIENCE_S  # after which a task that neither has the lock nor gave word is dead
PEER_GRACE_S = 5  # for a rank to notice by itself that another has failed
REQUEUE_MARGIN_S = 10  # of the warning before the time limit, kept for queueing the job again
LIMIT_TOLERANCE_S = 60  # SLURM looks at time limits now and then
_STOPPED = 128 + signal.SIGTERM
_REQUEUE_TRIES, _REQUEUE_WAIT_S = 12, 5.0  # while the controller is too busy to answer
_ANSWER_S = 10  # for scontrol, of the time between SIGTERM and SIGKILL

# warned: by WARNING, of the time limit or of preemption; the others: by SIGTERM.
Fate = Literal["warned", "preempted", "requeued", "cancelled", "failed"]


class RunJob(Checkpointable):
    """What submitit runs in each task of a job: one rank of one of its runs."""

    def __init__(self, directories: Sequence[str]) -> None:
        self.directories = list(directories)

    def __call__(self) -> None:
        sys.exit(Task([RunDirectory(path) for path in self.directories]).run())


class ReportJob:
    """Compares the runs of a sweep when its jobs have ended."""

    def __init__(self, sweep: str) -> None:
        self.sweep = sweep

    def __call__(self) -> None:
        sys.exit(subprocess.run([sys.executable, "-m", "analysis", self.sweep], check=False).returncode)


class Task:
    """This process, among the tasks of the job."""

    def __init__(self, runs: Sequence[RunDirectory]) -> None:
        self.began = time.monotonic()
        self.job, self.runs = JobEnvironment(), runs
        self.warned = self.terminated = False
        self.fate: Fate | None = None  # why the job is to stop
        # submitit's answer to the warning, to be given when everything is saved.
        self.checkpoint_and_requeue = signal.getsignal(WARNING)
        signal.signal(WARNING, self._receive)
        signal.signal(signal.SIGTERM, self._receive)
        # The last job of an array may have fewer runs than the others.
        self.config = _first_config(runs)
        index, self.rank = divmod(self.job.global_rank, self.config.parallel.world_size)
        self.index = index if index < len(runs) else None
        incarnation = f"{self.job.job_id}.{os.environ.get('SLURM_RESTART_COUNT', 0)}"
        self.notes = [Notes(self.job.paths.folder / incarnation / run.id) for run in runs]

    def run(self) -> int:
        """The task's exit code."""
        if self.index is None:
            return 0
        run, notes = self.runs[self.index], self.notes[self.index]
        if self.rank > 0:
            return self._follow(run, notes)
        exit_code = self._lead(run, notes)
        if self.job.global_rank == 0:
            self._queue_again_if_preempted()
        return exit_code

    def _receive(self, number: int, frame: object) -> None:
        self.warned |= number == WARNING
        self.terminated |= number == signal.SIGTERM

    # --- the task of rank 0

    def _lead(self, run: RunDirectory, notes: Notes) -> int:
        outcome = Outcome("FAILED", 1)
        try:
            with self._lock(run):
                try:
                    outcome = self._nothing_to_do(run) or self._attempt(run, notes)
                except Exception as error:  # a run must not be left RUNNING
                    traceback.print_exc()
                    outcome = Outcome("FAILED", 1, f"{type(error).__name__}: {error}")
                    worker.end(run, outcome)
                finally:
                    notes.end(outcome)  # while the lock is held: without a word and a lock a task is dead
        except AlreadyRunning as error:
            report(f"{error}; this job gives up")
            notes.end(Outcome("PREEMPTED" if self._to_stop() else "FAILED", 1))
        notes.start(None)  # for tasks that still wait for word
        return outcome.exit_code

    def _nothing_to_do(self, run: RunDirectory) -> Outcome | None:
        """Of a run that is done, or was cancelled while the job waited, or is another job's by now; or that
        failed and is here again because a run that shares the job was preempted."""
        status = run.status()
        if status is None or status.job not in (None, self.job.job_id):
            report(f"run {run.id} is not this job's (any more): {run.path}")
            return Outcome("FAILED", 1)
        if status.state in ("DONE", "CANCELLED") or (status.state == "FAILED" and len(self.runs) > 1):
            report(f"run {run.id} is {status.state.lower()}: {run.path}")
            return Outcome(status.state, 0)
        return None

    def _attempt(self, run: RunDirectory, notes: Notes) -> Outcome:
        config, saved = run.config(), run.complete_checkpoints()[-1:]
        attempt = worker.begin(config, run, self.job.job_id)
        try:
            check(config)
            worker.prepare_data(config)
        except ConfigError as error:
            outcome = Outcome("FAILED", worker.WRONG_REQUEST, str(error))
        else:
            with rendezvous.listen() as listener, worker.progress_reports(run):
                start = Start(attempt, listener.getsockname()[1])
                notes.start(start)
                outcome = self._watch(run, config, start, listener)
        if outcome.state == "PREEMPTED" and self.terminated and fate(self.job.job_id) == "cancelled":
            outcome = Outcome("CANCELLED", _STOPPED, "cancelled")  # by scancel, after a warning
        in_vain = run.complete_checkpoints()[-1:] == saved
        if outcome.state == "PREEMPTED" and in_vain and self._reached_limit(config):
            outcome = _stuck(config)  # it would be queued again for ever
        worker.end(run, outcome)
        if config.sweep.name:
            link_wandb(config.sweep.name, run.id)
        return outcome

    def _watch(self, run: RunDirectory, config: Config, start: Start, listener: socket.socket) -> Outcome:
        """Follows rank 0, and the errors of the others, to the end of the attempt."""
        deadline: float | None = None  # of the rank, once it is to end
        grace_s = max(PEER_GRACE_S, config.launch.warning_s - REQUEUE_MARGIN_S)
        with self._rank(run, config, start, listener) as rank:
            while rank.poll() is None and (deadline is None or time.monotonic() < deadline):
                time.sleep(POLL_S)
                if deadline is None and self._to_stop():
                    deadline = time.monotonic() + (PEER_GRACE_S if self.fate == "failed" else grace_s)
                    with contextlib.suppress(OSError):  # a full disk has no room for a checkpoint either
                        run.request_stop("CANCELLED" if self.fate == "cancelled" else "PREEMPTED")
                if first_error(run, start.attempt) is not None:
                    soon = time.monotonic() + PEER_GRACE_S
                    deadline = min(soon, deadline or soon)
            ended = rank.poll()
        failed_rank = first_error(run, start.attempt)
        if self.fate == "failed":
            return Outcome("FAILED", 1, "another task of the job was killed")
        if failed_rank is not None or ended:
            return worker.failed(run, start.attempt, failed_rank or 0, ended or 1)
        wish = run.stop_requested()
        if ended is None:
            late = f"; no checkpoint within {grace_s:g} s"
            return Outcome(wish or "PREEMPTED", _STOPPED, f"{self._cause(config)}{late}")
        status = run.status()
        if wish and status and status.state == wish:  # as rank 0 wrote when it had saved a checkpoint
            return Outcome(wish, _STOPPED, f"{self._cause(config)}, with a checkpoint")
        return worker.done(config, run)

    def _to_stop(self) -> bool:
        if self.fate is None and self.warned:
            self.fate = "warned"
        elif self.fate is None and self.terminated:
            self.fate = fate(self.job.job_id)
        return self.fate is not None

    def _cause(self, config: Config) -> str:
        if self.fate == "warned":
            return "stopped at the time limit" if self._reached_limit(config) else "preempted"
        return self.fate or "cancelled"

    def _reached_limit(self, config: Config) -> bool:
        limit_s = 60 * config.launch.minutes - config.launch.warning_s - LIMIT_TOLERANCE_S
        return self.fate == "warned" and time.monotonic() - self.began > limit_s

    def _queue_again_if_preempted(self) -> None:
        """Stays until the last run of the job has ended, then queues the job again if one is to go on."""
        deadline: float | None = None
        warning_s = self.config.launch.warning_s
        while not all(map(self._is_over, self.runs, self.notes)):
            if deadline is None and self._to_stop():
                deadline = time.monotonic() + warning_s
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        if self.fate in ("warned", "preempted") and any(n.ended() == "PREEMPTED" for n in self.notes):
            self._queue_again()

    def _queue_again(self) -> None:
        """Unless the job was cancelled meanwhile. Does not return when it succeeds."""
        assert callable(self.checkpoint_and_requeue)
        for _ in range(_REQUEUE_TRIES):
            if self.terminated and fate(self.job.job_id) in ("cancelled", "requeued"):
                return
            try:
                self.checkpoint_and_requeue(WARNING, None)
            except (OSError, subprocess.SubprocessError) as error:
                report(f"the job could not be queued again: {error}")
                time.sleep(_REQUEUE_WAIT_S)

    def _is_over(self, run: RunDirectory, notes: Notes) -> bool:
        if notes.ended() is not None:
            return True
        due = notes.started() or time.monotonic() - self.began > SILENCE_S
        return due and not run.is_locked()  # the task that led it was killed

    @contextlib.contextmanager
    def _lock(self, run: RunDirectory) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            patience = time.monotonic() + LOCK_PATIENCE_S
            while True:
                try:
                    stack.enter_context(run.lock())
                    break
                except AlreadyRunning:
                    if time.monotonic() > patience or self.terminated:
                        raise
                    time.sleep(POLL_S)
            yield

    # --- the other tasks

    def _follow(self, run: RunDirectory, notes: Notes) -> int:
        start = notes.wait_for_start(run)
        if start is None:
            return 0
        deadline: float | None = None
        with self._rank(run, run.config(), start) as rank:
            while rank.poll() is None and (deadline is None or time.monotonic() < deadline):
                time.sleep(POLL_S)
                others_ended = notes.ended() or first_error(run, start.attempt) is not None
                if deadline is None and others_ended:
                    deadline = time.monotonic() + PEER_GRACE_S
            ended = rank.poll()
        if not ended:  # well, or because the others did
            return 0
        if ended < 0:
            worker.record_error(run, start.attempt, self.rank, f"was killed by {worker.signal_name(-ended)}")
        elif not worker.error_file(run, start.attempt, self.rank).exists():  # it came not so far as to say
            worker.record_error(run, start.attempt, self.rank, f"exited with code {ended}; see its job's log")
        patience = time.monotonic() + 2 * PEER_GRACE_S  # for the task of rank 0 to take note
        while not notes.ended() and time.monotonic() < patience:
            time.sleep(POLL_S)
        return 1

    # --- every task

    @contextlib.contextmanager
    def _rank(
        self, run: RunDirectory, config: Config, start: Start, listener: socket.socket | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """This task's rank, which inherits the `listener` and leaves it to nobody else. It does not outlive
        the block."""
        tasks_here = self.job.num_tasks // self.job.num_nodes
        # Which of the node's GPUs is its own, a rank finds by LOCAL_RANK.
        place = rendezvous.Place(
            self.rank,
            config.parallel.world_size,
            self.job.local_rank,
            tasks_here,
            self.job.hostnames[0],  # of runs that share a job all are there
            start.port,
        )
        inherited = listener.fileno() if listener else None
        threads = {"OMP_NUM_THREADS": str(worker.threads_per_rank(config, tasks_here))}
        rank = subprocess.Popen(
            [sys.executable, "-m", "pipeline.worker", str(run.path)],
            stdin=subprocess.DEVNULL,
            env=os.environ | worker.rank_variables(start.attempt, place, inherited) | threads,
            preexec_fn=_ignore_signals,
            pass_fds=() if inherited is None else (inherited,),
        )
        if listener:
            listener.close()  # when rank 0 is gone nobody is to wait at its door
        try:
            yield rank
        finally:
            rank.kill()
            rank.wait()


@dataclass(frozen=True)
class Start:
    """What the task of rank 0 tells the other tasks of its run."""

    attempt: int
    port: int


class Notes:
    """What the task of rank 0 leaves for the others, in a directory of this incarnation of the job."""

    def __init__(self, directory: Path) -> None:
        self._start, self._end = directory / "start.json", directory / "end"

    def start(self, start: Start | None) -> None:
        """The ranks can start; None: there is nothing to do for them."""
        write_atomically(self._start, json.dumps(asdict(start) if start else None))

    def wait_for_start(self, run: RunDirectory) -> Start | None:
        """Word comes in any case, however long rank 0 prepares its data, unless its task is killed."""
        heard = time.monotonic()
        while not self._start.exists():
            if run.is_locked():
                heard = time.monotonic()
            elif time.monotonic() - heard > SILENCE_S:
                return None
            time.sleep(POLL_S)
        told = json.loads(self._start.read_text(encoding="utf-8"))
        return Start(**told) if told else None

    def end(self, outcome: Outcome) -> None:
        write_atomically(self._end, outcome.state)

    def started(self) -> bool:
        return self._start.exists()

    def ended(self) -> str | None:
        """The state in which the attempt ended."""
        try:
            return self._end.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None


def fate(job: str) -> Fate:
    """Why SLURM sends SIGTERM. In the grace time of a preemption the job still runs, and unless it queues
    itself again it counts as ended when its tasks have; after scontrol requeue it has been counted as
    restarted, after scancel not."""
    try:
        answer = subprocess.run(
            ["scontrol", "show", "job", "-o", job],
            capture_output=True,
            text=True,
            timeout=_ANSWER_S,
            check=False,
            preexec_fn=_ignore_signals,  # SIGTERM may come twice
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        answer = ""
    told = dict(word.partition("=")[::2] for word in answer.split())
    match told.get("JobState"):
        case "RUNNING" | "SIGNALING" if told.get("PreemptTime", "None") != "None":
            return "preempted"
        case "RUNNING" | "SIGNALING":
            return "failed"  # srun ends the other tasks when one is killed
        case "COMPLETING" | "CANCELLED" if told.get("Restarts") == os.environ.get("SLURM_RESTART_COUNT", "0"):
            return "cancelled"
    return "requeued"  # or no answer: then the status says PREEMPTED, and the run can be resumed


def first_error(run: RunDirectory, attempt: int) -> int | None:
    """The rank that failed first; those that only lost a peer wait a moment before they say so."""
    found = {path.stat().st_mtime: path for path in run.logs.glob(f"attempt-{attempt}.rank-*.error")}
    return int(found[min(found)].stem.rpartition("-")[2]) if found else None


def _first_config(runs: Sequence[RunDirectory]) -> Config:
    """All runs of a job have the same mesh and limits. Somebody may have deleted or damaged some of them.
    Raises ConfigError when there is none left."""
    for run in runs[:-1]:
        with contextlib.suppress(ConfigError):
            return run.config()
    return runs[-1].config()


def _stuck(config: Config) -> Outcome:
    minutes = config.launch.minutes
    return Outcome(
        "FAILED",
        1,
        f"launch.minutes={minutes}: the time limit came before the first new checkpoint, and would again. "
        f"Resume with more, such as launch.minutes={2 * minutes}",
    )


def _ignore_signals() -> None:
    """SLURM signals every process of a job; the tasks answer for their ranks."""
    for number in (WARNING, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
