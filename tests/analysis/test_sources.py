"""The same sweep from its record, from wandb's files and from wandb's server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis.__main__ import main
from analysis.load import load_sweep
from analysis.report import build
from analysis.tables import to_json
from launchers.__main__ import main as launchers
from pipeline.config import ConfigError
from pipeline.store import Row, RunDirectory
from tests.analysis.synthetic import Point, short_run, write_sweep
from tests.analysis.wandb_log import write_attempt
from tests.wandb_server import ENTITY, WandbServer

# --- trained with wandb's client -------------------------------------------------------------------------

SMALL = [
    "model=tiny", "data.sequence_length=32", "data.micro_batch=2", "batch.size=8", "lr.warmup_tokens=1k", "eval.sequences=8",
    "eval.interval_tokens=10k", "checkpoint.interval_tokens=4k", "launch.device=cpu", "launch.cpus_per_task=1",
]  # fmt: skip
LONG = "budget.tokens=50k"  # 195 steps, long enough to be stopped, short enough for the mirror's queue


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_corpus: list[str]) -> Iterator[Path]:
    """Sweep `every`: two schedules and two seeds, one run in two attempts. Sweep `tenth`: another run."""
    home = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRESCENDO_HOME", str(home))
        patch.delenv("WANDB_MODE", raising=False)
        words = [*small_corpus, *SMALL]
        stop_halfway(pipeline(home, *words, LONG, "track.every=1", "batch=constant", "seed=1"), home)
        every = ["sweep.name=every", LONG, "track.every=1", "batch=constant,stages", "seed=0,1"]
        tenth = ["sweep.name=tenth", "budget.tokens=8k", "batch=constant", "seed=2"]
        for options in (every, tenth):
            process = pipeline(home, "-m", "hydra/launcher=local", *words, *options)
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, output
        yield home


def pipeline(home: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *words],
        cwd=home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stop_halfway(process: subprocess.Popen[str], home: Path) -> None:
    """Without the checkpoint of the step where it stops, so that the next attempt trains some steps again."""
    deadline = time.monotonic() + 120
    while not (runs := list(home.glob("runs/*/checkpoints/step-*"))):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    run = RunDirectory(runs[0].parents[1])
    status = run.status()
    assert status is not None and status.state == "CANCELLED", output
    shutil.rmtree(run.complete_checkpoints()[-1])


def report(sweep: str, source: str) -> dict[str, Any]:
    content = to_json(build(load_sweep(sweep, source), [], written=0.0))
    assert content.pop("source") == source
    assert content["settings"].pop("Read from")
    return content


@pytest.mark.slow
def test_both_sources_make_the_same_report(trained: Path) -> None:
    record, wandb = report("every", "record"), report("every", "wandb-offline")
    assert record == wandb
    assert record["finished"] == 4 and record["comparisons"][0]["difference"] is not None
    # Also what the figures are drawn from.
    first, second = (load_sweep("every", source).record for source in ("record", "wandb-offline"))
    assert first.equals(second) and len(first) > 400
    (again,) = [run for run in record["runs"] if run["attempt"] == 2]
    directory = RunDirectory(trained / "runs" / again["run"])
    assert len(list(directory.path.glob("wandb/offline-run-*/run-*.wandb"))) == 2
    written_rows = directory.metrics_file.read_bytes().count(b"\n")
    assert written_rows > len(directory.rows()), "no step was trained twice"


@pytest.mark.slow
def test_the_server_makes_the_same_report(
    trained: Path, wandb_server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent by `python -m launchers sync`, read with wandb's own client."""
    monkeypatch.setenv("CRESCENDO_HOME", str(trained))
    assert launchers(["sync", "every"]) == 0
    assert len(wandb_server.runs) == 5, "one for each attempt"
    source = f"wandb:{ENTITY}/crescendo"
    assert report("every", source) == report("every", "record")
    first, second = (load_sweep("every", source).record for source in ("record", source))
    assert first.equals(second) and len(first) > 400


@pytest.mark.slow
def test_a_throttled_mirror_is_told_and_ends_where_the_record_ends(trained: Path) -> None:
    record, wandb = report("tenth", "record"), report("tenth", "wandb-offline")
    (caution,) = set(wandb["cautions"]) - set(record["cautions"])
    assert "(one in 10: track.every=10)" in caution
    for mine, other in zip(wandb["runs"], record["runs"], strict=True):
        for number in ("steps", "tokens", "seconds", "mean_batch", "val_loss", "state"):
            assert mine[number] == other[number]


