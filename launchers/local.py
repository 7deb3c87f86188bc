"""hydra/launcher=local: runs a sweep on this machine, launch.max_parallel points at a time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Literal

from launchers import manifest
from launchers.compose import Compose
from launchers.plan import Plan, Point, PointState, freeze, make_plan, state
from launchers.preview import EXCUSES, introduce
from launchers.scheduler import queue_of
from launchers.screen import conclude, screen
from launchers.state import UNFINISHED, Queue
from launchers.table import make_console, progress, say, tally
from pipeline.config import Config
from pipeline.store import AlreadyRunning, RunDirectory
from pipeline.worker import SHUTDOWN_TIMEOUT_S, STOP_GRACE_S, signal_name, threads_per_rank

POLL_S = 0.1
GRACE_S = STOP_GRACE_S + SHUTDOWN_TIMEOUT_S + 5  # between SIGTERM and SIGKILL: longer than a worker's own

Command = Callable[[Path], list[str]]


def worker_command(run: Path) -> list[str]:
    """Executes a frozen run directory, with this interpreter."""
    return [sys.executable, "-m", "pipeline.worker", str(run)]


def launch(jobs: Sequence[Sequence[str]], compose: Compose) -> int:
    """Plans, freezes and runs a sweep. The exit code: 0 well, 1 some run failed, 2 invalid, 128 + signal."""
    return run_plan(make_plan(progress(jobs, "composing"), compose))


def run_plan(plan: Plan, command: Command = worker_command, known: bool = False) -> int:
    """`known`: the sweep's manifest holds the points already. The exit code as above."""
    console = make_console()
    if not introduce(console, plan):
        return 2
    queue = queue_of(point.directory.status() for point in plan.valid)
    states = [state(point, queue) for point in plan.points]
    todo = [point for point, s in zip(plan.points, states, strict=True) if s in UNFINISHED]
    freeze(todo)
    for point in todo:
        _expect(point.directory)
    if not known:
        manifest.write(plan, "local")
    console.print()
    say(console, f"{tally(states, EXCUSES)}.")
    sweep = LocalSweep(plan, queue, command)
    with stop_signal() as stop, screen(console, plan) as view:
        try:
            while sweep.unfinished and not stop.number:
                view.update(sweep.states, sweep.advance())
                time.sleep(POLL_S)
        finally:  # whatever happened above, no worker outlives this process
            if stop.number and sweep.running:
                say(console, "Stopping at the next step, with a checkpoint. Once more to stop at once.")
            changed = [*sweep.stop(stop), *sweep.look_elsewhere()]
            view.update(sweep.states, changed, last=True)
    conclude(console, plan, sweep.states, stop.number)
    if stop.number:
        return 128 + stop.number
    return 1 if "failed" in sweep.states.values() else 0


@dataclass(frozen=True)
class Worker:
    """A run that goes on, as a process of this machine."""

    point: Point
    process: subprocess.Popen[bytes]
    log: IO[bytes]


