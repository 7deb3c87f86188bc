"""Some faults of the cheap families, in the ordinary suite; all of them, and the others: make faults."""

from __future__ import annotations

import json
import multiprocessing
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults import families  # noqa: F401
from tests.faults.campaign import BAD, FAMILIES, PRELOADED, Family, Place, Verdict, campaign
from tests.faults.runs import Ended, cut_run, finished, judged, prepare
from tests.support import ROOT

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
    multiprocessing.set_forkserver_preload(PRELOADED)
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


def test_the_command_counts_them():
    command = [sys.executable, "-m", "tests.faults", "malformed config", "--share", "1/50", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["figures"]["malformed config"]["injected"] == told["figures"]["all"]["injected"] == 4
    assert told["figures"]["all"]["lost data"] == told["figures"]["all"]["hung"] == 0


# --- the campaign itself: it must be able to end badly


def another_loss(place: Place, draw: random.Random, number: int) -> Verdict:
    """In one row, of a step that is not trained again."""
    run = cut_run(place)
    lines = run.metrics_file.read_text().splitlines(keepends=True)
    lines[3] = lines[3].replace('"train/loss": ', '"train/loss": 1')
    run.metrics_file.write_text("".join(lines))
    return judged(run, finished(run), place.lab)


def traceback(place: Place, draw: random.Random, number: int) -> Verdict:
    run = cut_run(place)
    return judged(
        run, Ended(1, f"run {run.id}: FAILED: step 3\nTraceback (most recent call last):"), place.lab
    )


def no_reason(place: Place, draw: random.Random, number: int) -> Verdict:
    return judged(cut_run(place), Ended(1, "run x: attempt 2\nsomething is wrong"), place.lab)


def unfinished(place: Place, draw: random.Random, number: int) -> Verdict:
    return judged(cut_run(place), Ended(0, ""), place.lab)


def error(place: Place, draw: random.Random, number: int) -> Verdict:
    raise RuntimeError("of the fault itself")


def endless(place: Place, draw: random.Random, number: int) -> Verdict:
    time.sleep(600)
    return Verdict("survived")


def left_behind(place: Place, draw: random.Random, number: int) -> Verdict:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    return Verdict("survived")


@pytest.mark.parametrize(
    ("inject", "outcome"),
    [
        (another_loss, "lost data"), (traceback, "lost data"), (no_reason, "lost data"),
        (unfinished, "lost data"), (error, "lost data"), (endless, "hung"), (left_behind, "hung"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_counted(inject, outcome: str, lab: Path):
    timeout_s = 2.0 if inject is endless else 120.0
    (tally,) = campaign([Family("made up", 1, inject, timeout_s, sleeps=False)], lab)
    assert [verdict.outcome for verdict in tally.verdicts.values()] == [outcome]
