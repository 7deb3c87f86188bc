"""sweeps/<name>/: which runs belong to a sweep, and their wandb files side by side.

    manifest.json  name, created, command, axes, common, points: [{run, axes, overrides, problem, command}]
    wandb/         relative links to runs/<id>/wandb/offline-run-*, for wandb leet and wandb sync

A manifest only grows: the same command again, or another with the same sweep.name, adds its points. The
command of the manifest is the last one; that of a point is the last that asked for the point, so that the
commands of all points together give the whole sweep again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launchers.plan import Plan, command_line
from pipeline.store import home, write_atomically

Manifest = dict[str, Any]


def path(sweep: str) -> Path:
    return home() / "sweeps" / sweep / "manifest.json"


def read(sweep: str) -> Manifest | None:
    try:
        manifest: Manifest = json.loads(path(sweep).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return manifest


def holds(plan: Plan) -> bool:
    """Whether the sweep's manifest lists every valid point of the plan."""
    listed = {point["run"] for point in (read(plan.name) or {"points": []})["points"]}
    return all(point.run in listed for point in plan.valid)


def write(plan: Plan) -> None:
    """Writes the plan into the sweep's manifest, beside the points that earlier commands put there."""
    command = command_line()
    manifest = {
        "name": plan.name,
        "created": int(time.time()),
        "command": command,
        "axes": plan.axes,
        "common": plan.common,
        "points": [
            {
                "run": p.run,
                "axes": p.axes,
                "overrides": p.overrides,
                "problem": p.problem,
                "command": command,
            }
            for p in plan.points
        ],
    }
    with _alone(path(plan.name).parent):
        write_atomically(path(plan.name), json.dumps(merge(read(plan.name), manifest), indent=1) + "\n")


def merge(old: Manifest | None, new: Manifest) -> Manifest:
    """`new` with the points of `old` that it does not hold. A value that all points of one manifest share
    and the other's do not becomes an axis."""
    if old is None:
        return new
    shared = {
        key for key in old["common"] | new["common"] if old["common"].get(key) == new["common"].get(key)
    }
    keys = [*old["axes"], *new["axes"], *old["common"], *new["common"]]
    axes = [key for key in dict.fromkeys(keys) if key not in shared]
    points = {}
    for manifest in (old, new):
        for point in manifest["points"]:
            values = manifest["common"] | point["axes"]
            point = point | {"axes": {key: values[key] for key in axes if key in values}}
            points[point["run"] or tuple(sorted(point["overrides"]))] = point
    fixed = {tuple(sorted(point["overrides"])) for point in new["points"] if point["run"]}
    return new | {
        "created": old["created"],
        "axes": axes,
        "common": {key: new["common"][key] for key in new["common"] if key in shared},
        "points": [point for key, point in points.items() if key not in fixed],
    }


def link_wandb(sweep: str, run: str) -> None:
    """Links the offline wandb directories of a run into sweeps/<name>/wandb/."""
    links = path(sweep).parent / "wandb"
    for target in (home() / "runs" / run / "wandb").glob("offline-run-*"):
        links.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (links / target.name).symlink_to(os.path.relpath(target, links))


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Two commands that grow one sweep at the same time write one after the other."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