class LocalSweep:
    """The workers of one sweep. `states` says for each run: waiting, running, done, failed, cancelled or
    elsewhere (another process or the cluster has it); at the end also the state that was left behind there.
    """

    def __init__(self, plan: Plan, queue: Queue | None, command: Command) -> None:
        self._plan, self._queue, self._command = plan, queue, command
        self._began = time.time()
        done = {run_of(point) for point in plan.valid if self._state(point) == "done"}
        self._waiting = deque(point for point in plan.valid if point.run not in done)
        self._workers: dict[str, Worker] = {}
        self.states = {run_of(p): "done" if p.run in done else "waiting" for p in plan.valid}

    @property
    def running(self) -> bool:
        return bool(self._workers)

    @property
    def unfinished(self) -> bool:
        return bool(self._waiting) or self.running

    def advance(self) -> list[Point]:
        """Collects workers that ended and starts the next. The points whose state changed."""
        ended = [worker for worker in self._workers.values() if worker.process.poll() is not None]
        for worker in ended:
            self._settle(worker, "FAILED")
        changed = [worker.point for worker in ended]
        while self._waiting and len(self._workers) < self._limit:
            point = self._waiting.popleft()
            # Looked up now, not when the sweep was planned: another launcher may have been at it since.
            match self._state(point):
                case "done":
                    self.states[run_of(point)] = "done"
                case "running" | "queued":
                    self.states[run_of(point)] = "elsewhere"
                case "cancelled" if self._cancelled_meanwhile(point):
                    self.states[run_of(point)] = "cancelled"
                case _:
                    self._start(point)
            changed.append(point)
        return changed

    def stop(self, stop: StopSignal) -> list[Point]:
        """Ends every worker: SIGTERM, then SIGKILL after a grace period or at a second signal."""
        workers = list(self._workers.values())
        for worker in workers:
            worker.process.terminate()
        patience = time.monotonic() + GRACE_S
        signals = stop.count
        while any(worker.process.poll() is None for worker in workers):
            if time.monotonic() > patience or stop.count > signals:
                for worker in workers:
                    _kill_group(worker)
            time.sleep(POLL_S)
        for worker in workers:
            self._settle(worker, "CANCELLED")
        return [worker.point for worker in workers]

    def look_elsewhere(self) -> list[Point]:
        """Takes the states that runs held by other processes have come to. The points that changed."""
        changed = []
        for point in self._plan.valid:
            run = run_of(point)
            left = self._state(point)
            if self.states[run] == "elsewhere" and left not in ("running", "queued"):
                self.states[run] = "waiting" if left == "new" else left
                manifest.link_wandb(self._plan.name, run)
                changed.append(point)
        return changed

    def _state(self, point: Point) -> PointState:
        return state(point, self._queue)

    def _cancelled_meanwhile(self, point: Point) -> bool:
        """By `launchers cancel`, while the point waited here; what was cancelled before the sweep is run."""
        status = point.directory.status()
        return status is not None and (status.updated or 0) > self._began

    @property
    def _limit(self) -> int:
        return _config(self._plan.valid[0]).launch.max_parallel or 1

    def _start(self, point: Point) -> None:
        run, config = point.directory, _config(point)
        threads = threads_per_rank(config, self._limit * config.parallel.world_size)
        run.logs.mkdir(parents=True, exist_ok=True)
        log = open(run.logs / "launcher.log", "ab")  # noqa: SIM115 - closed when the worker has ended
        process = subprocess.Popen(
            self._command(run.path),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends its workers in order
        )
        self._workers[run.id] = Worker(point, process, log)
        self.states[run.id] = "running"

    def _settle(self, worker: Worker, verdict: Literal["FAILED", "CANCELLED"]) -> None:
        """Takes the state a worker left behind; one that died without a word gets the verdict."""
        run, code = worker.point.directory, worker.process.wait()
        _kill_group(worker)  # ranks that outlived their supervisor
        worker.log.close()
        del self._workers[run.id]
        left = self._state(worker.point)
        if left in ("new", "lost"):
            how = f"killed by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
            error = f"the worker was {how}" if code < 0 else f"the worker {how} without a word"
            run.update_status(state=verdict, exit_code=code, error=error)
            left = self._state(worker.point)
        self.states[run.id] = "elsewhere" if left == "running" else left
        manifest.link_wandb(self._plan.name, run.id)


class StopSignal:
    """The first signal that asked this process to end, and how many did."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.count = 0

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        self.count += 1


@contextlib.contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Notes signals instead of acting on them, so that none arrives between the start of a worker and its
    registration. Signals that are ignored (nohup, a background job) stay ignored."""
    stop = StopSignal()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop.receive)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _expect(run: RunDirectory) -> None:
    """Says that it waits to run, so that it can be cancelled, whatever became of it before. The error of then
    stays until it begins."""
    with contextlib.suppress(AlreadyRunning), run.lock():
        status = run.status()
        if status and status.state not in ("PENDING", "DONE"):  # the latter: by somebody else, just now
            run.update_status(state="PENDING", job=None, exit_code=None)


def run_of(point: Point) -> str:
    """The id of a valid point."""
    assert point.run
    return point.run


def _config(point: Point) -> Config:
    assert point.config
    return point.config


def _kill_group(worker: Worker) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.process.pid, signal.SIGKILL)
