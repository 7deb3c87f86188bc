"""How long logs take to read: python -m benchmarks.analysis [--rows N] [--files N] [--runs N] [--json]

First wandb's offline files, written by wandb's client, as it would for training runs of so many logged
steps. They are read by `analysis.wandb_files` and by wandb's own reader, `wandb leet inspect --json`, in
turns and in fresh processes: one for all files here, one for each file there, since that is how they are
used. wandb's is timed up to its text alone, and with that parsed. The record of the same rows, read by
Python's json, is the limit.

Then the records of a sweep of so many runs, in fresh processes, from the start of Python to the table of all
rows: without a cache, from the cache, and read by Python's json. And the whole command, `python -m analysis`,
with all its figures, tables and pages. The system has the files in its memory, since they were just written.

Medians. Exit code 1 when a reading misses its target: a multiple of the speed of wandb's reader, or seconds
and memory of a sweep of 100 runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from analysis.records import COLUMNS
from benchmarks.memory import peak_mib
from benchmarks.printing import beside_json, print_json
from pipeline.identity import run_id
from pipeline.overrides import CONF
from pipeline.store import MetricsWriter, RunDirectory
from tests.support import config

ROOT = CONF.parent
METRICS = 20
TARGET = 4.0
COLD_S, CACHED_S, PEAK_MIB = 10.0, 2.0, 1024.0
_LOOK_S = 0.01  # between looks at the memory of a process

LEET = "wandb leet inspect --json"
_WRITE = """
import json, sys, wandb
settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, x_save_requirements=False)
run = wandb.init(mode="offline", dir=sys.argv[1], project="benchmark", settings=settings)
for line in sys.stdin:
    run.log(json.loads(line))
