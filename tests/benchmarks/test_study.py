"""The tables and figures of docs/study, from a made-up sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.load import load_sweep
from benchmarks.study import Study, main
from tests.analysis.synthetic import Point, short_run, write_sweep

# 16 and 4 steps for the same tokens, and 8 of another schedule.
CONSTANTS = [
    ({"batch": "constant", "batch.size": "32"}, 2.0, 16),
    ({"batch": "constant", "batch.size": "64"}, 2.2, 4),
]
OTHERS = [({"batch": "norm_test", "batch.eta": "0.4"}, 2.05, 8)]


@pytest.fixture
def written(home: Path) -> Path:
    points = [
        Point({**axes, "seed": str(seed)}, short_run(loss + 0.01 * seed, steps))
        for axes, loss, steps in [*CONSTANTS, *OTHERS]
        for seed in range(3)
    ]
    write_sweep("study", points)
    return home


@pytest.mark.usefixtures("written")
def test_off_the_front_is_above_the_line_between_constant_batches():
    """Half-way between them in the logarithm of the steps, where the line is at 2.1."""
    study = Study(load_sweep("study"))
    (schedule,) = (s for s in study.schedules if s not in study.constants)
    found = study.off_the_front(schedule)
    assert len(study.constants) == 2 and found and found.mean == pytest.approx(2.05 - 2.1)
    at_the_end = study.losses(schedule, "step", 8)
    assert at_the_end and at_the_end.mean == pytest.approx(2.06)
    assert study.losses(schedule, "step", 9) is None


def test_the_command_writes_tables_and_figures(written: Path):
    assert main([str(written / "docs")]) == 0
    table = (written / "docs" / "tables.md").read_text()
    assert table.count("\n") == 5 and "-0.050" in table
    assert (written / "docs" / "front.png").stat().st_size > 0 and (written / "docs" / "batches.png").exists()
