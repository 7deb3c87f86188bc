"""Sweeps for the tests: planned from command lines, run by stand-in workers."""

from __future__ import annotations

import copy
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from launchers.compose import Composer
from launchers.grammar import expand
from launchers.plan import Plan, make_plan
from tests.support import ROOT

STUB = Path(__file__).with_name("stub_worker.py")


def plan(*arguments: str) -> Plan:
    """The plan of `python -m pipeline -m …arguments`."""
    overrides = OverridesParser.create().parse_overrides(list(arguments))
    fixed = [
        text for text, override in zip(arguments, overrides, strict=True) if not override.is_sweep_override()
    ]
    zips = OmegaConf.to_container(composed(fixed).sweep.zip)
    return make_plan(expand(overrides, zips), Composer(composed, zips))


@functools.cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True)


def composed(overrides: Sequence[str]) -> DictConfig:
    """Hydra's own composition, with its node."""
    return copy.deepcopy(_composed(tuple(overrides)))


class Stub:
    """A worker command; `behaviour` by run id, and what the workers did."""

    def __init__(self, home: Path, behaviour: dict[str, str] | None = None, seconds: float = 0.0) -> None:
        self.events_file = home / "events"
        self.behaviour, self.seconds = behaviour or {}, seconds

    def __call__(self, run: Path) -> list[str]:
        behaviour = self.behaviour.get(run.name, "ok")
        return [
            sys.executable,
            "-S",
            str(STUB),
            str(run),
            str(self.events_file),
            behaviour,
            str(self.seconds),
        ]

    def events(self, kind: str) -> list[dict[str, Any]]:
        if not self.events_file.exists():
            return []
        lines = map(json.loads, self.events_file.read_text().splitlines())
        return [line for line in lines if line["kind"] == kind]

    def runs(self) -> list[str]:
        """The runs that were started, once for each time."""
        return [event["run"] for event in self.events("start")]

    def processes(self) -> list[int]:
        """The workers and their children that are still alive."""
        pids = [pid for e in self.events("start") for pid in (e["pid"], *e["children"])]
        return [pid for pid in pids if alive(pid)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], object], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def tree_of(directory: Path) -> dict[str, bytes | None]:
    """Every path below and what is in it."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(directory.rglob("*"))}
