"""Executes one frozen run directory: the only door into training.

    python -m pipeline.worker RUN_DIR

Started plainly it is the supervisor: it takes the run's lock, starts one process per rank with torch's
elastic launcher, and turns however they end into the run's status. Started with RANK set (by itself, by
torchrun or by SLURM) it is one rank. Exit codes: 0 done (or somebody else is at it), 1 failed, 2 the run
directory is wrong, 128 + n stopped by signal n.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

from pipeline.config import Config, ConfigError, check
from pipeline.store import AlreadyRunning, RunDirectory, home

ATTEMPT_VARIABLE = "CRESCENDO_ATTEMPT"
PROGRESS_INTERVAL_S = 5.0
SHUTDOWN_TIMEOUT_S = 10


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m pipeline.worker RUN_DIR", file=sys.stderr)
        return 2
    run = RunDirectory(Path(arguments[0]).resolve())
    try:
        config = run.config()
        check(config)
        return run_rank(config, run) if "RANK" in os.environ else supervise(config, run)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except AlreadyRunning as error:
        print(f"{error}; nothing to do here")
        return 0


# --- the supervisor --------------------------------------------------------------------------------------


def supervise(config: Config, run: RunDirectory) -> int:
    """Runs all ranks of the next attempt and records how they ended. Raises AlreadyRunning."""
    signal.signal(signal.SIGTERM, _interrupt)
    with run.lock():
        status = run.status()
        if status and status.state == "DONE":
            print(f"run {run.id} is done: {run.path}")
            return 0
        attempt = status.attempt + 1 if status else 1
        run.update_status(
            state="RUNNING",
            attempt=attempt,
            started=time.time(),
            budget_tokens=config.budget_tokens,
            host=socket.gethostname(),
            job=os.environ.get("SLURM_JOB_ID"),
            exit_code=None,
            error=None,
        )
        print(f"run {run.id}: attempt {attempt}, logs in {run.logs}", flush=True)
        finished = threading.Event()
        reporter = threading.Thread(target=_report_progress, args=(run, finished), daemon=True)
        reporter.start()
        try:
            state, exit_code, error = _run_ranks(config, run, attempt)
        finally:
            finished.set()
            reporter.join()
        run.update_status(state=state, exit_code=exit_code, error=error)
        print(f"run {run.id}: {state}" + (f": {error}" if error else ""), flush=True)
        return exit_code


def _run_ranks(config: Config, run: RunDirectory, attempt: int) -> tuple[str, int, str | None]:
    """(state, exit code, error) of one attempt."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from pipeline.data import prepare

    os.environ[ATTEMPT_VARIABLE] = str(attempt)
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads_per_rank(config)))
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
        local_addr="localhost",
    )
    command = [sys.executable, "-m", "pipeline.worker", str(run.path)]
    try:
        # Before the ranks start, so that none of them waits in a collective for another's tokenising.
        prepare(config.data, home() / "corpora", report=print, progress=sys.stdout.isatty())
        elastic_launch(launch, command[0])(*command[1:])
    except ConfigError as error:
        return "FAILED", 1, str(error)
    except ChildFailedError as failure:
        return "FAILED", 1, _cause(run, attempt, failure)
    except (SignalException, KeyboardInterrupt) as stop:
        number = stop.sigval if isinstance(stop, SignalException) else (stop.args or [signal.SIGINT])[0]
        return "CANCELLED", 128 + number, f"stopped by {signal.Signals(number).name}"
    return "DONE", 0, None


def _interrupt(number: int, frame: object) -> None:
    """SIGTERM before or after torch's launcher is in charge of signals."""
    raise KeyboardInterrupt(number)


def _threads_per_rank(config: Config) -> int:
    return config.launch.cpus_per_task or max(1, (os.cpu_count() or 1) // config.parallel.world_size)


def _cause(run: RunDirectory, attempt: int, failure: Exception) -> str:
    """One line: which rank ended the attempt, and why."""
    rank, first = failure.get_first_failure()  # type: ignore[attr-defined]
    step = status.step if (status := run.status()) else 0
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        return f"rank {rank} was killed by {name} (signal {-first.exitcode}) after step {step}"
    try:
        return f"rank {rank}: {error_file(run, attempt, rank).read_text(encoding='utf-8')}"
    except FileNotFoundError:
        return f"rank {rank} exited with code {first.exitcode} after step {step}; see {run.logs}"


def _report_progress(run: RunDirectory, finished: threading.Event) -> None:
    """A line every few seconds for whoever watches."""
    reported = -1
    while not finished.wait(PROGRESS_INTERVAL_S):
        status = run.status()
        row = run.last_row()
        if status and row and status.step != reported:
            reported = status.step
            print(
                f"step {row['step']}  {row['tokens'] / max(1, status.budget_tokens):4.0%} of "
                f"{status.budget_tokens:,} tokens  loss {row['train/loss']:.4f}  "
                f"batch {row['batch/size']}  {row['throughput/tokens_per_s']:,.0f} tokens/s",
                flush=True,
            )


# --- one rank --------------------------------------------------------------------------------------------


def log_file(run: RunDirectory, attempt: int, rank: int) -> Path:
    return run.logs / f"attempt-{attempt}.rank-{rank}.log"


def error_file(run: RunDirectory, attempt: int, rank: int) -> Path:
    return run.logs / f"attempt-{attempt}.rank-{rank}.error"


def run_rank(config: Config, run: RunDirectory) -> int:
    """This process's share of the run. Output goes to logs/; an error also, as one line, to its own file."""
    rank = int(os.environ["RANK"])
    attempt = int(os.environ.get(ATTEMPT_VARIABLE, 1))
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a stop is not an error worth a traceback
    run.logs.mkdir(parents=True, exist_ok=True)
    log = os.open(log_file(run, attempt, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        from pipeline.parallel._ranks import process_group
        from pipeline.train import train

        with process_group(config) as ranks:
            train(config, run, attempt, ranks)
        return 0
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        if _lost_a_peer(error):
            # The rank that died first is the cause; this one only noticed. Let it be seen first.
            time.sleep(1.0)
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        error_file(run, attempt, rank).write_text(line, encoding="utf-8")
        # Other ranks may be inside a collective that will never complete: leave without waiting for them.
        os._exit(1)


def _lost_a_peer(error: Exception) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "peer" in str(error) or "gloo" in str(error)


def _die_with_parent() -> None:
    """A rank must not outlive its supervisor, however that ends (Linux: PR_SET_PDEATHSIG = 1)."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
