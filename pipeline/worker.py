"""Executes one frozen run directory: the only door into training.

    python -m pipeline.worker RUN_DIR [parallel=… parallel.*=… launch.*=…]

Started plainly it is the supervisor: it takes the run's lock, starts one process per rank with torch's
elastic launcher, and turns however they end into the run's status. The ranks are this module again, told
apart by the environment. Exit codes: 0 done (or somebody else is at it), 1 failed, 2 the request
is wrong (no such run directory, device or data), 128 + n stopped by signal n.

A signal stops the run at its next step, with a checkpoint; a second one at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shlex
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NoReturn

from pipeline.attempt import for_attempt, mesh_of
from pipeline.config import Config, ConfigError, check
from pipeline.store import AlreadyRunning, RunDirectory, home, python, report

ATTEMPT_VARIABLE = "CRESCENDO_ATTEMPT"
SUPERVISOR_VARIABLE = "CRESCENDO_SUPERVISOR"  # its process id, for the ranks
PROGRESS_INTERVAL_S = 5.0
SHUTDOWN_TIMEOUT_S = 3  # between asking ranks to end and killing them
# For the step at work and the checkpoint after it, when a signal asks for a stop.
STOP_GRACE_S = float(os.environ.get("CRESCENDO_STOP_GRACE_S") or 120)
WRONG_REQUEST = 2


def main(arguments: list[str]) -> int:
    if not arguments:
        print("usage: python -m pipeline.worker RUN_DIR [parallel=… launch.*=…]", file=sys.stderr)
        return WRONG_REQUEST
    directory, *changes = arguments
    run = RunDirectory(Path(directory).resolve())
    if is_rank := SUPERVISOR_VARIABLE in os.environ:
        _die_with_supervisor()
    elif "RANK" in os.environ:
        print("RANK is set: start the worker plainly, it starts its ranks itself", file=sys.stderr)
        return WRONG_REQUEST
    try:
        config = run.config()
        check(config)
        if changes:
            config = for_attempt(config, changes)
        return run_rank(config, run) if is_rank else supervise(config, run, changes)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return WRONG_REQUEST
    except AlreadyRunning as error:
        print(f"{error}; nothing to do here")
        return 0


# --- the supervisor --------------------------------------------------------------------------------------


def supervise(config: Config, run: RunDirectory, changes: Sequence[str]) -> int:
    """Runs all ranks of the next attempt and records how they ended. Raises AlreadyRunning.

    `config` has the `changes` of this attempt already; the ranks are told of them.
    """
    with run.lock():
        status = run.status()
        if status and status.state == "DONE":
            print(f"run {run.id} is done: {run.path}")
            return 0
        stops = Stops(run)
        attempt = status.attempt + 1 if status else 1
        run.clear_stop()
        run.update_status(
            state="RUNNING",
            attempt=attempt,
            step=0,
            tokens_seen=0,
            started=time.time(),
            budget_tokens=config.budget_tokens,
            host=socket.gethostname(),
            job=os.environ.get("SLURM_JOB_ID"),
            mesh=mesh_of(config),
            exit_code=None,
            error=None,
        )
        report(f"run {run.id}: attempt {attempt} on {mesh_of(config)}, logs in {run.logs}")
        finished = threading.Event()
        reporter = threading.Thread(target=_report_progress, args=(run, finished), daemon=True)
        reporter.start()
        try:
            state, exit_code, error = _run_ranks(config, run, attempt, stops, changes)
        except KeyboardInterrupt:
            state, exit_code, error = stops.outcome()
        finally:
            stops.ignore()
            run.clear_stop()
            finished.set()
            reporter.join()
        try:
            run.update_status(state=state, exit_code=exit_code, error=error)
        except OSError as full:
            report(f"status.json could not be written: {full.strerror}")
        report(f"run {run.id}: {state}" + (f": {error}" if error else ""))
        again = f"again, from the newest checkpoint: {_again(run, changes)}"
        report(_conclusion(run) if state == "DONE" else again)
        return exit_code


class Stops:
    """Signals that ask this run to stop.

    At first they are only noted: an exception that a signal raises somewhere inside `import torch` may be
    swallowed there. After `act` they are raised, as KeyboardInterrupt. After `ask_first` the first one asks
    the ranks to stop at their next step; what comes then, a signal or the end of the grace period, is raised.
    Signals that were ignored when the process began (nohup) stay ignored.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._number: int | None = None  # of the first
        self._answer: Literal["note", "raise", "ask first", "ignore"] = "note"
        self._overdue = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)
        signal.signal(signal.SIGALRM, self._receive)

    def act(self) -> None:
        self._answer = "raise"
        if self._number is not None:
            raise KeyboardInterrupt

    def ask_first(self) -> None:
        self._answer = "ask first"

    def ignore(self) -> None:
        self._answer = "ignore"
        signal.setitimer(signal.ITIMER_REAL, 0)

    def outcome(self) -> tuple[str, int, str]:
        """(state, exit code, error) of an attempt that was stopped."""
        number = self._number or signal.SIGTERM  # without a signal: somebody else wrote the stop file
        late = f"; no checkpoint within {STOP_GRACE_S:g} s" if self._overdue else ""
        return "CANCELLED", 128 + number, f"stopped by {signal.Signals(number).name}{late}"

    def _receive(self, number: int, frame: object) -> None:
        first = self._number is None
        self._number = self._number or number
        if self._answer == "ask first" and first:
            self._ask()
        elif self._answer in ("raise", "ask first"):
            self._overdue = number == signal.SIGALRM
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    def _ask(self) -> None:
        try:
            self._run.request_stop()
        except OSError:  # a disk without room for an empty file has none for a checkpoint
            raise KeyboardInterrupt from None
        signal.setitimer(signal.ITIMER_REAL, STOP_GRACE_S)
        with contextlib.suppress(OSError):  # not `print`, inside which the signal may have arrived
            os.write(1, b"stopping at the next step, with a checkpoint; once more to stop at once\n")


