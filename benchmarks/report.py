"""How long the report of a large sweep takes: python -m benchmarks.report [--schedules N] [--seeds N]
[--rows N] [--json]

The rows are made up in memory, so that reading them is not part of it (benchmarks.analysis). Timed are the
comparison, the page and the images; then Chromium opens the page, without network, until every chart is
drawn, and picks another axis. The best of three openings.

Exit code 1 when the page is larger, or later there, than its target.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from analysis import figures
from analysis.render import render_html
from analysis.report import build
from benchmarks.printing import beside_json, print_json
from tests.analysis.browser import BINARY, browser
from tests.analysis.synthetic import many_long_runs

T = TypeVar("T")
FLOOR = "the figures' data by json.dumps"  # the least that a page of them can take
STEPS = "document.querySelector('[name=axis][value=step]')"


@dataclass(frozen=True)
class Figure:
    what: str
    value: float
    unit: str
    target: float | None = None

    @property
    def missed(self) -> bool:
        return self.target is not None and self.value > self.target


def measure(schedules: int, seeds: int, rows: int) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CRESCENDO_HOME"] = folder
        sweep = many_long_runs(schedules, seeds, rows)
        report, comparing = _timed(lambda: build(sweep, [], 0.0))
        html, page = _timed(lambda: render_html(report))
        specs = [figures.joined(figure, report.datasets, report.labels) for figure in report.figures]
        floor = min(_timed(lambda: json.dumps(specs))[1] for _ in range(3))
        _, images = _timed(lambda: [figures.images(spec) for spec in specs])
        path = Path(folder) / "report.html"
        path.write_text(html)
        found = [
            Figure(FLOOR, floor, "s"),
            Figure("comparison and curves", comparing, "s"),
            Figure("page", page, "s"),
            Figure(f"{len(specs)} figures as PNG, SVG and PDF", images, "s"),
            Figure("size of the page", path.stat().st_size / 1e6, "MB", 5),
        ]
        return found + (_opened(path, Path(folder)) if BINARY else [])


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def _opened(path: Path, folder: Path) -> list[Figure]:
    drawn, changed = [], []
    for turn in range(3):
        with browser(folder / f"profile-{turn}") as window:
            window.emulate(1280, 800, "light")
            window.open(path)
            window.wait("document.body !== null && document.body.dataset.charts === 'light'")
            drawn.append(window.evaluate("Number(document.body.dataset.drawn)") / 1000)
            start = window.evaluate(
                "document.querySelector('[name=axis][value=step]').click(), performance.now()"
            )
            window.wait("document.body.dataset.charts === 'light'")
            changed.append((window.evaluate("Number(document.body.dataset.drawn)") - start) / 1000)
            if problems := window.problems():
                raise RuntimeError(f"the page complains: {problems}")
    return [
        Figure("open, until every chart is drawn", min(drawn), "s", 2),
        Figure("another axis, until every chart is drawn", min(changed), "s"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--schedules", type=int, default=25, help="of the sweep (default 25)")
    parser.add_argument("--seeds", type=int, default=4, help="of each schedule (default 4)")
    parser.add_argument("--rows", type=int, default=10_000, help="of each run (default 10000)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    found = measure(options.schedules, options.seeds, options.rows)
    if options.json:
        print_json([asdict(figure) | {"missed": figure.missed} for figure in found])
    with beside_json(options.json):
        title = f"{options.schedules} schedules × {options.seeds} seeds × {options.rows:,} rows"
        width = max(len(title), *(len(figure.what) for figure in found))
        print(f"{title:{width}}   value      target")
        for f in found:
            target = "" if f.target is None else f"≤ {f.target:g} {f.unit}" + ("  MISSED" if f.missed else "")
            print(f"{f.what:{width}}  {f.value:6.2f} {f.unit:3} {target}".rstrip())
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", file=sys.stderr)
    return 1 if any(figure.missed for figure in found) else 0


if __name__ == "__main__":
    sys.exit(main())
