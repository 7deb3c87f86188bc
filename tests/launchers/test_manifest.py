from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from launchers import manifest
from tests.launchers.support import plan


def written(name: str, home: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((home / "sweeps" / name / "manifest.json").read_text())
    return loaded


def test_what_it_holds(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pipeline", "-m", "experiment=demo", "batch.size=2,8"])
    p = plan("experiment=demo", "batch=constant", "batch.size=2,16")
    manifest.write(p, "local")
    m = written("demo", home)
    assert set(m) == {"name", "created", "command", "launcher", "axes", "common", "points", "jobs"}
    assert m["command"] == ["python", "-m", "pipeline", "-m", "experiment=demo", "batch.size=2,8"]
    assert (m["axes"], m["common"]) == (["batch.size"], {"experiment": "demo", "batch": "constant"})
    invalid, valid = m["points"]
    assert invalid["run"] is None and "batch.size=2" in invalid["problem"]
    assert valid == {
        "run": p.points[1].run,
        "axes": {"batch.size": "16"},
        "overrides": ["experiment=demo", "batch=constant", "batch.size=16"],
        "problem": None,
        "command": m["command"],
    }


def test_the_same_command_again_changes_nothing_but_the_command(home: Path) -> None:
    p = plan("experiment=demo", "batch=constant,stages", "seed=0,1")
    manifest.write(p, "local")
    first = written("demo", home)
    manifest.write(p, "local")
    assert written("demo", home) == first


def test_a_sweep_grows(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plan("experiment=demo", "batch=constant_16,stages", "seed=0")
    second = plan("experiment=demo", "batch=stages", "seed=0,1")
    for name, each in (("first", first), ("second", second)):
        monkeypatch.setattr("sys.argv", ["pipeline", name])
        manifest.write(each, "local")
    m = written("demo", home)
    assert [point["command"][-1] for point in m["points"]] == ["first", "second", "second"]
    assert m["axes"] == ["batch", "seed"] and m["common"] == {"experiment": "demo"}
    assert [(point["run"], point["axes"]) for point in m["points"]] == [
        (first.points[0].run, {"batch": "constant_16", "seed": "0"}),
        (first.points[1].run, {"batch": "stages", "seed": "0"}),
        (second.points[1].run, {"batch": "stages", "seed": "1"}),
    ]


def test_a_setting_given_only_later_is_an_axis_where_it_was_given(home: Path) -> None:
    manifest.write(plan("sweep.name=s", "seed=0,1"), "local")
    manifest.write(plan("sweep.name=s", "seed=0,1", "budget.tokens=1M"), "local")
    m = written("s", home)
    assert m["axes"] == ["seed", "budget.tokens"] and m["common"] == {}
    assert [point["axes"] for point in m["points"]] == [
        {"seed": "0"},
        {"seed": "1"},
        {"seed": "0", "budget.tokens": "1M"},
        {"seed": "1", "budget.tokens": "1M"},
    ]


def test_an_invalid_point_disappears_when_it_becomes_valid(home: Path) -> None:
    valid = plan("sweep.name=s", "batch.size=16")
    (point,) = valid.points
    now = {"name": "s", "created": 2, "command": ["now"], "axes": [], "common": {}, "jobs": []}
    entry = {"run": point.run, "axes": {}, "overrides": ["batch.size=16"], "problem": None}
    old = now | {"points": [entry | {"run": None, "problem": "was refused"}]}
    assert manifest.merge(old, now | {"points": [entry]})["points"] == [entry]


def test_the_time_is_the_first_and_the_command_the_last() -> None:
    first = {"name": "s", "created": 1, "command": ["first"], "axes": [], "common": {}, "points": []}
    first |= {"jobs": [{"name": "s.1"}]}
    merged = manifest.merge(first, first | {"created": 2, "command": ["second"], "jobs": []})
    assert (merged["created"], merged["command"], merged["jobs"]) == (1, ["second"], first["jobs"])


def test_links_to_wandb_are_relative_and_stay_single(home: Path) -> None:
    name = "offline-run-20260101_000000-abc"
    target = home / "runs" / "abc" / "wandb" / name
    target.mkdir(parents=True)
    (target / "run-abc.wandb").write_text("x")
    (target.parent / "cache").mkdir()
    for _ in range(2):
        manifest.link_wandb("s", "abc")
    (link,) = (home / "sweeps" / "s" / "wandb").iterdir()
    assert link.name == name and not os.path.isabs(os.readlink(link))
    moved = home.rename(home.with_name(home.name + "-moved"))
    assert (moved / "sweeps" / "s" / "wandb" / name / "run-abc.wandb").read_text() == "x"
    moved.rename(home)