def _conclusion(run: RunDirectory) -> str:
    """How a finished run ended, and what to do with it."""
    trained, evaluated = (
        next(row for row in reversed(run.rows()) if key in row) for key in ("train/loss", "val/loss")
    )
    return (
        f"{trained['step']} steps, {trained['tokens']:,} tokens in {trained['time']:.0f} s of training, "
        f"validation loss {evaluated['val/loss']:.4f}\n"
        f"record: {run.metrics_file}\n"
        f"export for transformers: {python()} -m pipeline.export {run.id} DIRECTORY"
    )


def _again(run: RunDirectory, changes: Sequence[str]) -> str:
    return shlex.join([python(), "-m", "pipeline.worker", os.path.relpath(run.path), *changes])


def _run_ranks(
    config: Config, run: RunDirectory, attempt: int, stops: Stops, changes: Sequence[str]
) -> tuple[str, int, str | None]:
    """(state, exit code, error) of one attempt. Raises KeyboardInterrupt when it is to end at once."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from pipeline.data import prepare

    # What it would print about signals and failed ranks is in the status, in one line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[ATTEMPT_VARIABLE] = str(attempt)
    os.environ[SUPERVISOR_VARIABLE] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(config, runs_at_a_time=1)))
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.parallel.world_size,
        run_id=f"{run.id}-{attempt}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.05,
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        signals_to_handle="",  # `stops` does
        local_addr="localhost",
    )
    command = [sys.executable, "-m", "pipeline.worker", str(run.path), *changes]
    stops.act()
    try:
        # Before the ranks start, so that none of them waits in a collective for another's tokenising.
        prepare(config.data, home() / "corpora", report=report, progress=sys.stdout.isatty())
        stops.ask_first()
        elastic_launch(launch, command[0])(*command[1:])
    except ConfigError as error:
        return "FAILED", WRONG_REQUEST, str(error)
    except ChildFailedError as failure:
        _, first = failure.get_first_failure()
        exit_code = WRONG_REQUEST if first.exitcode == WRONG_REQUEST else 1
        return "FAILED", exit_code, _cause(run, attempt, failure)
    status = run.status()
    return stops.outcome() if status and status.state == "CANCELLED" else ("DONE", 0, None)


def threads_per_rank(config: Config, runs_at_a_time: int) -> int:
    """An equal share of the cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return config.launch.cpus_per_task or max(1, cores // (runs_at_a_time * config.parallel.world_size))


def _cause(run: RunDirectory, attempt: int, failure: Exception) -> str:
    """One line: which rank ended the attempt, and why."""
    rank, first = failure.get_first_failure()  # type: ignore[attr-defined]
    row = run.last_row()
    step = row["step"] if row and row["attempt"] == attempt else 0
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        return f"rank {rank} was killed by {name} (signal {-first.exitcode}) after step {step}"
    with contextlib.suppress(FileNotFoundError):
        if line := error_file(run, attempt, rank).read_text(encoding="utf-8"):
            return f"rank {rank}: {line}"
    return f"rank {rank} exited with code {first.exitcode} after step {step}; see {run.logs}"


def _report_progress(run: RunDirectory, finished: threading.Event) -> None:
    """A line every few seconds for whoever watches; its rate is that since the line before."""
    tokens, seconds = 0, 0.0
    while not finished.wait(PROGRESS_INTERVAL_S):
        status, row = run.status(), run.last_row()
        if not status or not row or row["attempt"] != status.attempt or row["time"] == seconds:
            continue
        rate = (row["tokens"] - tokens) / (row["time"] - seconds)
        tokens, seconds = row["tokens"], row["time"]
        report(
            f"step {row['step']}  {tokens / max(1, status.budget_tokens):4.0%} of "
            f"{status.budget_tokens:,} tokens  loss {row['train/loss']:.4f}  "
            f"batch {row['batch/size']}  {rate:,.0f} tokens/s"
        )


# --- one rank --------------------------------------------------------------------------------------------


def log_file(run: RunDirectory, attempt: int, rank: int) -> Path:
    return run.logs / f"attempt-{attempt}.rank-{rank}.log"


def error_file(run: RunDirectory, attempt: int, rank: int) -> Path:
    return run.logs / f"attempt-{attempt}.rank-{rank}.error"


def run_rank(config: Config, run: RunDirectory) -> NoReturn:
    """This process's share of the run. Output goes to logs/; an error also, as one line, to its own file."""
    rank = int(os.environ["RANK"])
    attempt = int(os.environ[ATTEMPT_VARIABLE])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a stop is not an error worth a traceback
    # The supervisor answers for all: where a scheduler signals every process of a job, ranks must live to
    # save a checkpoint, and one that another's failure ends needs time to give a written one its name.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run.logs.mkdir(parents=True, exist_ok=True)
    log = os.open(log_file(run, attempt, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        from pipeline.parallel._ranks import process_group
        from pipeline.train import train

        with process_group(config) as ranks:
            finished = train(config, run, attempt, ranks)
        if not finished and rank == 0:
            run.update_status(state="CANCELLED")  # so the supervisor knows that the ranks followed its wish
    except Exception as error:
        with contextlib.suppress(OSError):  # a full disk
            traceback.print_exc()
            sys.stderr.flush()
        if _lost_a_peer(error):
            # The rank that died first is the cause; this one only noticed. Let it be seen first.
            time.sleep(1.0)
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        with contextlib.suppress(OSError):
            error_file(run, attempt, rank).write_text(line, encoding="utf-8")
        # Other ranks may be inside a collective that will never complete: leave without waiting for them.
        os._exit(WRONG_REQUEST if isinstance(error, ConfigError) else 1)
    # All is on disk; the interpreter's own exit would wait for whatever wandb still wants to do.
    os._exit(0)


def _lost_a_peer(error: Exception) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "peer" in str(error) or "gloo" in str(error)


def _die_with_supervisor() -> None:
    """A rank must not outlive its supervisor, however that ends (Linux: PR_SET_PDEATHSIG = 1)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(os.environ[SUPERVISOR_VARIABLE]):  # it died before the line above
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
