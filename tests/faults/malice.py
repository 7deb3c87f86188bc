"""Files that would have code executed by whoever reads them: the code is to leave a mark, and must not."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from analysis.__main__ import main as analysis
from pipeline.checkpoint import _crc32
from pipeline.store import RunDirectory, sealed
from pipeline.worker import main as worker
from tests.faults.campaign import Place, Verdict, family
from tests.faults.files import shown
from tests.faults.runs import clean, cut_run, finished, in_process, judged


class Bomb:
    """Unpickled, it leaves the mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@family("malicious file", 32)
def malicious_file(place: Place, draw: random.Random, number: int) -> Verdict:
    run, mark = cut_run(place), place.home / "mark"
    attack = ATTACKS[number % len(ATTACKS)]
    verdict = attack(run, mark, draw) or shown(run.id, run.path) or judged(run, finished(run, 1), place.lab)
    if mark.exists():
        return Verdict("lost data", f"{attack.__name__}: code was executed")
    return verdict


def _seal(checkpoint: Path) -> None:
    """With checksums that are right: who writes a file can write those."""
    file = checkpoint / "progress.json"
    tree = json.loads(file.read_text()) | {
        "metadata_crc32": zlib.crc32((checkpoint / ".metadata").read_bytes())
    }
    del tree["crc32"]
    file.write_text(json.dumps(tree | {"crc32": _crc32(tree)}))


def index_is_a_bomb(run: RunDirectory, mark: Path, draw: random.Random) -> None:
    for path in run.complete_checkpoints():
        (path / ".metadata").write_bytes(pickle.dumps(Bomb(mark)))
        _seal(path)


def bomb_in_the_index(run: RunDirectory, mark: Path, draw: random.Random) -> None:
    for path in run.complete_checkpoints():
        index = pickle.loads((path / ".metadata").read_bytes())
        setattr(index, draw.choice(["planner_data", "storage_meta", "version"]), Bomb(mark))
        (path / ".metadata").write_bytes(pickle.dumps(index))
        _seal(path)


def bomb_in_a_shard(run: RunDirectory, mark: Path, draw: random.Random) -> None:
    """In the place of a tensor or of a setting of the optimizer."""
    bomb = io.BytesIO()
    torch.save(Bomb(mark), bomb)
    for path in run.complete_checkpoints():
        index = pickle.loads((path / ".metadata").read_bytes())
        key = draw.choice(sorted(index.storage_data, key=lambda key: key.fqn))
        entry = index.storage_data[key]
        with open(path / entry.relative_path, "ab") as file:
            entry.offset, entry.length = file.tell(), len(bomb.getvalue())
            file.write(bomb.getvalue())
        (path / ".metadata").write_bytes(pickle.dumps(index))
        _seal(path)


def shard_elsewhere(run: RunDirectory, mark: Path, draw: random.Random) -> None:
    for path in run.complete_checkpoints():
        index = pickle.loads((path / ".metadata").read_bytes())
        for entry in index.storage_data.values():
            entry.relative_path = "../../" + entry.relative_path
        (path / ".metadata").write_bytes(pickle.dumps(index))
        _seal(path)


def tag_in_the_config(run: RunDirectory, mark: Path, draw: random.Random) -> None:
    text = run.config_file.read_text().partition("\n")[2]
    text = text.replace("seed: 0", f"seed: !!python/object/apply:os.system ['touch {mark}']", 1)
    run.config_file.write_text(sealed(text) if draw.random() < 0.5 else text)


def tag_in_an_override(run: RunDirectory, mark: Path, draw: random.Random) -> Verdict:
    tag = f"parallel.replicate=!!python/object/apply:os.system ['touch {mark}']"
    return clean(in_process(worker, str(run.path), tag), Path("parallel.replicate"))


def tag_in_a_study(run: RunDirectory, mark: Path, draw: random.Random) -> Verdict:
    study = mark.with_name("study.yaml")
    study.write_text(f"source: !!python/object/apply:os.system ['touch {mark}']\n")
    return clean(in_process(analysis, str(study)), study)


def corpus_of_objects(run: RunDirectory, mark: Path, draw: random.Random) -> None:
    """Numbers that are to be taken for addresses of Python objects."""
    corpora = mark.with_name("corpora")
    real = corpora.resolve()
    corpora.unlink()
    shutil.copytree(real, corpora)
    for file in corpora.glob("*/report.json"):
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {"dtype": draw.choice(["O", "V8", "nonsense", 3])})
        )


Attack = Callable[[RunDirectory, Path, random.Random], Verdict | None]
ATTACKS: tuple[Attack, ...] = (
    index_is_a_bomb, bomb_in_the_index, bomb_in_a_shard, shard_elsewhere,
    tag_in_the_config, tag_in_an_override, tag_in_a_study, corpus_of_objects,
)  # fmt: skip
