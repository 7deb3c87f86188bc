"""A full disk, and one that becomes read-only, for a while or until somebody mends it."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.disk import fill, mounted
from tests.faults.campaign import Place, Verdict, family
from tests.faults.runs import Worker, at_step, clean, composed, finished, frozen, judged, new_run, steps


@family("full disk", 40)
def full_disk(place: Place, draw: random.Random, number: int) -> Verdict:
    """From a random step on, to the last byte or nearly; every other one has room again some steps later."""
    with mounted(place.home / "disk", "4m") as disk:
        (disk / "corpora").symlink_to(place.lab / "corpora")
        os.environ["CRESCENDO_HOME"] = str(disk)
        run = frozen(composed(place.lab))
        last, left = steps(place.lab), draw.choice([0, 0, 4096, 20_000, 100_000])
        begin = draw.randint(1, last)
        acts = {begin: lambda: fill(disk, left)}
        if number % 2:
            acts[min(last, begin + draw.randint(1, 9))] = lambda: (disk / "ballast").unlink(missing_ok=True)
        ended = Worker(run, in_turn(acts), output=place.home / "output").ended()
        (disk / "ballast").unlink(missing_ok=True)
        if ended.code is None:
            return Verdict("hung", "it waits for room")
        if ended.code and (told := clean(ended, run.path)).outcome != "failed cleanly":
            return told
        return judged(run, finished(run, output=place.home / "output"), place.lab)


@family("read-only", 24)
def read_only(place: Place, draw: random.Random, number: int) -> Verdict:
    """The run directory or one within it, from the beginning or from a random step on."""
    run = new_run(place)
    what = (run.path, run.checkpoints, run.logs, run.path.parent)[number % 4]
    what.mkdir(parents=True, exist_ok=True)
    output = place.home / "output"
    with bound(what):
        if number % 8 < 4:
            protect(what)
            ended = Worker(run, output=output).ended()
        else:
            at = draw.randint(1, steps(place.lab))
            ended = Worker(run, at_step(at, lambda: protect(what)), output=output).ended()
    if ended.code is None:
        return Verdict("hung", f"{what} is read-only")
    if ended.code and (told := clean(ended, run.path)).outcome != "failed cleanly":
        return told
    return judged(run, finished(run, output=output), place.lab)


@contextlib.contextmanager
def bound(what: Path) -> Iterator[None]:
    """Mounted over itself, so that it alone can be made read-only: root may write whatever the mode says."""
    bind = subprocess.run(["mount", "--bind", what, what], capture_output=True, text=True, check=False)
    if bind.returncode:
        pytest.skip(f"a read-only directory needs the right to mount one: {bind.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", what], check=True)


def protect(what: Path) -> None:
    subprocess.run(["mount", "-o", "remount,bind,ro", what], check=True)


def in_turn(acts: dict[int, Callable[[], object]]) -> Callable[[], None]:
    def sabotage() -> None:
        for step, act in acts.items():
            at_step(step, act)()

    return sabotage
