"""Sweeps as a user submits them, small enough for a few seconds on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from launchers import manifest
from pipeline.store import Row, RunDirectory
from tests.slurm.cluster import Cluster

SMALL = [
    "model=tiny", "model.layers=1", "data.sequence_length=32", "data.micro_batch=4", "batch.size=8",
    "lr.warmup_tokens=1k", "eval.sequences=8", "launch.device=cpu", "launch.cpus_per_task=1", "launch.minutes=10", "sweep.name=s",
]  # fmt: skip
SHORT = "budget.tokens=8k"  # 32 steps, a second
WORK = "budget.tokens=26k"  # 102 steps
# The same with waits, 15 s at least: for something to happen to it
LONG = (WORK, "imbalance.compute_ms=150")
# 45 s at least: for several commands, of seconds on a busy machine
LONGER = (WORK, "imbalance.compute_ms=450")


class Sweep:
    """In a home of its own."""

    def __init__(self, home: Path, corpus: list[str]) -> None:
        self.home, self.corpus = home, corpus

    def pipeline(self, *overrides: str, expect: int = 0, timeout_s: float = 120, **options: Any) -> str:
        """`python -m pipeline …`; what it printed, errors included."""
        return self._call(
            "pipeline", [*self.corpus, *SMALL, *overrides], expect, timeout=timeout_s, **options
        )

    def submit(self, *overrides: str, expect: int = 0, **options: Any) -> str:
        return self.pipeline("-m", "hydra/launcher=slurm", *overrides, expect=expect, **options)

    def launchers(self, *arguments: str, expect: int = 0, **options: Any) -> str:
        return self._call("launchers", list(arguments), expect, timeout=120, **options)

    def status(self) -> dict[str, Any]:
        """What `launchers status` tells programs, whatever the exit code says."""
        answer = subprocess.run(
            [sys.executable, "-m", "launchers", "status", "s", "--json"],
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        told: dict[str, Any] = json.loads(answer.stdout)
        return told

    def states(self) -> dict[str, int]:
        states: dict[str, int] = self.status()["states"]
        return states

    def _call(self, module: str, arguments: list[str], expect: int, **options: Any) -> str:
        answer = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            **options,
        )
        assert answer.returncode == expect, answer.stdout
        return answer.stdout

    @property
    def runs(self) -> list[RunDirectory]:
        return [RunDirectory(path) for path in sorted((self.home / "runs").iterdir())]

    @property
    def jobs(self) -> list[manifest.Job]:
        jobs: list[manifest.Job] = json.loads((self.home / "sweeps/s/manifest.json").read_text())["jobs"]
        return jobs

    def batches(self) -> list[manifest.Job]:
        return [job for job in self.jobs if job["kind"] == "runs"]

    def report_job(self) -> str:
        return next(str(job["ids"][0]) for job in reversed(self.jobs) if job["kind"] == "report")

    def logs(self) -> str:
        """Of everything, for a test that waited in vain."""
        files = [*self.home.glob("sweeps/*/slurm/*/*.out"), *self.home.glob("runs/*/logs/*.log")]
        return "\n".join(f"--- {file}\n{file.read_text()}" for file in files)

    def wait(self, cluster: Cluster, timeout_s: float = 240, *, reports: bool = False) -> None:
        """Until no job is left, but for those of reports unless these are asked for too."""

        def left() -> set[str]:
            awaited = [] if reports else map(manifest.report_jobs, manifest.names())
            return set(cluster.queue()).difference(*awaited)

        try:
            cluster.wait(lambda: not left(), timeout_s)
        except Exception as error:
            raise AssertionError(f"{cluster.queue()}\n{self.logs()}") from error


def states(runs: list[RunDirectory]) -> list[tuple[str, int]]:
    """(state, attempts) of each."""
    statuses = [run.status() for run in runs]
    return [(status.state, status.attempt) for status in statuses if status]


def training(run: RunDirectory) -> list[tuple[int, int, float]]:
    """(step, batch, loss) of every step."""
    return [(row["step"], row["batch/size"], row["train/loss"]) for row in run.rows() if "train/loss" in row]


def steps(run: RunDirectory) -> int:
    row = run.last_row()
    return row["step"] if row else 0


def final_loss(run: RunDirectory) -> float:
    row: Row = next(row for row in reversed(run.rows()) if "val/loss" in row)
    loss: float = row["val/loss"]
    return loss
