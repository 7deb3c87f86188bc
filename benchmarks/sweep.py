"""How long a sweep of many points takes to plan and submit: python -m benchmarks.sweep [--points N] [--json]

Preview, submission and status are the real commands in fresh processes; their parts are measured in this one.
The cluster is a real one on this machine, whose nodes are out of service, so that nothing trains; without
SLURM its figures are left out. Exit code 1 when a figure misses its target.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from benchmarks.printing import beside_json, print_json
from launchers import manifest
from launchers.compose import Composer
from launchers.grammar import expand
from launchers.plan import Plan, freeze, make_plan
from pipeline.overrides import CONF
from pipeline.store import RunDirectory
from tests.slurm.cluster import Cluster, missing

ROOT = CONF.parent
FLOOR = "compose, Hydra alone"  # a point after the other, as its own multirun does
COMPOSED_BY_HYDRA = 20  # points


@dataclass(frozen=True)
class Figure:
    what: str
    points: int
    seconds: float
    target_s: float | None  # of 1000 points; it grows with them

    @property
    def missed(self) -> bool:
        return self.target_s is not None and self.seconds > self.target_s * max(1.0, self.points / 1000)


def arguments(points: int) -> list[str]:
    """A sweep of so many points, up to the next multiple of 8, with 4 choices of options."""
    seeds = f"seed=range({-(-points // 8)})"
    return [seeds, "optim.lr=1e-3,3e-3", "model=tiny,10m", "batch=constant,norm_test"]


def measure(points: int) -> Iterator[Figure]:
    """The figures, one after the other."""
    words = arguments(points)
    jobs = expand(OverridesParser.create().parse_overrides(words), zips=[])
    timed = functools.partial(_timed, len(jobs))
    preview = ["pipeline", "-m", *words, "hydra/launcher=preview"]
    with _home():
        yield timed("preview, the command", lambda: _command(*preview), target_s=15.0)
    with _home(), initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        composer = Composer(_composed, zips=[])
        some = jobs[:: max(1, len(jobs) // COMPOSED_BY_HYDRA)]
        yield _timed(len(some), FLOOR, lambda: [_composed(job) for job in some])
        yield timed("compose", lambda: [composer(job) for job in jobs])
        plans: list[Plan] = []
        yield timed(
            "compose, check, name", lambda: plans.append(make_plan(jobs, Composer(_composed, zips=[])))
        )
        yield timed("freeze", lambda: freeze(plans[0].valid), target_s=10.0)
        yield timed("freeze again", lambda: freeze(plans[0].valid))
        yield timed("manifest", lambda: manifest.write(plans[0], "slurm"))
        yield timed("manifest again", lambda: manifest.write(plans[0], "slurm"))
    if lacking := missing():
        print(f"nothing is submitted: apt install {lacking}", file=sys.stderr)
        return
    with _home() as home, Cluster() as cluster, unittest.mock.patch.dict(os.environ, cluster.environment):
        for node in cluster.nodes:
            cluster.drain(node)
        sweep = [*words, "sweep.name=s", "launch.device=cpu"]
        submit = ["pipeline", "-m", *sweep, "hydra/launcher=slurm"]
        yield timed("submit, the command", lambda: _command(*submit), target_s=30.0)
        yield timed("submit again", lambda: _command(*submit))
        for run in (home / "runs").iterdir():
            _pretend_to_train(RunDirectory(run))
        yield timed("status, the command", lambda: _command("launchers", "status", "s"), target_s=2.0)


def _pretend_to_train(run: RunDirectory) -> None:
    """A record as long as that of some hundred steps."""
    run.update_status(attempt=1, step=400, tokens_seen=400_000)
    row = {
        "tokens": 400_000,
        "attempt": 1,
        "train/loss": 3.0,
        "batch/size": 32,
        "throughput/tokens_per_s": 1e4,
    }
    run.metrics_file.write_text("".join(json.dumps({"step": step, **row}) + "\n" for step in range(400)))


def _timed(points: int, what: str, action: Callable[[], object], target_s: float | None = None) -> Figure:
    start = time.perf_counter()
    action()
    return Figure(what, points, time.perf_counter() - start, target_s)


@contextmanager
def _home() -> Iterator[Path]:
    """A CRESCENDO_HOME of its own, among the temporary files."""
    with tempfile.TemporaryDirectory() as home, unittest.mock.patch.dict(os.environ, CRESCENDO_HOME=home):
        yield Path(home)


def _command(*words: str) -> None:
    command = [sys.executable, "-m", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{command} ended with {result.returncode}:\n{result.stderr}")


def _composed(overrides: Sequence[str]) -> DictConfig:
    return compose("config", list(overrides), return_hydra_config=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--points", type=int, default=1000, help="of the sweep (default 1000)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    figures = list(measure(options.points))
    if options.json:
        print_json([asdict(figure) | {"missed": figure.missed} for figure in figures])
    with beside_json(options.json):
        width = max(len(figure.what) for figure in figures)
        print(f"{f'{figures[0].points} points':{width}}  seconds  ms a point  target")
        for f in figures:
            target = "" if f.target_s is None else f"{f.target_s:6.1f}" + ("  MISSED" if f.missed else "")
            each = 1000 * f.seconds / f.points
            print(f"{f.what:{width}}  {f.seconds:7.2f}  {each:10.2f}  {target}".rstrip())
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", file=sys.stderr)
    return 1 if any(figure.missed for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
