from __future__ import annotations

import json
import math
import time
from pathlib import Path

import polars as pl
import pytest

from analysis.load import Run, Sweep, load_sweep, record_of
from analysis.records import table
from analysis.sources import Origin
from analysis.summary import run_numbers, summarise
from pipeline.config import ConfigError
from pipeline.store import Row, RunDirectory
from pipeline.store import home as crescendo_home
from tests.analysis.synthetic import Point, pairs, rerun, short_run, train_row, val_row, write_sweep


def numbers_of(rows: list[Row]) -> dict[str, float | None]:
    return vars(run_numbers({0: table(rows)})[0])


def test_final_training_loss_counts_each_step_by_its_tokens_in_the_last_5_percent() -> None:
    """10,000 tokens: the window is 9,500 to 10,000. Step 2 lies in it with 100 tokens, step 3 with 400."""
    rows = [
        train_row(1, 5_000, 9.0, 8, 1.0),
        train_row(2, 9_600, 4.0, 8, 2.0),
        train_row(3, 10_000, 3.0, 8, 3.0),
    ]
    assert numbers_of(rows)["train_loss"] == pytest.approx((100 * 4.0 + 400 * 3.0) / 500)


def test_numbers_of_a_run_by_hand() -> None:
    rows = [
        train_row(1, 1024, 5.0, 8, 1.0),
        val_row(1, 1024, 4.5, 1.0),
        train_row(2, 3072, 4.0, 16, 2.0),
        train_row(3, 3584, 3.0, 4, 4.0, requested=16.0),  # cut to end on the budget
        val_row(3, 3584, 2.5, 4.0),
    ]
    found = numbers_of(rows)
    assert (found["steps"], found["tokens"], found["seconds"]) == (3, 3584, 4.0)
    assert found["mean_batch"] == pytest.approx(28 / 3)
    assert found["final_batch"] == 16
    assert found["val_loss"] == 2.5
    assert found["tokens_per_second"] == 896


def test_a_loss_before_the_end_is_no_final_loss() -> None:
    rows = [train_row(1, 1024, 5.0, 8, 1.0), val_row(1, 1024, 4.5, 1.0), train_row(2, 2048, 5.0, 8, 2.0)]
    assert numbers_of(rows)["val_loss"] is None


def test_not_a_number_stays_visible() -> None:
    rows = [train_row(1, 1024, math.nan, 8, 1.0), val_row(1, 1024, math.inf, 1.0)]
    found = numbers_of(rows)
    assert found["train_loss"] is not None and math.isnan(found["train_loss"])
    assert found["val_loss"] == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("counter", ["step", "tokens", "time", "sequences"])
def test_a_counter_that_is_no_number_counts_nothing(counter: str, value: float) -> None:
    rows = [train_row(i, 1024 * i, 5.0, 8, 1.0 * i) for i in (1, 2)]
    rows = [*rows[:1], rows[1] | {counter: value}, val_row(2, 2048, 4.5, 2.0) | {counter: value}]
    found = numbers_of(rows)
    name = {"time": "seconds", "step": "steps", "sequences": "mean_batch"}.get(counter, counter)
    assert found[name] is None
    assert (found["train_loss"], found["val_loss"]) == (5.0, 4.5)


def test_every_point_is_kept_with_its_state(home: Path) -> None:
    points = [
        Point({"batch": "constant_16", "seed": "0"}, short_run(2.0)),
        Point({"batch": "constant_16", "seed": "1"}, short_run(2.0)[:2], "FAILED", "out of memory"),
        Point({"batch": "constant_16", "seed": "2"}, None, None),
        Point({"batch": "constant_16", "seed": "3"}, short_run(2.0)[:1], "RUNNING"),
        Point({"batch": "constant_16", "seed": "4"}, short_run(2.0)),
        Point({"batch": "constant_6", "seed": "0"}, problem="batch.size=6: too small"),
    ]
    write_sweep("s", points)
    sweep = load_sweep("s")
    damaged = RunDirectory(crescendo_home() / "runs" / str(sweep.runs[4].id))
    damaged.status_file.write_text('{"state": ')
    sweep = load_sweep("s")
    assert [run.state for run in sweep.runs] == [
        "DONE",
        "FAILED",
        "MISSING",
        "LOST",
        "UNREADABLE",
        "INVALID",
    ]
    assert [run.problem for run in sweep.runs[1:3]] == ["out of memory", None]
    assert sweep.runs[4].problem is not None
    assert sweep.runs[4].problem.startswith("status.json cannot be read")
    assert sweep.runs[5].problem == "batch.size=6: too small"
    schedules = summarise(sweep, run_numbers(sweep.rows))
    assert [(s.label, len(s.runs), len(s.finished)) for s in schedules] == [
        ("constant_16", 5, 1),
        ("constant_6", 1, 0),
    ]


