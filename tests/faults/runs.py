"""The small runs that faults befall, and the truth about them.

LAB/text/      what they read        LAB/corpora/   the same, as tokens
LAB/whole/     a run that nothing befell            its record is the truth
LAB/cut/       the same run, killed on its way      with two checkpoints, and rows after the newest
LAB/sweep/     a home with a finished sweep `s` of two runs
LAB/two/       the run on two ranks
LAB/other/     a run of another model, cut alike    for files that do not belong
LAB/seconds    how long a run takes here
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch

import pipeline.train as training
from launchers import manifest
from launchers.plan import freeze
from pipeline import rendezvous, worker
from pipeline.config import Config
from pipeline.store import RunDirectory, read_rows
from tests.faults.campaign import Place, Verdict
from tests.launchers.support import plan
from tests.support import config

SETTINGS = [
    "model=tiny", "model.layers=1", "model.width=16", "model.heads=2", "model.kv_heads=1", "model.ffn=32",
    "data=text", "data.workers=1", "data.validation_fraction=0.1", "data.sequence_length=32", "data.micro_batch=2",
    "batch=norm_test", "batch.size=4", "batch.max_size=16",
    "lr.warmup_tokens=1k", "eval.sequences=8", "eval.interval_tokens=1500", "budget.tokens=8k",
    "checkpoint.interval_tokens=1k", "parallel=single",
]  # fmt: skip
TWO = ["parallel=ddp", "parallel.replicate=2"]
CUT = 22  # the step after which LAB/cut was killed
TRUTH = (
    "step", "tokens", "sequences", "train/loss", "val/loss", "lr", "batch/size", "batch/requested", "grad/norm",
)  # fmt: skip
PATIENCE_S = 240.0  # for a run of seconds: on a machine that others use it may take a minute
_PROGRESS = ("run ", "step ", "again, ", "corpus ", "resumed ", "checkpoint at ", "  ")

Sabotage = Callable[[], None]


def settings(lab: Path) -> list[str]:
    return [*SETTINGS, f"data.files=[{lab}/text/*.txt]"]


def composed(lab: Path, *more: str) -> Config:
    """What was composed before is read, since that takes Hydra a second."""
    known = RunDirectory(lab / "whole")
    return known.config() if known.exists() and not more else config(*settings(lab), *more)


# --- what faults start from


def prepare_all(lab: Path, log: str) -> None:
    """What faults are to befall. What is printed goes to `log`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    prepare(lab)
    prepare_two(lab)


def prepare_two(lab: Path) -> None:
    home = lab / "two-home"
    home.mkdir()
    (home / "corpora").symlink_to(lab / "corpora")
    with environment(CRESCENDO_HOME=str(home), WANDB_MODE="disabled"):
        run = frozen(composed(lab, *TWO))
        assert command("pipeline.worker", str(run.path)).code == 0
        run.path.rename(lab / "two")


def prepare(lab: Path) -> None:
    """Trains what is in the lab, but for LAB/two. Once, in a process of its own."""
    (lab / "text").mkdir(parents=True)
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-b]*.py")):
        (lab / "text" / f"{source.stem}.txt").write_bytes(source.read_bytes())
    kill = at_step(CUT + 1, kill_self)
    for name, more, sabotage in (("whole", [], None), ("cut", [], kill), ("other", ["model.width=32"], kill)):
        home = lab / f"{name}-home"
        with environment(CRESCENDO_HOME=str(home), WANDB_MODE="disabled", OMP_NUM_THREADS="1"):
            if (lab / "corpora").exists():
                home.mkdir()
                (home / "corpora").symlink_to(lab / "corpora")
            run = frozen(composed(lab, *more))
            ended = Worker(run, sabotage).ended(120)
            if not (lab / "corpora").exists():
                (home / "corpora").rename(lab / "corpora")
            assert (ended.code == 0) == (sabotage is None), ended.output
            run.path.rename(lab / name)
            shutil.rmtree(home)
    home = lab / "sweep"
    home.mkdir()
    (home / "corpora").symlink_to(lab / "corpora")
    with environment(CRESCENDO_HOME=str(home), WANDB_MODE="disabled", OMP_NUM_THREADS="1"):
        planned = plan(*settings(lab), "seed=0,1", "sweep.name=s")
        freeze(planned.points)
        manifest.write(planned, "local")
        for point in planned.points:
            began = time.monotonic()
            assert Worker(point.directory).ended(120).code == 0
            (lab / "seconds").write_text(str(time.monotonic() - began))


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def frozen(config: Config) -> RunDirectory:
    run = RunDirectory.of(config)
    run.freeze(config)
    return run


def corpora(place: Place) -> None:
    if not (place.home / "corpora").exists():
        (place.home / "corpora").symlink_to(place.lab / "corpora")


def new_run(place: Place, *more: str) -> RunDirectory:
    """The run, not begun."""
    corpora(place)
    return frozen(composed(place.lab, *more))


def cut_run(place: Place) -> RunDirectory:
    """A copy of the one that was killed on its way."""
    corpora(place)
    run = RunDirectory.of(composed(place.lab))
    shutil.copytree(place.lab / "cut", run.path)
    return run


def sweep(place: Place) -> list[RunDirectory]:
    """Copies the home with the finished sweep. Its runs."""
    shutil.copytree(place.lab / "sweep", place.home, symlinks=True, dirs_exist_ok=True)
    return [RunDirectory(path) for path in sorted((place.home / "runs").iterdir())]


def span(lab: Path) -> float:
    """Seconds from the start of a run to its end, as it took here."""
    return float((lab / "seconds").read_text())


