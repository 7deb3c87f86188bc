"""Some faults of the cheap families, in the ordinary suite; all of them, and the others: make faults."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from tests.faults import families  # noqa: F401
from tests.faults.campaign import BAD, FAMILIES, campaign
from tests.faults.runs import prepare

# The others start real processes or wait: tests/training/test_worker.py and tests/launchers have their like.
SHARES = {
    "checkpoint": 25, "metrics line, resumed": 15, "metrics line, compared": 20, "status.json": 30,
    "config.yaml": 20, "status.json under a run": 12, "manifest.json": 20, "malicious file": 8, "clock step": 30,
    "NaN loss": 30, "rank killed at a step": 60, "signal": 40, "real-time signal": 4, "full disk": 40,
    "read-only": 24, "malformed config": 40,
}  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("faults") / "lab"
    multiprocessing.set_forkserver_preload(["tests.faults.families"])
    made = multiprocessing.get_context("forkserver").Process(target=prepare, args=(place,))
    made.start()
    made.join(240)
    assert made.exitcode == 0
    return place


@pytest.mark.parametrize("name", SHARES)
def test_no_fault_costs_data_or_hangs(name: str, lab: Path):
    (tally,) = campaign([FAMILIES[name]], lab, share=(1, SHARES[name]))
    assert tally.verdicts
    bad = {number: v for number, v in tally.verdicts.items() if v.outcome in BAD}
    assert not bad