run.finish()
"""
_READ = """
import sys
from pathlib import Path
from analysis.wandb_files import read_run
metrics = sys.argv[1].split(",") if sys.argv[1] else None
print(sum(len(read_run(Path(file), metrics).rows) for file in sys.argv[2:]))
"""
_READ_RECORD = """
import sys
from pathlib import Path
from pipeline.store import read_rows
print(sum(len(read_rows(Path(file))) for file in sys.argv[1:]))
"""


_LOAD = """
from analysis.load import load_sweep
print(len(load_sweep("s").record))
"""
_LOAD_SLOWLY = """
import json
from pathlib import Path
from pipeline.store import RunDirectory, home
from analysis.records import table
print(sum(len(table(RunDirectory(run).rows())) for run in (home() / "runs").iterdir()))
"""


@dataclass(frozen=True)
class Figure:
    what: str
    rows: int
    seconds: float
    speed: float  # as a multiple of that of wandb's reader
    target: float | None = None

    @property
    def missed(self) -> bool:
        return self.target is not None and self.speed < self.target


def measure(files: int, rows: int, repeat: int) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder) / f"run-{number}" for number in range(files)]
        for number, run in enumerate(runs):
            _write(run, rows, seed=number)
        logs = [str(log) for run in runs for log in run.glob("wandb/offline-run-*/run-*.wandb")]
        records = [str(run / "metrics.jsonl") for run in runs]
        readers: dict[str, Callable[[], int]] = {
            LEET: lambda: sum(_leet(log, parse=False) for log in logs),
            f"{LEET}, parsed": lambda: sum(_leet(log, parse=True) for log in logs),
            "all metrics": lambda: _python(_READ, "", *logs),
            "the metrics of a report": lambda: _python(_READ, ",".join(COLUMNS), *logs),
            "metrics.jsonl": lambda: _python(_READ_RECORD, *records),
        }
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(repeat):
            for name, read in readers.items():
                start = time.perf_counter()
                found = read()
                seconds[name].append(time.perf_counter() - start)
                if found != files * rows:
                    raise RuntimeError(f"{name}: {found} rows instead of {files * rows}")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    targets = {"all metrics": TARGET, "the metrics of a report": TARGET}
    return [
        Figure(name, files * rows, median, medians[LEET] / median, targets.get(name))
        for name, median in medians.items()
    ]


# --- the records of a sweep ------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepFigure:
    what: str
    runs: int
    rows: int  # of all runs
    seconds: float
    peak_mib: float
    target_s: float | None = None  # of 100 runs of 10,000 rows; it grows with them
    target_mib: float | None = None

    @property
    def missed(self) -> bool:
        share = max(1.0, self.rows / 1_000_000)
        slow = self.target_s is not None and self.seconds > self.target_s * share
        return slow or (self.target_mib is not None and self.peak_mib > self.target_mib * share)


def measure_sweep(runs: int, rows: int, repeat: int) -> list[SweepFigure]:
    with tempfile.TemporaryDirectory() as home:
        _write_sweep(Path(home), runs, rows)
        load, command = ["-c", _LOAD], ["-m", "analysis", "s"]
        readings: dict[str, tuple[list[str], bool, float | None, float | None]] = {
            "load, without a cache": (load, False, COLD_S, PEAK_MIB),
            "load, from the cache": (load, True, CACHED_S, PEAK_MIB),
            "the same rows with json and python": (["-c", _LOAD_SLOWLY], True, None, None),
            "the command, without a cache": (command, False, None, PEAK_MIB),
            "the command, from the cache": (command, True, None, PEAK_MIB),
        }
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in readings}
        for _ in range(repeat):
            for name, (words, cached, _, _) in readings.items():
                if not cached:
                    shutil.rmtree(Path(home) / "cache", ignore_errors=True)
                taken[name].append(_watched([sys.executable, *words], Path(home), runs * rows))
        return [
            SweepFigure(
                name,
                runs,
                runs * rows,
                statistics.median(seconds for seconds, _ in taken[name]),
                max(peak for _, peak in taken[name]),
                target_s,
                target_mib,
            )
            for name, (_, _, target_s, target_mib) in readings.items()
        ]


def _watched(command: Sequence[str], home: Path, rows: int) -> tuple[float, float]:
    """Its wall time in seconds and its highest resident memory in MiB."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        environment = os.environ | {"CRESCENDO_HOME": str(home), "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=home, env=environment, stdout=output, stderr=output)
        peak = 0.0
        while process.poll() is None:  # what has ended has no memory to be looked at
            with contextlib.suppress(ProcessLookupError):
                peak = peak_mib(process.pid)
            time.sleep(_LOOK_S)
        seconds = time.perf_counter() - start
        output.seek(0)
        said = output.read()
    if process.returncode != 0 or ("-c" in command and int(said) != rows):
        raise RuntimeError(f"{command} ended with {process.returncode}:\n{said}")
    return seconds, peak