def test_a_finished_run_without_a_record_is_no_finished_run(home: Path) -> None:
    write_sweep("s", [Point({"batch": "constant_16", "seed": "0"}, None, "DONE")])
    (run,) = load_sweep("s").runs
    assert run.state == "UNREADABLE"
    assert run.problem == "metrics.jsonl holds no training step, though the run is done"


def test_a_superseded_step_counts_once(home: Path) -> None:
    first = short_run(9.0, train_loss=9.0)[:3]
    second = [{**row, "attempt": 2} for row in short_run(2.0, train_loss=3.0)[1:]]
    write_sweep("s", [Point({"batch": "constant_16", "seed": "0"}, [*first, *second])])
    found = run_numbers(load_sweep("s").rows)[0]
    assert (found.steps, found.train_loss, found.val_loss) == (4, 3.0, 2.0)


@pytest.mark.parametrize("settings", [[], ["imbalance=delay", "parallel=ddp", "imbalance.seed=${seed}"]])
def test_only_seeds_vary(settings: list[str], home: Path) -> None:
    """Those of the data and of who is late included, where they follow the run's."""
    points = [Point({"seed": str(seed)}, short_run(2.0 + seed), extra=settings) for seed in range(2)]
    write_sweep("s", points, common=("experiment=demo", "batch=norm_test"))
    sweep = load_sweep("s")
    (schedule,) = summarise(sweep, run_numbers(sweep.rows))
    assert schedule.label == "norm_test"
    assert schedule.val_loss is not None and schedule.val_loss.mean == 2.5


def foreign(*values: str) -> Sweep:
    """One finished run of each value, of which nothing but a task and an axis is known."""
    runs = [
        Run(
            point,
            f"r{point}",
            {"batch": value, "seed": "0"},
            "DONE",
            None,
            None,
            None,
            [],
            None,
            {"n": str(point)},
        )
        for point, value in enumerate(values)
    ]
    record = record_of({run.point: table(short_run(2.0)) for run in runs})
    return Sweep("s", [], None, ["batch", "seed"], {}, runs, record, Origin("record", ""), [])


def labels_of(sweep: Sweep) -> list[str]:
    return [schedule.label for schedule in summarise(sweep, run_numbers(sweep.rows))]


def test_a_label_that_is_numbered_differs_from_all_others() -> None:
    assert labels_of(foreign("x", "x", "x (1)")) == ["x (2)", "x (3)", "x (1)"]
    assert labels_of(foreign("x", "x", "y")) == ["x (1)", "x (2)", "y"]


def test_no_label_is_empty() -> None:
    assert labels_of(foreign("", "x")) == ["(empty)", "x"]


def test_the_budget_of_a_run_whose_tokens_are_no_number_is_not_known() -> None:
    sweep = foreign("x")
    rows = sweep.rows[0].with_columns(tokens=pl.lit(math.nan))
    (schedule,) = summarise(sweep, run_numbers({0: rows}))
    assert schedule.budgets == set()


def test_settings_name_what_tells_schedules_apart(home: Path) -> None:
    write_sweep("s", pairs({"constant_16": [2.0], "constant_64": [2.0], "stages": [2.0]}))
    sweep = load_sweep("s")
    schedules = summarise(sweep, run_numbers(sweep.rows))
    assert schedules[0].settings["size"] == "16" and schedules[1].settings["size"] == "64"
    assert schedules[2].settings["sizes"] == "[16, 32, 64]"
    assert "eta" not in schedules[0].settings