@pytest.mark.slow
def test_the_command_writes_beside_the_report_of_the_record(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CRESCENDO_HOME", str(trained))
    for arguments in (["every"], ["every", "--source", "wandb-offline"]):
        assert main(arguments) == 0
    texts = [trained / "reports/every" / name for name in ("report.json", "wandb-offline/report.json")]
    record, wandb = (json.loads(path.read_text()) for path in texts)
    assert (record["source"], wandb["source"]) == ("record", "wandb-offline")
    assert record["schedules"] == wandb["schedules"]
    assert (
        "runs/*/wandb/*run-*/run-*.wandb" in (trained / "reports/every/wandb-offline/report.md").read_text()
    )


# --- made up ---------------------------------------------------------------------------------------------


def sweep_of(rows: list[Row], **point: Any) -> RunDirectory:
    """Sweep s of one run."""
    write_sweep("s", [Point({"batch": "constant_16", "seed": "0"}, rows, **point)])
    (run,) = load_sweep("s").runs
    return RunDirectory(Path(os.environ["CRESCENDO_HOME"]) / "runs" / str(run.id))


def test_a_later_attempt_replaces_earlier_rows_from_its_first_step_on(home: Path) -> None:
    first = short_run(9.0, steps=8, train_loss=9.0)[:6]
    second = [{**row, "attempt": 2} for row in short_run(2.0, steps=8)[4:]]
    run = sweep_of([*first, *second])
    for attempt, rows in ((2, second), (1, first)):  # whatever the order in which they are found
        write_attempt(run.path, attempt, rows)
    assert load_sweep("s", "wandb-offline").record.equals(load_sweep("s").record)


def test_attempts_count_in_their_order_not_in_that_of_their_files(home: Path) -> None:
    first = [{**row, "attempt": 9} for row in short_run(9.0, steps=8)[:4]]
    second = [{**row, "attempt": 10} for row in short_run(2.0, steps=8)[4:]]
    run = sweep_of([*first, *second])
    files = [write_attempt(run.path, attempt, rows) for attempt, rows in ((9, first), (10, second))]
    assert sorted(files) != files
    assert load_sweep("s", "wandb-offline").record.equals(load_sweep("s").record)


def test_an_attempt_without_a_file_is_no_hindrance(home: Path) -> None:
    run = sweep_of(short_run(2.0))
    write_attempt(run.path, 2, short_run(2.0))
    (run.path / "wandb" / "offline-run-20260101_000000-failed").mkdir()
    sweep = load_sweep("s", "wandb-offline")
    assert sweep.record.equals(load_sweep("s").record) and sweep.cautions == []


def test_throttled_rows_are_told(home: Path) -> None:
    rows = short_run(2.0, steps=25)
    run = sweep_of(rows)
    write_attempt(run.path, 1, rows, every=10)
    sweep = load_sweep("s", "wandb-offline")
    assert sweep.cautions == [
        "The wandb files hold 3 of 25 training steps (one in 10: track.every=10), on which training losses, "
        "batch sizes and curves rest; --source record has every step."
    ]
    assert sweep.cautions[0] in build(sweep, [], 0.0).cautions


def test_rows_that_wandb_missed_are_told(home: Path) -> None:
    rows = short_run(2.0, steps=8)
    run = sweep_of(rows)
    write_attempt(run.path, 1, rows[:3] + rows[5:])
    (caution,) = load_sweep("s", "wandb-offline").cautions
    assert caution.startswith("The wandb files hold 6 of 8 training steps (the others never reached them)")


def test_a_damaged_file_is_told_and_what_it_lacks_is_not_taken_for_the_end(home: Path) -> None:
    run = sweep_of(short_run(2.0, steps=8))
    file = write_attempt(run.path, 1, short_run(2.0, steps=8))
    data = file.read_bytes()
    file.write_bytes(data[: len(data) * 2 // 3])
    sweep = load_sweep("s", "wandb-offline")
    (found,) = sweep.runs
    assert found.state == "UNREADABLE" and found.problem is not None
    assert "of 8, though the run is done" in found.problem
    (caution,) = sweep.cautions
    assert caution.startswith(f"Damaged wandb files, read as far as possible: {file.name}: ")


def test_a_file_of_something_else_hides_no_other_run(home: Path) -> None:
    points = [Point({"batch": "constant_16", "seed": str(seed)}, short_run(2.0)) for seed in range(2)]
    write_sweep("s", points)
    runs = [RunDirectory(home / "runs" / str(run.id)) for run in load_sweep("s").runs]
    files = [write_attempt(run.path, 1, short_run(2.0)) for run in runs]
    files[0].write_text("something else")
    found = load_sweep("s", "wandb-offline").runs
    assert [run.state for run in found] == ["UNREADABLE", "DONE"]
    assert found[0].problem is not None and "it is no .wandb file" in found[0].problem


def test_a_sweep_without_wandb_files_is_refused(home: Path) -> None:
    sweep_of(short_run(2.0))
    with pytest.raises(ConfigError, match=r"no run of this sweep has rows in .*track=disabled"):
        load_sweep("s", "wandb-offline")


def test_a_wrong_source_names_the_nearest(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep_of(short_run(2.0))
    assert main(["s", "--source", "wandb-ofline"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "--source wandb-ofline: no such source. Did you mean wandb-offline?",
        "Sources: record, wandb-offline, wandb:ENTITY/PROJECT",
    ]
