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
import json
import logging
import os
import shlex
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, get_args

from pipeline.attempt import for_attempt, mesh_of
from pipeline.config import TEXT_SOURCES, Config, ConfigError, LlamaConfig, check
from pipeline.environment import environment
from pipeline.store import (
    AlreadyRunning,
    RunDirectory,
    State,
    StopState,
    home,
    python,
    report,
    write_atomically,
)

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
        attempt = begin(config, run)
        with progress_reports(run):
            try:
                outcome = _run_ranks(config, run, attempt, stops, changes)
            except KeyboardInterrupt:
                outcome = stops.outcome()
            finally:
                stops.ignore()
        end(run, outcome)
        if outcome.state != "DONE":
            report(f"again, from the newest checkpoint: {_again(run, changes)}")
        return outcome.exit_code


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended. `error` is one line."""

    state: State
    exit_code: int
    error: str | None = None


def begin(config: Config, run: RunDirectory, job: str | None = None) -> int:
    """Records that an attempt begins, where, and with which software. Its number. The caller has the lock."""
    status = run.status()
    attempt = status.attempt + 1 if status else 1
    run.clear_stop()
    run.update_status(
        state="RUNNING",
        attempt=attempt,
        step=0,
        tokens_seen=0,
        started=time.time(),
        budget_tokens=config.budget_tokens,
        unit=config.unit,
        host=socket.gethostname(),
        job=job,
        mesh=mesh_of(config),
        exit_code=None,
        error=None,
    )
    write_atomically(run.logs / f"attempt-{attempt}.environment.json", json.dumps(environment(), indent=1))
    report(f"run {run.id}: attempt {attempt} on {mesh_of(config)}, logs in {run.logs}")
    return attempt


def end(run: RunDirectory, outcome: Outcome) -> None:
    """Records how the attempt ended, and tells."""
    try:
        run.clear_stop()
        if run.exists():  # else somebody deleted it
            run.update_status(state=outcome.state, exit_code=outcome.exit_code, error=outcome.error)
    except OSError as problem:
        report(f"status.json could not be written: {problem.strerror}")
    report(f"run {run.id}: {outcome.state}" + (f": {outcome.error}" if outcome.error else ""))
    if outcome.state == "DONE":
        report(_conclusion(run))


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

    def outcome(self) -> Outcome:
        """Of an attempt that was stopped."""
        number = self._number or signal.SIGTERM  # without a signal: somebody else wrote the stop file
        late = f"; no checkpoint within {STOP_GRACE_S:g} s" if self._overdue else ""
        return Outcome("CANCELLED", 128 + number, f"stopped by {signal.Signals(number).name}{late}")

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
    config = run.config()
    lines = [
        f"{trained['step']} steps, {trained['tokens']:,} {config.unit} in {trained['time']:.0f} s of "
        f"training, validation loss {evaluated['val/loss']:.4f}",
        f"record: {run.metrics_file}",
    ]
    if "val/accuracy" in evaluated:
        lines[0] += f", accuracy {evaluated['val/accuracy']:.4f}"
    if isinstance(config.model, LlamaConfig):
        lines.append(f"export for transformers: {python()} -m pipeline.export {run.id} DIRECTORY")
    return "\n".join(lines)


def _again(run: RunDirectory, changes: Sequence[str]) -> str:
    return shlex.join([python(), "-m", "pipeline.worker", os.path.relpath(run.path), *changes])


def _run_ranks(
    config: Config, run: RunDirectory, attempt: int, stops: Stops, changes: Sequence[str]
) -> Outcome:
    """Raises KeyboardInterrupt when the attempt is to end at once."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What it would print about signals and failed ranks is in the status, in one line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.update(rank_variables(attempt))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(config, config.parallel.world_size)))
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
        prepare_data(config)
        stops.ask_first()
        elastic_launch(launch, command[0])(*command[1:])
    except ConfigError as error:
        return Outcome("FAILED", WRONG_REQUEST, str(error))
    except ChildFailedError as failure:
        rank, first = failure.get_first_failure()
        return failed(run, attempt, rank, first.exitcode)
    status = run.status()
    stopped = status is not None and status.state in get_args(StopState)
    return stops.outcome() if stopped else Outcome("DONE", 0)


def rank_variables(attempt: int) -> dict[str, str]:
    """What a rank must be told by the process that supervises it, besides its place among the ranks."""
    return {ATTEMPT_VARIABLE: str(attempt), SUPERVISOR_VARIABLE: str(os.getpid())}


def prepare_data(config: Config) -> None:
    """Before the ranks start, so that none of them waits in a collective for another's tokenising, and what
    is wrong with the data is said once.

    Raises ConfigError."""
    if config.data.source not in TEXT_SOURCES:
        from pipeline.problem import check_samples

        check_samples(config)
        if config.track.exact_gradient:
            from pipeline.optimum import minimum

            minimum(config)
        return
    from pipeline.data import prepare

    prepare(config.data, home() / "corpora", report=report, progress=sys.stdout.isatty())