# --- the truth


def truth(path: Path) -> list[list[Any]]:
    """What of a record must be the same, row by row."""
    return [[row.get(key) for key in TRUTH] for row in RunDirectory(path).rows()]


def judged(run: RunDirectory, ended: Ended, lab: Path, reference: str = "whole") -> Verdict:
    """Of a run after its last attempt."""
    status = run.status()
    if ended.code is None:
        return Verdict("hung", "its last attempt did not end")
    if ended.code == 0 and status and status.state == "DONE":
        here, there = truth(run.path), truth(lab / reference)
        if here == there:
            return Verdict("survived")
        first = next((n for n, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), len(here))
        return Verdict("lost data", f"row {first} of {len(there)} is another: {here[first:][:1]}")
    return clean(ended, run.path)


def clean(ended: Ended, path: Path) -> Verdict:
    """Of a command that failed: it must name what is wrong, in a paragraph, and no traceback."""
    text = ended.output.strip()
    lines = [line for line in text.splitlines() if ": FAILED: " in line or not line.startswith(_PROGRESS)]
    names = (path.name, ".json", "config.yaml", "checkpoint", "step ")
    said = [line for line in lines if any(name in line for name in names)]
    if ended.code in (0, None) or "Traceback" in text or not said:
        return Verdict("lost data", f"exit code {ended.code}: {text[-400:]}")
    return Verdict("failed cleanly", said[-1][:300])


# --- attempts


@dataclass(frozen=True)
class Ended:
    """`code` None: it did not within its time; negative: by this signal."""

    code: int | None
    output: str


class Worker:
    """`python -m pipeline.worker RUN`, forked from here instead of started anew, which takes seconds; so is
    its rank, before whose first step `sabotage` is called. All else is the real thing."""

    def __init__(
        self, run: RunDirectory, sabotage: Sabotage | None = None, output: Path | None = None
    ) -> None:
        self._output = output or run.path.parent.parent / f"{run.id}.output"
        self._output.parent.mkdir(parents=True, exist_ok=True)
        self._process = fork(self._output, lambda: _worker(run, sabotage))

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def signal(self, number: int) -> None:
        assert self._process.pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def ended(self, timeout_s: float = PATIENCE_S) -> Ended:
        self._process.join(timeout_s)
        code = self._process.exitcode
        text = self._output.read_text(errors="replace")
        sys.stdout.write(text)
        return Ended(code, text)


def fork(output: Path, function: Callable[[], int]) -> ForkProcess:
    def inside() -> None:
        log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0, closefd=False), write_through=True)
        sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0, closefd=False), write_through=True)
        sys.exit(function())

    process = multiprocessing.get_context("fork").Process(target=inside)
    process.start()
    return process


def _worker(run: RunDirectory, sabotage: Sabotage | None) -> int:
    worker._start_ranks = functools.partial(_forked_rank, sabotage)
    return worker.main([str(run.path)])


def _forked_rank(
    sabotage: Sabotage | None,
    config: Config,
    run: RunDirectory,
    attempt: int,
    changes: Sequence[str],
    started: list[_Forked],
) -> None:
    """In the place of `worker._start_ranks`."""
    place = rendezvous.Place(0, 1, 0, 1, "127.0.0.1", 0)
    os.environ |= worker.rank_variables(attempt, place, None)
    rank = os.fork()
    if not rank:
        try:
            worker._die_with_supervisor()
            torch.set_num_threads(1)
            if sabotage:
                sabotage()
            worker.run_rank(run.config(), run)
        finally:
            os._exit(70)
    started.append(_Forked(rank))


class _Forked:
    """A child of this process, with the manners of subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        self._pid, self._code = pid, None

    def poll(self) -> int | None:
        if self._code is None:
            ended, status = os.waitpid(self._pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if ended else None
        return self._code

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(0.01)
        return code

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self._pid, number)


def finished(run: RunDirectory, attempts: int = 2, output: Path | None = None) -> Ended:
    """Asks for the run, as somebody would until it is done."""
    for _ in range(attempts):
        ended = Worker(run, output=output).ended()
        if ended.code in (0, None):
            break
    return ended


def command(module: str, *arguments: str, timeout_s: float = PATIENCE_S, **variables: str) -> Ended:
    """`python -m module arguments`, really started."""
    return Command(module, *arguments, **variables).ended(timeout_s)


class Command:
    def __init__(self, module: str, *arguments: str, **variables: str) -> None:
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def ended(self, timeout_s: float = PATIENCE_S) -> Ended:
        try:
            code: int | None = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        self._output.seek(0)
        text = self._output.read()
        sys.stdout.write(text)
        return Ended(code, text)


def in_process(main: Callable[[Sequence[str]], int], *arguments: str) -> Ended:
    """A command's `main` here: its exit code and all it printed; a traceback as it would have printed it."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            code: int = main(list(arguments))
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        except Exception:
            traceback.print_exc(file=text)
            code = 1
    sys.stdout.write(text.getvalue())
    return Ended(code, text.getvalue())


# --- sabotage, in the rank


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(number: int, act: Callable[[], None]) -> Sabotage:
    """Does it before this optimizer step."""

    def sabotage() -> None:
        step = training.Trainer.step

        def sabotaged(trainer: training.Trainer) -> None:
            if trainer.progress.step + 1 == number:
                act()
            step(trainer)

        training.Trainer.step = sabotaged  # type: ignore[method-assign]

    return sabotage


def steps(lab: Path) -> int:
    """Of the whole run."""
    return int(read_rows(lab / "whole" / "metrics.jsonl")[-1]["step"])


def wait(until: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not until():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)
