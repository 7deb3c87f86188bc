"""Damaged files of a run or a sweep: the record, the status, the frozen config, the manifest."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from analysis.load import load_sweep
from analysis.sources import attempt
from launchers.__main__ import main as launchers
from pipeline.config import ConfigError
from pipeline.store import RunDirectory
from tests.faults.campaign import Place, Verdict, family
from tests.faults.runs import Worker, at_step, cut_run, finished, in_process, judged, steps, sweep, truth

Damage = Callable[[bytes, random.Random], bytes]

# --- what can become of bytes


def flipped(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]


def truncated(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def empty(data: bytes, draw: random.Random) -> bytes:
    return b""


def zeroed(data: bytes, draw: random.Random) -> bytes:
    """As a power cut leaves what was not written yet."""
    at = draw.randrange(len(data))
    length = min(len(data) - at, draw.choice([1, 16, 512, 4096, len(data)]))
    return data[:at] + bytes(length) + data[at + length :]


def garbage(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    length = draw.choice([1, 16, 256])
    return data[:at] + draw.randbytes(length) + data[at + length :]


def replaced(data: bytes, draw: random.Random) -> bytes:
    """By text that is something else."""
    return draw.choice(
        [b"[]\n", b"null\n", b"3\n", b'{"a": 1}\n', b"\xff\xfe\x00", b"{}", b"- a\n- b\n", b"hello\n"]
    )


DAMAGE: Sequence[Damage] = (flipped, flipped, truncated, empty, zeroed, garbage, replaced)


def damaged(path: Path, draw: random.Random, number: int) -> None:
    path.write_bytes(DAMAGE[number % len(DAMAGE)](path.read_bytes(), draw))


# --- the record


_LINES: Sequence[Callable[[bytes, random.Random], bytes]] = (
    lambda line, draw: line[: draw.randrange(len(line))],  # the next one is stuck to it
    lambda line, draw: bytes(len(line) - 1) + b"\n",
    lambda line, draw: draw.randbytes(40) + b"\n",
    lambda line, draw: draw.choice([b"hello\n", b"\n", b"[]\n", b"7\n", b'{"a": 1}\n', b"null\n"]),
    lambda line, draw: b"",
    lambda line, draw: line + line[: len(line) // 2] + b"\n",
    lambda line, draw: b'{"step": "7", "attempt": 1}\n',
)
GONE = 4  # of these


def damage_a_line(path: Path, draw: random.Random, number: int) -> None:
    """The first, a middle or the last one."""
    lines = path.read_bytes().splitlines(keepends=True)
    at = (0, draw.randrange(len(lines)), len(lines) - 1)[number % 3]
    lines[at] = _LINES[number % len(_LINES)](lines[at], draw)
    path.write_bytes(b"".join(lines))


@family("metrics line, resumed", 60)
def metrics_resumed(place: Place, draw: random.Random, number: int) -> Verdict:
    run = cut_run(place)
    damage_a_line(run.metrics_file, draw, number)
    if bad := shown(run.id, run.path):
        return bad
    return judged(run, finished(run, attempts=1), place.lab)


@family("metrics line, compared", 60)
def metrics_compared(place: Place, draw: random.Random, number: int) -> Verdict:
    """The report must say what it could not read."""
    run = draw.choice(sweep(place))
    there = truth(run.path)
    if number % len(_LINES) == GONE:  # only of training: a report does not know when there was to be another
        lines = run.metrics_file.read_bytes().splitlines(keepends=True)
        lines.remove(draw.choice([line for line in lines[1:-2] if b"train/loss" in line]))
        run.metrics_file.write_bytes(b"".join(lines))
    else:
        damage_a_line(run.metrics_file, draw, number)
    if bad := shown("s", run.path):
        return bad
    return compared(run, there)


def compared(run: RunDirectory, there: Sequence[Sequence[object]]) -> Verdict:
    """What a report makes of it: the same numbers, or a word about it."""
    try:
        found = load_sweep("s")
    except ConfigError as error:
        return clean_words(str(error))
    (point,) = [each for each in found.runs if each.id == run.id] or [None]
    if point is None:
        return Verdict("lost data", f"the report knows nothing of {run.id}")
    if said := [*found.cautions, *filter(None, [point.problem])]:
        return clean_words(" ".join(said))
    rows = found.rows[point.point].select("step", "train/loss", "val/loss").rows()
    if [list(row) for row in rows] == [[row[0], row[3], row[4]] for row in there] and point.state == "DONE":
        return Verdict("survived")
    return Verdict("lost data", f"{point.state}, {len(rows)} rows of {len(there)}, and not a word about it")


def clean_words(text: str) -> Verdict:
    return Verdict("failed cleanly" if len(text.splitlines()) <= 3 else "lost data", text[:300])


def shown(name: str, path: Path) -> Verdict | None:
    """What the commands that look at a run or sweep say; None where they are content or say what is wrong."""
    for arguments in (("status", name, "--json"), ("status", name), ("ls",), ("logs", name)):
        ended = in_process(launchers, *arguments)
        if "Traceback (most" in ended.output and "rank-" not in ended.output:
            return Verdict("lost data", f"{arguments[0]}: {ended.output[-400:]}")
        if ended.code == 2 and not ended.output.strip():
            return Verdict("lost data", f"{arguments[0]}: exit code 2 without a word")
    return None


# --- the status, the config


@family("status.json", 60)
def status(place: Place, draw: random.Random, number: int) -> Verdict:
    run = cut_run(place)
    if number % 10 == 9:
        run.status_file.unlink()
    else:
        damaged(run.status_file, draw, number)
    if bad := shown(run.id, run.path):
        return bad
    attempt(run.status, run.status_file)  # as a report reads it: it must not raise
    return judged(run, finished(run, attempts=1), place.lab)


@family("config.yaml", 60)
def frozen_config(place: Place, draw: random.Random, number: int) -> Verdict:
    run = cut_run(place)
    damaged(run.config_file, draw, number)
    if bad := shown(run.id, run.path):
        return bad
    before = run.metrics_file.read_bytes()
    verdict = judged(run, finished(run, attempts=1), place.lab)
    if verdict.outcome == "failed cleanly" and run.metrics_file.read_bytes() != before:
        return Verdict("lost data", "the record of a run that was refused is another")
    return verdict


@family("status.json under a run", 12)
def status_under_a_run(place: Place, draw: random.Random, number: int) -> Verdict:
    run = cut_run(place)
    at = draw.randint(20, steps(place.lab))
    worker = Worker(run, at_step(at, lambda: damaged(run.status_file, draw, number)))
    return judged(run, worker.ended(), place.lab)


# --- the manifest


@family("manifest.json", 70)
def manifest(place: Place, draw: random.Random, number: int) -> Verdict:
    runs = sweep(place)
    there = {run.id: truth(run.path) for run in runs}
    file = place.home / "sweeps/s/manifest.json"
    if number % 10 == 9:
        tree = json.loads(file.read_text())
        del tree[draw.choice(sorted(tree))]
        file.write_text(json.dumps(tree))
    else:
        damaged(file, draw, number)
    if bad := shown("s", file):
        return bad
    if (ended := in_process(launchers, "resume", "s")).code not in (0, 2) or "Traceback" in ended.output:
        return Verdict("lost data", f"resume: {ended.output[-400:]}")
    verdicts = [compared(run, there[run.id]) for run in runs]
    return next((verdict for verdict in verdicts if verdict.outcome != "survived"), Verdict("survived"))
