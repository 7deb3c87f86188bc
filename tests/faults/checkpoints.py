"""Damaged checkpoints."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.faults.campaign import Place, Verdict, family
from tests.faults.files import DAMAGE
from tests.faults.runs import cut_run, finished, judged


@family("checkpoint", 150)
def checkpoint(place: Place, draw: random.Random, number: int) -> Verdict:
    """One file of the newest checkpoint, or of all, is damaged before the run goes on."""
    run = cut_run(place)
    others = sorted(path for path in (place.lab / "other" / "checkpoints").rglob("*") if path.is_file())
    before = run.metrics_file.read_bytes()
    kind = KINDS[number % len(KINDS)]
    for path in run.complete_checkpoints()[-1:] if number % 4 else run.complete_checkpoints():
        kind(path, draw, others)
    ended = finished(run, attempts=1)
    verdict = judged(run, ended, place.lab)
    if verdict.outcome == "failed cleanly" and not run.metrics_file.read_bytes().startswith(before):
        return Verdict("lost data", "rows are gone from the record of a run that did not go on")
    if verdict.outcome == "failed cleanly" and not run.complete_checkpoints():
        return Verdict("lost data", "checkpoints are gone of a run that did not go on")
    return verdict


Kind = Callable[[Path, random.Random, list[Path]], None]


def on_a_file(damage: Callable[[bytes, random.Random], bytes]) -> Kind:
    def kind(path: Path, draw: random.Random, others: list[Path]) -> None:
        file = draw.choice(sorted(path.iterdir()))
        file.write_bytes(damage(file.read_bytes(), draw))

    return kind


def missing(path: Path, draw: random.Random, others: list[Path]) -> None:
    draw.choice(sorted(path.iterdir())).unlink()


def foreign(path: Path, draw: random.Random, others: list[Path]) -> None:
    """A file of another model's checkpoint."""
    file = draw.choice(sorted(path.iterdir()))
    shutil.copyfile(draw.choice([other for other in others if other.name == file.name]), file)


def all_foreign(path: Path, draw: random.Random, others: list[Path]) -> None:
    """The whole checkpoint is another model's."""
    for file in path.iterdir():
        shutil.copyfile(next(other for other in others if other.name == file.name), file)


def older(path: Path, draw: random.Random, others: list[Path]) -> None:
    """A file of another checkpoint of the run."""
    other = next(other for other in sorted(path.parent.glob("step-*")) if other != path)
    file = draw.choice(sorted(path.iterdir()))
    shutil.copyfile(other / file.name, file)


def directory(path: Path, draw: random.Random, others: list[Path]) -> None:
    """Where a file was is a directory."""
    file = draw.choice(sorted(path.iterdir()))
    file.unlink()
    file.mkdir()


def stray(path: Path, draw: random.Random, others: list[Path]) -> None:
    """What is none of the run's lies beside it."""
    name = draw.choice([f"{path.name}.copy", "partial-00000099", "step-x"])
    shutil.copytree(path, path.with_name(name), dirs_exist_ok=True)
    (path / "stray").write_bytes(draw.randbytes(100))


KINDS = [*map(on_a_file, DAMAGE), missing, foreign, all_foreign, older, directory, stray]