def test_a_wrong_sweep_names_the_nearest(home: Path) -> None:
    write_sweep("demo", pairs({"constant_16": [2.0]}))
    with pytest.raises(ConfigError) as caught:
        load_sweep("demp")
    assert "Did you mean demo?" in caught.value.problems[0]
    assert caught.value.problems[1] == "Sweeps: demo"


def test_a_damaged_manifest_is_named(home: Path) -> None:
    write_sweep("demo", pairs({"constant_16": [2.0]}))
    (home / "sweeps/demo/manifest.json").write_text('{"name": "demo"')
    with pytest.raises(ConfigError, match="not a manifest"):
        load_sweep("demo")


@pytest.mark.parametrize("missing", ["run", "axes"])
def test_a_point_without_what_it_needs_is_named(home: Path, missing: str) -> None:
    write_sweep("demo", pairs({"constant_16": [2.0, 2.1]}))
    path = home / "sweeps/demo/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["points"][1][missing]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError) as caught:
        load_sweep("demo")
    assert caught.value.problems == (f"{path}: not a manifest: {missing} missing in point 1",)


def test_a_run_is_running_only_while_someone_holds_it(home: Path) -> None:
    write_sweep("s", [Point({"batch": "constant_16", "seed": "0"}, short_run(2.0)[:1], "RUNNING")])
    (run,) = load_sweep("s").runs
    assert run.state == "LOST"
    with RunDirectory(home / "runs" / str(run.id)).lock():
        assert load_sweep("s").runs[0].state == "RUNNING"


# --- the same seed under two ids -------------------------------------------------------------------------


@pytest.mark.parametrize(("later", "loss"), [(60, 3.0), (-60, 2.0)])
def test_of_two_finished_runs_of_a_seed_the_newest_counts(home: Path, later: float, loss: float) -> None:
    write_sweep("s", pairs({"constant_16": [2.0, 2.5]}))
    old = load_sweep("s").runs[0]
    new = rerun("s", str(old.id), short_run(3.0), "DONE", time.time() + later)
    sweep = load_sweep("s")
    (schedule,) = summarise(sweep, run_numbers(sweep.rows))
    assert schedule.val_loss is not None and schedule.train_loss is not None
    assert schedule.val_loss.n == schedule.train_loss.n == 2
    assert schedule.by_seed("val_loss") == {"0": loss, "1": 2.5}
    assert schedule.val_loss.mean == (loss + 2.5) / 2
    assert [run.id for run in schedule.superseded] == [old.id if later > 0 else new]
    assert len(schedule.runs) == len(schedule.finished) == 2


@pytest.mark.parametrize(("later", "superseded"), [(60, 0), (-60, 1)])
def test_an_unfinished_run_is_superseded_by_a_newer_finished_one_only(
    home: Path, later: float, superseded: int
) -> None:
    """An older one will never be asked for again; a newer one was asked for and is to come."""
    write_sweep("s", pairs({"constant_16": [2.0]}))
    rerun("s", str(load_sweep("s").runs[0].id), short_run(9.0)[:2], "FAILED", time.time() + later)
    sweep = load_sweep("s")
    (schedule,) = summarise(sweep, run_numbers(sweep.rows))
    assert len(schedule.superseded) == superseded and len(schedule.finished) == 1
    assert schedule.val_loss is not None and schedule.val_loss.mean == 2.0


# --- logs that do not hold every step --------------------------------------------------------------------


def test_the_end_of_a_run_is_its_last_row_though_the_last_step_is_not_in_the_log() -> None:
    rows = [train_row(2, 2048, 5.0, 8, 1.0), val_row(3, 3072, 4.5, 2.0)]
    found = numbers_of(rows)
    assert (found["steps"], found["tokens"], found["seconds"], found["val_loss"]) == (3, 3072, 2.0, 4.5)


def test_a_finished_run_whose_record_ends_early_is_no_finished_run(home: Path) -> None:
    """Its last loss would be taken for the final one."""
    write_sweep("s", pairs({"constant_16": [2.0]}))
    run = RunDirectory(home / "runs" / str(load_sweep("s").runs[0].id))
    lines = run.metrics_file.read_text().splitlines(keepends=True)
    run.metrics_file.write_text("".join(lines[:2]))
    (found,) = load_sweep("s").runs
    assert found.state == "UNREADABLE"
    assert found.problem == "metrics.jsonl ends at step 2 of 4, though the run is done"
