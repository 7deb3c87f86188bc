from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launchers import screen
from launchers.plan import Plan, freeze
from launchers.screen import LineView, read_progress
from pipeline.store import RunDirectory
from tests.launchers.support import plan


def frozen(*arguments: str) -> tuple[Plan, RunDirectory]:
    """A plan with sequences of 64 tokens in micro-batches of 4, and its first run."""
    p = plan(
        "sweep.name=s",
        "budget.tokens=30k",
        "data.sequence_length=64",
        "eval.sequences=8",
        "lr.warmup_tokens=1k",
        *arguments,
    )
    freeze(p.valid)
    return p, p.points[0].directory


def record(run: RunDirectory, attempt: int, step: int, sequences: int, size: int, **more: Any) -> None:
    """A training row: after `step`, which took `size` of the `sequences` so far."""
    row = {"step": step, "tokens": sequences * 64, "sequences": sequences, "time": 1.0, "attempt": attempt}
    row |= {"train/loss": 2.5, "batch/size": size, "batch/requested": size, "throughput/tokens_per_s": 1.0}
    with open(run.metrics_file, "a") as file:
        file.write(json.dumps(row | more) + "\n")


def test_a_new_attempt_does_not_show_the_progress_of_the_old(home: Path) -> None:
    p, run = frozen()
    (point,) = p.points
    record(run, 1, step=10, sequences=160, size=16)
    run.update_status(state="FAILED", attempt=1, step=10, tokens_seen=160 * 64)
    assert read_progress(point, "failed").tokens == 160 * 64
    assert read_progress(point, "waiting", 1).tokens == 0
    started = read_progress(point, "running", 1)  # its worker has not yet come to write the status
    assert (started.tokens, started.loss, started.seconds) == (0, None, None)
    run.update_status(state="RUNNING", attempt=2, step=0, tokens_seen=0)
    assert (read_progress(point, "running", 1).tokens, read_progress(point, "running", 1).loss) == (0, None)
    record(run, 2, step=6, sequences=96, size=16)
    assert read_progress(point, "running", 1).tokens == 96 * 64


def test_a_retry_counts_what_it_trains_itself(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p, run = frozen()
    (point,) = p.points
    record(run, 1, step=20, sequences=320, size=16)
    run.update_status(state="FAILED", attempt=1, step=20, tokens_seen=320 * 64)
    monkeypatch.setattr(screen.View, "elapsed", 2.0)
    view = LineView(Console(quiet=True), p)

    def summary(state: str) -> str:
        view.read({point.run or "": state}, p.points)
        return view.summary()[1]

    assert summary("running") == "0% of 30k tokens, 0:02 so far"
    run.update_status(state="RUNNING", attempt=2, step=0, tokens_seen=0)
    record(run, 2, step=6, sequences=96, size=16)  # from a checkpoint at step 5
    record(run, 2, step=9, sequences=144, size=16)  # still behind the first attempt
    rate = (144 - 80) * 64 // 2
    assert f"31% of 30k tokens, {rate / 1000:.3g}k tokens/s, 0:02 so far, 0:" in summary("running")


def test_no_time_is_left_when_nothing_runs_any_more(home: Path) -> None:
    p, run = frozen("seed=0,1")
    first, second = (point.run or "" for point in p.points)
    view = LineView(Console(quiet=True), p)
    run.update_status(state="RUNNING", attempt=1)
    record(run, 1, step=10, sequences=160, size=16)
    record(run, 1, step=20, sequences=320, size=16)
    view.read({first: "running", second: "waiting"}, p.points)
    assert " left" in view.summary()[1]
    view.read({first: "cancelled", second: "waiting"}, p.points)  # after Ctrl-C
    assert "tokens/s" in view.summary()[1] and " left" not in view.summary()[1]


def test_labelled_runs_count_samples(home: Path) -> None:
    p, run = frozen("model=logistic", "data=digits", "data.sequence_length=1", "data.micro_batch=16")
    record(run, 1, step=1, sequences=16, size=16)
    run.update_status(state="RUNNING", attempt=1)
    view = LineView(Console(quiet=True), p)
    view.read({run.id: "running"}, p.points)
    assert " of 30k samples" in view.summary()[1]
    titles = [column.title for column in view.rows(p.points)]
    assert {"samples", "samples/step", "samples/s"} < set(titles) and "tok" not in "".join(titles)


def test_a_run_that_was_done_before_is_not_trained_here(home: Path) -> None:
    p, run = frozen()
    record(run, 1, step=30, sequences=468, size=16)
    run.update_status(state="DONE", attempt=1, step=30, tokens_seen=468 * 64)
    view = LineView(Console(quiet=True), p)
    view.read({run.id: "done"}, [])
    assert view.summary()[1].startswith("100% of 30k tokens, 0:00")


@pytest.mark.parametrize(
    ("arguments", "requested", "batch"),
    [
        (("batch=constant", "batch.size=14"), 14, 16),
        (("batch=norm_test", "batch.size=8", "batch.max_size=30"), 17.2, 20),
        (("batch=norm_test", "batch.size=8", "batch.max_size=30"), 29.5, 28),
    ],
)
def test_the_last_batch_of_a_finished_run_is_one_that_occurred(
    home: Path, arguments: tuple[str, ...], requested: float, batch: int
) -> None:
    p, run = frozen(*arguments)
    record(run, 1, step=30, sequences=468, size=4, **{"batch/requested": requested})
    run.update_status(state="DONE", attempt=1, step=30, tokens_seen=468 * 64)
    assert read_progress(p.points[0], "done").batch == batch


def test_errors_that_differ_in_numbers_are_told_once(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    p = plan("sweep.name=s", "seed=0,1,2")
    freeze(p.valid)
    for point, number in zip(p.points, ("1e+30", "9.97e+29", "-3.5"), strict=True):
        point.directory.update_status(state="FAILED", attempt=1, error=f"rank 0: LossError: loss is {number}")
    log = p.points[0].directory.logs / "attempt-1.rank-0.log"
    log.parent.mkdir()
    log.write_text("Traceback (most recent call last):\n  line 7\npipeline.train.LossError: loss is 1e+30\n")
    screen.show_failures(Console(), p.points)
    out = capsys.readouterr().out
    assert out.count("failed: ") == 1 and "3 failed: seed=0,1,2" in out
    assert out.count("loss is") == 1 and "│   line 7" in out


def test_the_last_summary_stands_once(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    p, run = frozen()
    monkeypatch.setattr(screen, "LINE_S", -1.0)  # always due
    LineView(Console(), p).update({run.id: "waiting"}, [], last=True)
    assert capsys.readouterr().out.count("1 waiting; ") == 1
