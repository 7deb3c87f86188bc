"""Faults, injected one by one, each into a process and a directory of its own, and what became of the run.

    survived        the run ended with the record that it would have had without the fault
    failed cleanly  it said in a line what is wrong and how to go on, and nothing that was there is gone
    lost data       anything else that came to an end: another record, a missing one, a traceback
    hung            what did not end in time, or left a process behind
    skipped         it could not be injected here: a disk needs the right to mount one

A family is a function that injects fault number n; what it draws comes from the random numbers it is given, so
that a seed and a number name a fault.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Literal, get_args

from _pytest.outcomes import Skipped

from tests.support import ROOT

Outcome = Literal["survived", "failed cleanly", "lost data", "hung", "skipped"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
BAD: tuple[Outcome, ...] = ("lost data", "hung")

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: orphans below a fault become its own children
_LEAVE_S = 15.0  # for processes that are about to end
_SLEEPERS = 8  # faults that mostly wait, at the same time


@dataclass(frozen=True)
class Verdict:
    outcome: Outcome
    why: str = ""


@dataclass(frozen=True)
class Place:
    """Of one fault: `home` is its CRESCENDO_HOME; `lab` holds what all faults start from, see runs.py."""

    lab: Path
    home: Path


Inject = Callable[[Place, random.Random, int], Verdict]


@dataclass(frozen=True)
class Family:
    """`faults` of it are injected, each within `timeout_s`; `sleeps`: mostly they wait for something."""

    name: str
    faults: int
    inject: Inject
    timeout_s: float
    sleeps: bool

    def numbers(self, part: int, parts: int) -> list[int]:
        """Of a share: every `parts`-th fault, and one in any case. Shuffled, since a number says what kind of
        fault it is by its remainders."""
        shuffled = random.Random(self.name).sample(range(self.faults), self.faults)
        return shuffled[(part - 1) % min(parts, self.faults) :: parts]


FAMILIES: dict[str, Family] = {}


def family(
    name: str, faults: int, timeout_s: float = 600.0, sleeps: bool = False
) -> Callable[[Inject], Inject]:
    """Registers a function as a family of faults."""

    def register(inject: Inject) -> Inject:
        FAMILIES[name] = Family(name, faults, inject, timeout_s, sleeps)
        return inject

    return register


# By the process that faults are forked from: these take seconds, and most runs that a fault befalls save something.
PRELOADED = ["tests.faults.families", "torch._dynamo", "torch.distributed.checkpoint.state_dict"]


@dataclass
class Tally:
    """Of one family."""

    family: str
    seconds: float = 0.0  # of its faults together
    verdicts: dict[int, Verdict] = field(default_factory=dict)

    @property
    def injected(self) -> int:
        return len(self.verdicts) - self.count("skipped")

    def count(self, outcome: Outcome) -> int:
        return sum(verdict.outcome == outcome for verdict in self.verdicts.values())


def campaign(
    families: Iterable[Family],
    lab: Path,
    seed: int = 0,
    share: tuple[int, int] = (1, 1),
    jobs: int = 2,
    tell: Callable[[Tally], None] = lambda tally: None,
) -> list[Tally]:
    """Injects the faults of these families, `jobs` at a time; `tell` hears of each family that is through."""
    tallies = []
    multiprocessing.set_forkserver_preload(PRELOADED)
    with ThreadPoolExecutor(jobs) as busy, ThreadPoolExecutor(_SLEEPERS) as sleepers:
        begun: list[tuple[Family, dict[int, Future[tuple[Verdict, float]]]]] = []
        for each in sorted(families, key=lambda each: not each.sleeps):
            pool = sleepers if each.sleeps else busy
            begun.append((each, {n: pool.submit(inject, each, lab, seed, n) for n in each.numbers(*share)}))
        for each, futures in sorted(begun, key=lambda pair: pair[0].sleeps):
            tally = Tally(each.name)
            for number, future in futures.items():
                tally.verdicts[number], seconds = future.result()
                tally.seconds += seconds
            tell(tally)
            tallies.append(tally)
    return tallies


def inject(family: Family, lab: Path, seed: int, number: int) -> tuple[Verdict, float]:
    """One fault in a process of its own, and how many seconds it took. None of its processes is left."""
    began = time.monotonic()
    place = Place(lab, lab / "faults" / re.sub(r"\W+", "-", f"{family.name} {seed} {number}"))
    shutil.rmtree(place.home, ignore_errors=True)
    place.home.mkdir(parents=True)
    answer = place.home.with_suffix(".verdict")
    answer.unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_fault, args=(family, place, seed, number, answer))
    process.start()
    process.join(family.timeout_s)
    verdict = _verdict(family, process, answer)
    if verdict.outcome not in BAD:  # else somebody will want to see it
        shutil.rmtree(place.home, ignore_errors=True)
        answer.unlink(missing_ok=True)
    return verdict, time.monotonic() - began


def _verdict(family: Family, process: ForkServerProcess, answer: Path) -> Verdict:
    assert process.pid
    if process.is_alive():
        stuck = descendants(process.pid)
        for pid in [process.pid, *stuck]:
            _kill(pid)
        process.join()
        return Verdict("hung", f"nothing after {family.timeout_s:.0f} s: {'; '.join(stuck.values())}")
    if not answer.exists():
        return Verdict("lost data", f"the fault itself ended with exit code {process.exitcode}")
    told = json.loads(answer.read_text())
    return Verdict(told["outcome"], told["why"])


def _fault(family: Family, place: Place, seed: int, number: int, answer: Path) -> None:
    """In the process of the fault."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)
    output = os.open(place.home.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for variable in [v for v in os.environ if v.startswith(("WANDB_", "CRESCENDO_", "SLURM_"))]:
        del os.environ[variable]
    user = place.home.with_suffix(".user")
    user.mkdir(exist_ok=True)
    os.environ.update(
        CRESCENDO_HOME=str(place.home), WANDB_MODE="disabled", HOME=str(user), OMP_NUM_THREADS="1"
    )
    os.environ["PYTHONPATH"] = str(ROOT)
    os.chdir(ROOT)
    try:
        verdict = family.inject(place, random.Random(f"{seed} {family.name} {number}"), number)
    except Skipped as reason:
        verdict = Verdict("skipped", str(reason))
    except Exception as error:
        traceback.print_exc()
        verdict = Verdict("lost data", f"{type(error).__name__}: {error}")
    if verdict.outcome != "hung" and (left := _left_over()):
        verdict = Verdict("hung", f"left behind: {'; '.join(left)}")
    shutil.rmtree(user, ignore_errors=True)
    if verdict.outcome not in BAD:
        place.home.with_suffix(".log").unlink()
    answer.write_text(json.dumps({"outcome": verdict.outcome, "why": verdict.why}))


def _left_over() -> list[str]:
    """The command lines of processes that outlive the fault; they are ended."""
    deadline = time.monotonic() + _LEAVE_S
    while left := descendants(os.getpid()):
        _reap()
        if time.monotonic() > deadline:
            for pid in left:
                _kill(pid)
            return list(left.values())
        time.sleep(0.05)
    return []


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def descendants(of: int) -> dict[int, str]:
    """The living processes below this one: their numbers and what they run."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue  # it ended while we looked
        if state != "Z":
            parents[int(path.parent.name)] = int(parent)
    found: dict[int, str] = {}
    above = {of}
    while above:
        above = {pid for pid, parent in parents.items() if parent in above}
        found |= {pid: _command(pid) for pid in above}
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()[:120] or str(pid)
    except OSError:
        return str(pid)
