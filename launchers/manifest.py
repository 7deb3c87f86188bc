"""sweeps/<name>/: which runs belong to a sweep, and their wandb files side by side.

    manifest.json  name, created, command, launcher, axes, common,
                   points: [{run, axes, overrides, problem, command}]
                   jobs: [{name, kind, shape, runs, ids, released}]: batches sent to a cluster, see slurm.py
    wandb/         relative links to runs/<id>/wandb/offline-run-*, for wandb leet

A manifest only grows: the same command again, or another with the same sweep.name, adds its points. The
command of the manifest is the last one; that of a point is the last that asked for the point, so that the
commands of all points together give the whole sweep again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launchers.plan import Plan, command_line
from launchers.table import make_console, say
from pipeline.config import ConfigError, did_you_mean
from pipeline.store import home, try_lock, write_atomically

_PATIENCE_S = 600  # for another submission

Manifest = dict[str, Any]
Job = dict[str, Any]


def path(sweep: str) -> Path:
    """Where the sweep of this name says what it is."""
    return home() / "sweeps" / sweep / "manifest.json"


def read(sweep: str) -> Manifest | None:
    """None where there is no such sweep."""
    try:
        manifest = json.loads(path(sweep).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise _no_manifest(sweep, str(error)) from None
    if not isinstance(manifest, dict):
        raise _no_manifest(sweep, "it is no mapping")
    # Sweeps of before there were clusters.
    found: Manifest = {"launcher": "local", "jobs": [], "common": {}} | manifest
    for key, kind in _KINDS.items():
        if not isinstance(found.get(key), kind):
            raise _no_manifest(sweep, f"{key}: {found.get(key)!r}")
    for kind, each in [*((_POINT, p) for p in found["points"]), *((_JOB, j) for j in found["jobs"])]:
        if not isinstance(each, dict) or any(not isinstance(each.get(k), t) for k, t in kind.items()):
            raise _no_manifest(sweep, f"{each!r}"[:80])
    return found


_KINDS: dict[str, Any] = {
    "name": str, "created": int | float, "command": list, "launcher": str, "axes": list, "common": dict,
    "points": list, "jobs": list,
}  # fmt: skip
_POINT: dict[str, Any] = {"run": str | None, "axes": dict, "overrides": list, "problem": str | None}
_JOB: dict[str, Any] = {"name": str, "kind": str, "runs": list, "ids": list | None}


def _no_manifest(sweep: str, why: str) -> ConfigError:
    return ConfigError(
        f"{path(sweep)}: not a manifest: {why}. Bring it back from a copy; or delete it and give the sweep's "
        f"command again: done runs stay as they are"
    )


def load(sweep: str) -> Manifest:
    """Raises ConfigError, naming the nearest sweep, when there is none of this name."""
    if manifest := read(sweep):
        return manifest
    raise ConfigError(f"{sweep}: no such sweep in {home() / 'sweeps'}." + did_you_mean(sweep, names()))


def holds(plan: Plan) -> bool:
    """Whether the sweep's manifest lists every valid point of the plan."""
    listed = {point["run"] for point in (read(plan.name) or {"points": []})["points"]}
    return all(point.run in listed for point in plan.valid)


def names() -> list[str]:
    """All sweeps, the newest last."""
    found = (home() / "sweeps").glob("*/manifest.json")
    return [file.parent.name for file in sorted(found, key=lambda file: file.stat().st_mtime)]


def write(plan: Plan, launcher: str) -> None:
    """Writes the plan into the sweep's manifest, beside the points that earlier commands put there."""
    command = command_line()
    manifest = {
        "name": plan.name,
        "created": int(time.time()),
        "command": command,
        "launcher": launcher,
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
        "jobs": [],
    }
    with _alone(path(plan.name).parent):
        _write(merge(read(plan.name), manifest))


def change_jobs(sweep: str, change: Callable[[list[Job]], list[Job]]) -> None:
    """Replaces the jobs of a sweep's manifest by what `change` makes of them."""
    with _alone(path(sweep).parent):
        manifest = load(sweep)
        _write(manifest | {"jobs": change(manifest["jobs"])})


def report_jobs(sweep: str) -> list[str]:
    """The jobs of all reports that were ever submitted for this sweep."""
    return [job["ids"][0] for job in load(sweep)["jobs"] if job["kind"] == "report" and job["ids"]]


def _write(manifest: Manifest) -> None:
    write_atomically(path(manifest["name"]), json.dumps(manifest, indent=1) + "\n")


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
        "jobs": [*old["jobs"], *new["jobs"]],
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


@contextlib.contextmanager
def only_submitter() -> Iterator[None]:
    """Two submissions at once would both find that a run is not queued yet. Raises ConfigError when another
    one does not come to its end."""
    lock = home() / "sweeps" / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a+", encoding="utf-8") as file:
        deadline, told = time.monotonic() + _PATIENCE_S, False
        while not try_lock(file, fcntl.LOCK_EX):
            file.seek(0)
            if time.monotonic() > deadline:
                raise ConfigError(f"{lock}: still held after {_PATIENCE_S} s by {file.read().strip()}")
            if not told:
                console = make_console(stderr=True)  # what is printed for programs is nothing else
                say(console, f"Waiting for another submission ({file.read().strip()}) …")
                told = True
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n")
        file.flush()
        yield
