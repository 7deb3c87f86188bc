"""Executes one frozen run directory: the only door into training.

    python -m pipeline.worker RUN_DIR [parallel=… parallel.*=… launch.*=…]

Started plainly it is the supervisor: it takes the run's lock, starts one process per rank, and turns however
they end into the run's status. The ranks are this module again, told apart by the environment. They import
torch, the supervisor of a language model does not: it would take as long again. Exit codes: 0 done (or
somebody else is at it), 1 failed, 2 the request is wrong (no such run directory, device or data), 128 + n
stopped by signal n.

A signal stops the run at its next step, with a checkpoint; a second one at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, get_args

from pipeline import rendezvous
from pipeline.attempt import for_attempt, mesh_of
from pipeline.config import TEXT_SOURCES, Config, ConfigError, LlamaConfig, check
from pipeline.environment import environment
from pipeline.store import (
    AlreadyRunning,
    Row,
    RunDirectory,
    State,
    StopState,
    each_row,
    home,
    python,
    report,
    write_atomically,
)

ATTEMPT_VARIABLE = "CRESCENDO_ATTEMPT"
SUPERVISOR_VARIABLE = "CRESCENDO_SUPERVISOR"  # its process id, for the ranks
RANK_POLL_S = 0.05
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
        if status and status.state == "DONE" and _at_the_end(config, run):
            print(f"run {run.id} is done: {run.path}")
            return 0
        stops = Stops(run)
        attempt = begin(config, run)
        with progress_reports(run):
            try:
                outcome = _run_ranks(config, run, attempt, stops, changes)
            except KeyboardInterrupt:
                outcome = stops.outcome()
            except Exception as error:  # a run must not be left RUNNING
                traceback.print_exc()
                outcome = Outcome("FAILED", 1, f"{type(error).__name__}: {error}".splitlines()[0])
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
    attempt = run.newest_attempt() + 1
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
    # Not a daemon: the process stays until it is written. The ranks need not wait for git and nvidia-smi.
    threading.Thread(target=_record_environment, args=(run, attempt)).start()
    report(f"run {run.id}: attempt {attempt} on {mesh_of(config)}, logs in {run.logs}")
    return attempt


def _record_environment(run: RunDirectory, attempt: int) -> None:
    try:
        write_atomically(
            run.logs / f"attempt-{attempt}.environment.json", json.dumps(environment(), indent=1)
        )
    except OSError as problem:  # a full disk; the attempt itself will say so where it matters
        report(f"the environment of attempt {attempt} could not be written: {problem.strerror}")


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

    At first they are only noted. After `act` they are raised, as KeyboardInterrupt. After `note` they are
    only noted again: raised between a process's start and its entry in a list, they would leave it to itself.
    After `ask_first` the first one, or one that was noted, asks the ranks to stop at their next step; what
    comes then, a signal or the end of the grace period, is raised. Signals that were ignored when the process
    began (nohup) stay ignored.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._number: int | None = None  # of the first
        self._answer: Literal["note", "raise", "ask first", "ignore"] = "note"
        self._asked = self._overdue = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)
        signal.signal(signal.SIGALRM, self._receive)

    def act(self) -> None:
        self._answer = "raise"
        if self._number is not None:
            raise KeyboardInterrupt

    def note(self) -> None:
        self._answer = "note"

    def ask_first(self) -> None:
        self._answer = "ask first"
        if self._number is not None and not self._asked:
            self._ask()

    def ignore(self) -> None:
        self._answer = "ignore"
        signal.setitimer(signal.ITIMER_REAL, 0)

    def outcome(self) -> Outcome:
        """Of an attempt that was stopped."""
        number = self._number or signal.SIGTERM  # without a signal: somebody else wrote the stop file
        late = f"; no checkpoint within {STOP_GRACE_S:g} s" if self._overdue else ""
        return Outcome("CANCELLED", 128 + number, f"stopped by {signal_name(number)}{late}")

    def _receive(self, number: int, frame: object) -> None:
        self._number = self._number or number
        if self._answer == "ask first" and not self._asked:
            self._ask()
        elif self._answer in ("raise", "ask first"):
            self._overdue = number == signal.SIGALRM
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    def _ask(self) -> None:
        self._asked = True
        try:
            self._run.request_stop()
        except OSError:  # a disk without room for an empty file has none for a checkpoint
            raise KeyboardInterrupt from None
        signal.setitimer(signal.ITIMER_REAL, STOP_GRACE_S)
        with contextlib.suppress(OSError):  # not `print`, inside which the signal may have arrived
            os.write(1, b"stopping at the next step, with a checkpoint; once more to stop at once\n")


def _conclusion(run: RunDirectory) -> str:
    """How a finished run ended, and what to do with it."""
    last = _last_rows(run)
    trained, evaluated = last["train/loss"], last["val/loss"]
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
    stops.act()
    try:
        prepare_data(config)
    except ConfigError as error:
        return Outcome("FAILED", WRONG_REQUEST, str(error))
    stops.note()
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        _start_ranks(config, run, attempt, changes, ranks)
        stops.ask_first()
        failure = _first_failure(ranks)
    finally:
        stops.ignore()
        _end_ranks(ranks)
    if failure:
        return failed(run, attempt, *failure)
    status = run.status()
    stopped = status is not None and status.state in get_args(StopState)
    return stops.outcome() if stopped else done(config, run)


def done(config: Config, run: RunDirectory) -> Outcome:
    """Of an attempt whose ranks all ended well, as far as the record bears it out."""
    try:
        if _at_the_end(config, run):
            return Outcome("DONE", 0)
    except ConfigError as damage:
        return Outcome("FAILED", 1, str(damage))
    return Outcome(
        "FAILED",
        1,
        f"{run.metrics_file}: lacks the end of the run. Bring it back from a copy; without one, delete "
        f"{run.checkpoints} to train again from the beginning",
    )


def _at_the_end(config: Config, run: RunDirectory) -> bool:
    """Whether the record of the run goes to its end. Raises ConfigError when it is damaged."""
    last = _last_rows(run)
    return "val/loss" in last and last["train/loss"]["sequences"] >= config.budget_sequences


def _last_rows(run: RunDirectory) -> dict[str, Row]:
    """The newest row of training and that of the evaluation after it, as far as there are such, by the key
    that only they have. Raises ConfigError when the record is damaged."""
    last: dict[str, Row] = {}
    for row in each_row(run.metrics_file):
        if "train/loss" in row:
            last = {"train/loss": row}
        elif last and "val/loss" in row:
            last["val/loss"] = row
    return last


def _start_ranks(
    config: Config,
    run: RunDirectory,
    attempt: int,
    changes: Sequence[str],
    started: list[subprocess.Popen[bytes]],
) -> None:
    """Adds each to `started` as soon as it is there."""
    world_size = config.parallel.world_size
    environment = {"OMP_NUM_THREADS": str(threads_per_rank(config, world_size))} | os.environ
    with rendezvous.listen("127.0.0.1") as listener:
        port = listener.getsockname()[1]
        for rank in range(world_size):
            place = rendezvous.Place(rank, world_size, rank, world_size, "127.0.0.1", port)
            inherited = listener.fileno() if rank == 0 else None
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "pipeline.worker", str(run.path), *changes],
                    stdin=subprocess.DEVNULL,
                    env=environment | rank_variables(attempt, place, inherited),
                    pass_fds=() if inherited is None else (inherited,),
                    start_new_session=True,  # Ctrl-C in a terminal is the supervisor's to answer
                )
            )


def _first_failure(ranks: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    """The rank that failed first and its exit code, negative after a signal, as soon as it has; None when all
    have ended well."""
    while True:
        codes = [rank.poll() for rank in ranks]
        for rank, code in enumerate(codes):
            if code:
                return rank, code
        if None not in codes:
            return None
        time.sleep(RANK_POLL_S)


def _end_ranks(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Whoever still runs is asked to end, then killed. None is left, not even as a zombie."""
    for rank in ranks:
        rank.terminate()
    deadline = time.monotonic() + SHUTDOWN_TIMEOUT_S
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(max(0.0, deadline - time.monotonic()))
        rank.kill()  # does nothing to one that has ended
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in a system call: a dead disk
            rank.wait(SHUTDOWN_TIMEOUT_S)


def rank_variables(attempt: int, place: rendezvous.Place, listener: int | None) -> dict[str, str]:
    """What a rank must be told by the process that supervises it. `listener`: the inherited socket on which
    rank 0 is to serve."""
    own = {ATTEMPT_VARIABLE: str(attempt), SUPERVISOR_VARIABLE: str(os.getpid())}
    return own | rendezvous.variables(place, listener)


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
        how = f"{signal_name(-code)} (signal {-code})"
        return Outcome("FAILED", 1, f"rank {rank} was killed by {how} after step {step}")
    with contextlib.suppress(FileNotFoundError):
        if line := error_file(run, attempt, rank).read_text(encoding="utf-8"):
            return Outcome("FAILED", exit_code, f"rank {rank}: {line}")
    line = f"rank {rank} exited with code {code} after step {step}; see {run.logs}"
    return Outcome("FAILED", exit_code, line)


def signal_name(number: int) -> str:
    """`SIGKILL`; those of real time have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return "a real-time signal"


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
    with contextlib.suppress(OSError):  # a full disk, or the run was deleted
        run.logs.mkdir(exist_ok=True)
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
