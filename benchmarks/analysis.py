"""How long wandb's offline files take to read: python -m benchmarks.analysis [--rows N] [--files N] [--json]

The files are written by wandb's client, as it would for training runs of so many logged steps. They are read
by `analysis.wandb_files` and by wandb's own reader, `wandb leet inspect --json`, in turns and in fresh
processes: one for all files here, one for each file there, since that is how they are used. wandb's is timed
up to its text alone, and with that parsed. The record of the same rows, metrics.jsonl, is the limit.

Medians. Exit code 1 when a reading misses its target, a multiple of the speed of wandb's reader.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from analysis.sources import COLUMNS
from pipeline.overrides import CONF
from pipeline.store import MetricsWriter

ROOT = CONF.parent
METRICS = 20
TARGET = 4.0

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
    parser.add_argument("--rows", type=int, default=10_000, help="of each file (default 10000)")
    parser.add_argument("--files", type=int, default=3, help="of the sweep (default 3)")
    parser.add_argument("--repeat", type=int, default=3, help="times that each is read (default 3)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    figures = measure(options.files, options.rows, options.repeat)
    if options.json:
        print(json.dumps([asdict(figure) | {"missed": figure.missed} for figure in figures], indent=1))
    else:
        width = max(len(figure.what) for figure in figures)
        title = f"{options.files} files of {options.rows:,} rows × {METRICS} metrics"
        width = max(width, len(title))
        print(f"{title:{width}}  seconds  µs a row  speed  target")
        for f in figures:
            target = "" if f.target is None else f"{f.target:5.1f}×" + ("  MISSED" if f.missed else "")
            print(
                f"{f.what:{width}}  {f.seconds:7.2f}  {1e6 * f.seconds / f.rows:8.1f}  {f.speed:4.1f}×  "
                f"{target}".rstrip()
            )
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", file=sys.stderr)
    return 1 if any(figure.missed for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
