"""What the side-by-side says of made-up runs, and that our trainer and a peer's do the same work."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import benchmarks.peers
from benchmarks.peers import (
    OURS,
    TIMED,
    Failed,
    Run,
    Trainer,
    compare,
    family,
    measure,
    met,
    prepare,
    steps_in,
    unequal,
)

LOSSES = (6.0, 5.5, 5.0)
TINY = ("model=tiny", "data.sequence_length=32", "data.micro_batch=2", "batch.size=8")


def made_up(seconds: float, memory: float = 500.0, losses: tuple[float, ...] = LOSSES) -> Run:
    return Run(losses, (seconds,), first_step_s=10 * seconds, memory_mib=memory)


def test_ratios_are_medians_within_turns() -> None:
    ours = [replace(made_up(1.0), turns_s=(1.0, 2.0)), made_up(1.0), made_up(1.0)]
    peer = [replace(made_up(1.2, 1000), turns_s=(1.4, 2.4)), made_up(1.1, 1000), made_up(1.5, 1000)]
    figure = compare({OURS: ours, "slow": peer})["slow"]  # 1.4, 1.2, 1.1 and 1.5 times ours
    assert figure["faster"] == pytest.approx({"median": 1.3, "q1": 1.125, "q3": 1.475})
    assert figure["memory"] == 0.5
    assert figure["start"] == pytest.approx(1 / 1.2)


def test_one_turn_is_enough_for_a_ratio() -> None:
    figure = compare({OURS: [made_up(1.0)], "slow": [made_up(1.25)]})["slow"]
    assert figure["faster"] == {"median": 1.25, "q1": 1.25, "q3": 1.25}


@pytest.mark.parametrize(("off", "same"), [(1e-6, True), (1e-3, False), (float("nan"), False)])
def test_a_peer_with_other_losses_gets_no_ratio(off: float, same: bool) -> None:
    other = made_up(2.0, losses=(6.0, 5.5, 5.0 + off))
    assert (unequal(made_up(1.0), other) is None) is same
    figures = compare({OURS: [made_up(1.0)], "other": [other]})
    assert ("refused" in figures["other"]) is not same
    assert met(figures) is same
    if not same:
        assert figures["other"].keys() == {"refused"}
        assert "at step 3, ours 5.000000" in figures["other"]["refused"]


@pytest.mark.parametrize(
    ("fastest_s", "memory", "reached"), [(1.2, 500, True), (1.05, 500, False), (1.2, 400, False)]
)
def test_the_target_is_about_the_fastest(fastest_s: float, memory: float, reached: bool) -> None:
    runs = {OURS: [made_up(1.0)], "fastest": [made_up(fastest_s, memory)], "slow": [made_up(3.0, 100)]}
    assert met(compare(runs)) is reached


def test_a_loss_is_the_mean_over_ranks_and_a_row_being_written_waits(tmp_path: Path) -> None:
    for rank, losses in enumerate([(6.0, 5.0), (7.0, 6.0, 5.5)]):
        rows = [
            {"step": step, "train/loss": loss, "wall": 10.0 * step + rank}
            for step, loss in enumerate(losses, 1)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"metrics-{rank}.jsonl").write_text(text + '{"step": 9, "tra')
    assert steps_in(tmp_path) == [(6.5, 11.0), (5.5, 21.0)]


def test_all_processes_of_a_trainer_are_found() -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    with subprocess.Popen(
        [sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stdout.readline() == b"1\n"
        grandchild, found = family(process.pid)
        assert found == process.pid != grandchild
        process.communicate(b"\n", timeout=20)


@pytest.mark.slow
def test_a_peer_does_the_same_work_as_ours(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.peers, "WORK", (*TINY, *benchmarks.peers.WORK[-5:]))
    monkeypatch.setattr(benchmarks.peers, "TIMEOUT_S", 120.0)
    task = prepare(home, steps=4000)
    found = measure(Path(sys.executable), task, [OURS, "hand_written"], ["single"], starts=1, turns=2)
    (ours,), (peer,) = found["single"].values()
    assert len(ours.losses) == 11 and len(ours.turns_s) == 2
    assert unequal(ours, peer) is None
    assert all(one.memory_mib > 100 and one.first_step_s > 0.5 for one in (ours, peer))

    (home / "broken").mkdir()
    broken = replace(task, weights=str(home / "missing.npz"), directory=str(home / "broken"))
    with (
        Trainer("hand_written", Path(sys.executable), broken) as trainer,
        pytest.raises(Failed, match="No such file"),
    ):
        trainer.warm_up()


@pytest.mark.slow
def test_a_trainer_does_nothing_but_in_its_turn(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.peers, "WORK", (*TINY, *benchmarks.peers.WORK[-5:]))
    task = prepare(home, steps=1)
    with Trainer(OURS, Path(sys.executable), replace(task, layout="ddp")) as trainer:
        trainer.warm_up()
        for _ in range(2):
            time.sleep(0.2)  # rows may be on their way
            before = len(steps_in(home))
            time.sleep(1)
            assert len(steps_in(home)) == before
            trainer.turn()
            assert len(steps_in(home)) >= before + 1 + TIMED
        processes = family(trainer._process.pid)
        assert len(processes) > 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)
