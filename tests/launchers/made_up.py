"""Sweeps that never ran: their files, written without the project's code, and a scheduler that knows their jobs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BUDGET = 1000


COMMAND = ["python", "-m", "pipeline", "-m", "seed=0"]


def sweep(home: Path, name: str, runs: dict[str, dict[str, str]], launcher: str = "slurm") -> None:
    """A manifest of these runs and the values of their axes."""
    points = [
        {"run": run, "axes": axes, "overrides": [f"{k}={v}" for k, v in axes.items()], "problem": None, "command": COMMAND}
        for run, axes in runs.items()
    ]  # fmt: skip
    manifest = {
        "name": name,
        "created": 1_767_000_000,
        "command": COMMAND,
        "launcher": launcher,
        "axes": list(dict.fromkeys(axis for axes in runs.values() for axis in axes)),
        "common": {},
        "points": points,
        "jobs": [],
    }
    directory = home / "sweeps" / name
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def run(home: Path, run_id: str, state: str = "PENDING", tokens: int = 0, **more: Any) -> Path:
    """A run in this state, with a training row when it has read tokens. Its frozen config cannot be read."""
    directory = home / "runs" / run_id
    (directory / "logs").mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text("\tnobody needs to read it: [")
    now = time.time()
    status = {
        "state": state,
        "attempt": 1 if tokens else 0,
        "step": 0,
        "tokens_seen": 0,
        "budget_tokens": BUDGET,
    }
    status |= {"started": now - 100, "updated": now - 5, "host": None, "job": None, "mesh": None}
    status |= {"exit_code": None, "error": None, **more}
    (directory / "status.json").write_text(json.dumps(status))
    if tokens:
        row = {"step": tokens // 10, "tokens": tokens, "time": 2.0, "attempt": status["attempt"]}
        row |= {"train/loss": 2.5, "batch/size": 8, "throughput/tokens_per_s": 480.0}
        (directory / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return directory


def status(run_directory: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((run_directory / "status.json").read_text())
    return told


def change_status(run_directory: Path, **changes: Any) -> None:
    new = run_directory / "status.new"
    new.write_text(json.dumps(status(run_directory) | changes))
    new.replace(run_directory / "status.json")


class Scheduler:
    """SLURM's programs, which print what the test says and note what they were asked. scancel takes jobs out of
    the queue."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.queue_file, self.calls_file = directory / "queue", directory / "calls"
        self.jobs()
        self.answers("squeue", f"cat {self.queue_file}")
        self.answers("sacct", "true")
        self.answers("sbatch", "echo 'sbatch: error: nothing is submitted here' >&2; exit 1")
        self.answers("scontrol", "true")
        gone = f'grep -v -e "^$job|" -e "^${{job}}_" {self.queue_file} > {self.queue_file}.new'
        self.answers("scancel", f"for job; do {gone}; mv {self.queue_file}.new {self.queue_file}; done")

    def jobs(self, *lines: str) -> None:
        """What `squeue -h -r -o "%i|%T|%r|%N"` prints."""
        new = self.directory / "queue.next"
        new.write_text("".join(f"{line}\n" for line in lines))
        new.replace(self.queue_file)

    def answers(self, program: str, script: str) -> None:
        """An argument is a line of the notes, whatever it holds; a call ends with an empty one."""
        file = self.directory / program
        notes = f"{{ printf '%s\\n' {program} \"$@\"; echo; }} >> {self.calls_file}"
        file.write_text(f"#!/bin/sh\n{notes}\n{script}\n")
        file.chmod(0o755)

    def fails(self, program: str, words: str) -> None:
        self.answers(program, f"echo '{words}' >&2; exit 1")

    def asked(self, program: str) -> list[list[str]]:
        """The arguments of every call."""
        if not self.calls_file.exists():
            return []
        calls = [call.split("\n") for call in self.calls_file.read_text().split("\n\n") if call]
        return [arguments for name, *arguments in calls if name == program]


def without(programs: Iterable[str], path: str) -> str:
    """The PATH without directories that hold one of the programs."""
    return ":".join(
        d for d in path.split(":") if not any(os.path.exists(f"{d}/{program}") for program in programs)
    )