def _write_sweep(home: Path, runs: int, rows: int) -> None:
    """Four schedules, as many seeds as it takes."""
    batches = ["constant_16", "constant_64", "stages", "norm_test"]
    points = []
    for number in range(runs):
        axes = {"batch": batches[number % len(batches)], "seed": str(number // len(batches))}
        overrides = ["experiment=demo", *(f"{axis}={value}" for axis, value in axes.items())]
        settings = config(*overrides)
        run = RunDirectory(home / "runs" / run_id(settings))
        run.freeze(settings)
        numbers = random.Random(number)
        tokens = settings.budget_tokens / (rows - 1)
        lines = [json.dumps(_row(numbers, step, int(step * tokens))) for step in range(1, rows)]
        end = _counters(rows - 1, settings.budget_tokens)
        lines.append(json.dumps({**end, "val/loss": 2 + numbers.random() / 10}))
        run.metrics_file.write_text("\n".join(lines) + "\n")
        run.update_status(state="DONE", attempt=1, step=rows - 1, tokens_seen=settings.budget_tokens)
        points.append({"run": run.id, "axes": axes, "overrides": overrides, "problem": None})
    manifest = {"name": "s", "command": ["python"], "axes": ["batch", "seed"], "points": points}
    (home / "sweeps" / "s").mkdir(parents=True)
    (home / "sweeps" / "s" / "manifest.json").write_text(json.dumps(manifest))


def _counters(step: int, tokens: int) -> dict[str, float]:
    return {
        "step": step,
        "tokens": tokens,
        "sequences": step,
        "time": step * 1.0,
        "wall": 1e9 + step,
        "attempt": 1,
    }


def _row(numbers: random.Random, step: int, tokens: int) -> dict[str, float]:
    row = _counters(step, tokens)
    row |= {"train/loss": 2 + 2 / step + numbers.gauss(0, 0.1), "batch/size": 16, "batch/requested": 16}
    row |= {"stat/noise_scale": 100 * numbers.random()}
    return row | {f"stat/layer_{i}": numbers.random() for i in range(METRICS - len(row))}


# --- wandb's files ---------------------------------------------------------------------------------------


def _write(run: Path, rows: int, seed: int) -> None:
    """The same rows as metrics.jsonl and, through wandb's client, as an offline file."""
    numbers = random.Random(seed)
    names = [*COLUMNS, *(f"stat/layer_{i}" for i in range(METRICS - len(COLUMNS)))]
    record = MetricsWriter(run / "metrics.jsonl")
    for step in range(1, rows + 1):
        record.write({name: step if name == "step" else numbers.random() for name in names})
    record.close()
    text = (run / "metrics.jsonl").read_text()
    _call([sys.executable, "-c", _WRITE, str(run)], input=text, cwd=run)


def _leet(log: str, parse: bool) -> int:
    """The history rows that wandb's reader finds."""
    wandb = str(Path(sys.executable).with_name("wandb"))
    lines = _call([wandb, "leet", "inspect", "--json", log]).splitlines()
    if parse:
        return sum(json.loads(line)["type"] == "history" for line in lines)
    return sum('"type":"history"' in line for line in lines)


def _python(script: str, *arguments: str) -> int:
    return int(_call([sys.executable, "-c", script, *arguments]))


def _call(command: Sequence[str], input: str | None = None, cwd: Path = ROOT) -> str:
    result = subprocess.run(command, cwd=cwd, input=input, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{command} ended with {result.returncode}:\n{result.stderr}")
    return result.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000, help="of each file and each run (default 10000)")
    parser.add_argument("--files", type=int, default=3, help="of wandb's, 0 for none (default 3)")
    parser.add_argument("--runs", type=int, default=100, help="of the sweep, 0 for none (default 100)")
    parser.add_argument("--repeat", type=int, default=3, help="times that each is read (default 3)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    files = measure(options.files, options.rows, options.repeat) if options.files else []
    sweep = measure_sweep(options.runs, options.rows, options.repeat) if options.runs else []
    figures = [*files, *sweep]
    if options.json:
        print_json([asdict(figure) | {"missed": figure.missed} for figure in figures])
    with beside_json(options.json):
        _print_files(files, f"{options.files} files of {options.rows:,} rows × {METRICS} metrics")
        _print_sweep(sweep, f"{options.runs} runs of {options.rows:,} rows × {METRICS} metrics")
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", file=sys.stderr)
    return 1 if any(figure.missed for figure in figures) else 0


def _print_files(figures: Sequence[Figure], title: str) -> None:
    if not figures:
        return
    width = max(len(title), *(len(figure.what) for figure in figures))
    print(f"{title:{width}}  seconds  µs a row  speed  target")
    for f in figures:
        target = "" if f.target is None else f"{f.target:5.1f}×" + ("  MISSED" if f.missed else "")
        print(
            f"{f.what:{width}}  {f.seconds:7.2f}  {1e6 * f.seconds / f.rows:8.1f}  {f.speed:4.1f}×  "
            f"{target}".rstrip()
        )
    print()


def _print_sweep(figures: Sequence[SweepFigure], title: str) -> None:
    if not figures:
        return
    width = max(len(title), *(len(figure.what) for figure in figures))
    print(f"{title:{width}}  seconds  target  peak MiB  target")
    for f in figures:
        seconds = "" if f.target_s is None else f"{f.target_s:.0f}"
        peak = "" if f.target_mib is None else f"{f.target_mib:.0f}"
        missed = "  MISSED" if f.missed else ""
        print(
            f"{f.what:{width}}  {f.seconds:7.2f}  {seconds:>6}  {f.peak_mib:8.0f}  {peak:>6}{missed}".rstrip()
        )


if __name__ == "__main__":
    sys.exit(main())
