from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launchers.plan import again, freeze, make_plan, state
from pipeline.config import ConfigError
from pipeline.identity import run_id
from pipeline.store import RunDirectory, python
from tests.launchers.support import plan
from tests.support import config


def test_points_axes_and_common(home: Path) -> None:
    p = plan("experiment=demo", "batch=constant_16,stages", "seed=range(2)", "launch.max_parallel=2")
    assert p.name == "demo"  # sweep.name of the experiment
    assert p.axes == ["batch", "seed"]
    assert p.common == {"experiment": "demo"}  # launch settings tell no result from another
    assert [point.axes for point in p.points] == [
        {"batch": batch, "seed": seed} for batch in ("constant_16", "stages") for seed in ("0", "1")
    ]
    assert p.points[0].overrides == [
        "experiment=demo",
        "batch=constant_16",
        "seed=0",
        "launch.max_parallel=2",
    ]


def test_a_point_is_the_run_that_the_same_settings_give_alone(home: Path) -> None:
    (point,) = plan("batch=norm_test", "seed=3", "data.fingerprint=x").points
    assert point.run == run_id(config("batch=norm_test", "seed=3", "data.fingerprint=x"))


def test_the_fingerprint_of_the_data_is_filled_in(home: Path, small_corpus: list[str]) -> None:
    (point,) = plan(*small_corpus).points
    assert point.config and point.config.data.fingerprint.startswith("text-")


def test_points_that_are_the_same_run_collapse(home: Path) -> None:
    p = plan("batch=constant,norm_test", "batch.eta=0.2,0.3", "launch.device=cpu,auto")
    assert len(p.points) == 3 and p.duplicates == 5
    assert p.axes == ["batch", "batch.eta"]
    constant, small, large = p.points
    assert constant.axes == {"batch": "constant"}  # eta has no part in it
    assert small.axes == {"batch": "norm_test", "batch.eta": "0.2"}
    assert large.axes == {"batch": "norm_test", "batch.eta": "0.3"}


def test_values_that_cannot_work_together_make_an_invalid_point(home: Path) -> None:
    p = plan("batch=norm_test", "batch.size=2,8", "batch.ema=2.0,0.9", "data.micro_batch=4")
    assert [bool(point.run) for point in p.points] == [False, False, False, True]
    first = p.points[0].problem
    assert first and "batch.size=2" in first and "batch.ema=2.0" in first  # all reasons


@pytest.mark.parametrize("mistake", ["batch.eta=0.3,abc", "+batch.etaa=1,2"])
def test_a_mistake_in_one_value_refuses_the_sweep(home: Path, mistake: str) -> None:
    with pytest.raises(ConfigError, match=r"batch\.eta"):
        plan("batch=norm_test", mistake)


def test_the_name_depends_on_the_points_alone(home: Path) -> None:
    one, same, other = plan("seed=0,1"), plan("seed=1,0", "launch.max_parallel=3"), plan("seed=0,2")
    assert one.name == same.name != other.name
    assert one.name.startswith("sweep-") and len(one.name) == len("sweep-") + 4
    assert plan("experiment=demo", "seed=0", "sweep.name=null").name.startswith("demo-")
    assert plan("seed=0", "sweep.name=first.try").name == "first.try"


@pytest.mark.parametrize("name", ["../outside", "a/b", "..", "'a b'"])
def test_a_name_that_is_no_directory_name_is_refused(home: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="Nearest"):
        plan("seed=0", f"sweep.name={name}")


def test_several_names_are_refused(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"^sweep\.name=a,b: a sweep has one name"):
        plan("seed=0", "sweep.name=a,b")
    with pytest.raises(ConfigError, match=r"^sweep\.exclude=\['seed=1'\],\[\]: a sweep has one exclude"):
        plan("seed=0,1", "sweep.exclude=['seed=1'],[]")


def test_the_words_for_this_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for environment in ("project/.venv", "other"):
        (tmp_path / environment / "bin").mkdir(parents=True)
        (tmp_path / environment / "bin" / "python").symlink_to(sys.executable)  # as venv makes it
    monkeypatch.chdir(tmp_path / "project")
    this = tmp_path / "project" / ".venv" / "bin"
    monkeypatch.setattr("sys.executable", str(this / "python"))
    monkeypatch.setattr("sys.argv", ["pipeline", "-m", "seed=0,1"])
    monkeypatch.setenv("PATH", str(tmp_path / "other" / "bin"))
    assert python() == ".venv/bin/python" and again() == ".venv/bin/python -m pipeline -m seed=0,1"
    monkeypatch.chdir(tmp_path)
    assert python() == "project/.venv/bin/python"
    monkeypatch.chdir(tmp_path / "other")
    assert python() == str(this / "python")
    monkeypatch.setenv("PATH", str(this))
    assert python() == "python"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert python() == str(this / "python")


def test_wandb_groups_the_runs_by_the_sweep_unless_told_otherwise(home: Path) -> None:
    named = plan("seed=0,1")
    assert {point.config.track.group for point in named.points if point.config} == {named.name}
    (chosen,) = plan("track.group=mine").points
    assert chosen.config and chosen.config.track.group == "mine"


def test_state(home: Path) -> None:
    p = plan("seed=0", "batch.size=16,2")
    point, invalid = p.points
    assert (state(point, {}), state(invalid, {})) == ("new", "invalid")
    freeze(p.valid)
    assert state(point, {}) == "new"
    run = RunDirectory(home / "runs" / str(point.run))
    for written, shown in {
        "RUNNING": "lost",
        "FAILED": "failed",
        "CANCELLED": "cancelled",
        "PREEMPTED": "preempted",
    }.items():
        run.update_status(state=written)
        assert state(point, {}) == shown
    with run.lock():
        assert state(point, {}) == "running"
    run.update_status(state="DONE")
    assert state(point, {}) == "done"


def test_freezing_twice_changes_nothing(home: Path) -> None:
    p = plan("seed=0")
    freeze(p.valid)
    run = p.points[0].directory
    run.update_status(state="DONE")
    before = run.config_file.read_bytes()
    freeze(plan("seed=0", "track.every=7").valid)
    assert run.config_file.read_bytes() == before and state(p.points[0], {}) == "done"


def test_no_point_at_all(home: Path) -> None:
    assert make_plan([], lambda overrides: None).points == []  # type: ignore[arg-type, return-value]