def threads_per_rank(config: Config, ranks_here: int) -> int:
    """An equal share of the cores that the ranks on this machine may use."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    cores = min(cores, int(os.environ.get("SLURM_CPUS_ON_NODE", cores)))
    return config.launch.cpus_per_task or max(1, cores // ranks_here)


def failed(run: RunDirectory, attempt: int, rank: int, code: int) -> Outcome:
    """Of an attempt that a rank ended, with this exit code, negative after a signal."""
    row = run.last_row()
    step = row["step"] if row and row["attempt"] == attempt else 0
    exit_code = WRONG_REQUEST if code == WRONG_REQUEST else 1
    if not run.exists():
        return Outcome("FAILED", exit_code, f"{run.path} was deleted under the run")
    if code < 0:
        name = signal.Signals(-code).name
        return Outcome("FAILED", 1, f"rank {rank} was killed by {name} (signal {-code}) after step {step}")
    with contextlib.suppress(FileNotFoundError):
        if line := error_file(run, attempt, rank).read_text(encoding="utf-8"):
            return Outcome("FAILED", exit_code, f"rank {rank}: {line}")
    line = f"rank {rank} exited with code {code} after step {step}; see {run.logs}"
    return Outcome("FAILED", exit_code, line)


@contextlib.contextmanager
def progress_reports(run: RunDirectory) -> Iterator[None]:
    finished = threading.Event()
    reporter = threading.Thread(target=_report_progress, args=(run, finished), daemon=True)
    reporter.start()
    try:
        yield
    finally:
        finished.set()
        reporter.join()


def _report_progress(run: RunDirectory, finished: threading.Event) -> None:
    """A line every few seconds for whoever watches; its rate is that since the line before."""
    tokens, seconds, unit = 0, 0.0, run.config().unit
    while not finished.wait(PROGRESS_INTERVAL_S):
        status, row = run.status(), run.last_row()
        if not status or not row or row["attempt"] != status.attempt or row["time"] == seconds:
            continue
        rate = (row["tokens"] - tokens) / (row["time"] - seconds)
        tokens, seconds = row["tokens"], row["time"]
        report(
            f"step {row['step']}  {tokens / max(1, status.budget_tokens):4.0%} of "
            f"{status.budget_tokens:,} {unit}  loss {row['train/loss']:.4f}  "
            f"batch {row['batch/size']}  {rate:,.0f} {unit}/s"
        )


# --- one rank --------------------------------------------------------------------------------------------


def log_file(run: RunDirectory, attempt: int, rank: int) -> Path:
    return run.logs / f"attempt-{attempt}.rank-{rank}.log"


def error_file(run: RunDirectory, attempt: int, rank: int) -> Path:
    return run.logs / f"attempt-{attempt}.rank-{rank}.error"


def record_error(run: RunDirectory, attempt: int, rank: int, line: str) -> None:
    with contextlib.suppress(OSError):  # a full disk
        error_file(run, attempt, rank).write_text(line, encoding="utf-8")


def run_rank(config: Config, run: RunDirectory) -> NoReturn:
    """This process's share of the run. Output goes to logs/; an error also, as one line, to its own file."""
    rank = int(os.environ["RANK"])
    attempt = int(os.environ[ATTEMPT_VARIABLE])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a stop is not an error worth a traceback
    # The supervisor answers for all: where a scheduler signals every process of a job, ranks must live to
    # save a checkpoint, and one that another's failure ends needs time to give a written one its name.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _keep_freed_memory()
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
            # So the supervisor knows that the ranks followed its wish.
            run.update_status(state=run.stop_requested() or "CANCELLED")
    except Exception as error:
        with contextlib.suppress(OSError):  # a full disk
            traceback.print_exc()
            sys.stderr.flush()
        if _lost_a_peer(error):
            # The rank that died first is the cause; this one only noticed. Let it be seen first.
            time.sleep(1.0)
        record_error(run, attempt, rank, f"{type(error).__name__}: {error}".splitlines()[0])
        # Other ranks may be inside a collective that will never complete: leave without waiting for them.
        os._exit(WRONG_REQUEST if isinstance(error, ConfigError) else 1)
    # All is on disk; the interpreter's own exit would wait for whatever wandb still wants to do.
    os._exit(0)


def _keep_freed_memory() -> None:
    """A step on a CPU frees and asks again for the same large tensors. glibc gives each of them back to the
    kernel, which then clears and maps its pages anew: 40,000 faults in a step of 10M parameters, and while
    one thread has one, the others wait. (mallopt(3): M_MMAP_THRESHOLD = -3, M_TRIM_THRESHOLD = -1)"""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        largest = 2**31 - 1
        mallopt(-3, largest)
        mallopt(-1, largest)


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
