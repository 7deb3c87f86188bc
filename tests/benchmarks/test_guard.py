"""A ratio that became worse is found, and what is not worse is let pass."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import guard
from benchmarks.guard import BENCHMARKS, Benchmark, Comparison, Entry, Failed, Ratio, Ratios, compare, read

THEN = {"date": "2026-01-01", "hardware": "a machine", "python": "3.11.9", "torch": "2.13.0"}


def entry(ratio: float, tolerance: float = 0.1) -> Entry:
    return Entry(ratio, tolerance, **THEN)


def compared(ratio: Ratio, before: Entry) -> Comparison:
    (comparison,) = compare({"r": ratio}, {"r": before})
    return comparison


@pytest.mark.parametrize(
    ("value", "better", "verdict"),
    [
        (1.09, "lower", ""),
        (1.11, "lower", "WORSE"),
        (0.91, "lower", ""),
        (0.85, "lower", "better"),
        (0.92, "higher", ""),
        (0.90, "higher", "WORSE"),  # the baseline is 1/0.9 as fast: 11 % worse
        (1.20, "higher", "better"),
        (1.11, "same", "WORSE"),
        (0.90, "same", "WORSE"),
        (1.05, "same", ""),
    ],
)
def test_worse_by_more_than_the_tolerance(value: float, better: Any, verdict: str):
    assert compared(Ratio(value, better), entry(1.0)).verdict == verdict


def test_how_far_it_is_worse():
    assert compared(Ratio(3.0), entry(2.0)).worse == pytest.approx(0.5)
    assert compared(Ratio(2.0, "higher"), entry(3.0)).worse == pytest.approx(0.5)


def test_new_and_gone_are_said():
    found = compare({"kept": Ratio(1.0), "new": Ratio(1.0)}, {"kept": entry(1.0), "gone": entry(1.0)})
    assert {c.name: c.verdict for c in found} == {"kept": "", "new": "new", "gone": "gone"}
    assert [c.ratio for c in found] == [1.0, 1.0, None]


def test_tolerance_comes_from_the_quartiles():
    assert Ratio(2.0, spread=0.2).tolerance == 0.2
    assert Ratio(2.0, spread=0.001).tolerance == 0.05
    assert Ratio(2.0).tolerance == 0.25
    steps = BENCHMARKS["step"].ratios({"norm test": {"ratio": 2.0, "q1": 1.9, "q3": 2.3}})
    assert steps["norm test"].tolerance == pytest.approx(0.2)


def test_an_answer_is_held_against_its_import():
    def answer(question: str, seconds: float, worst: float) -> dict[str, Any]:
        return {
            "question": question,
            "median_s": seconds,
            "worst_s": worst,
            "target_s": None,
            "missed": False,
        }

    ratios = BENCHMARKS["cli"].ratios(
        [
            answer("python -c 'import hydra' (the floor)", 0.2, 0.22),
            answer("python -c 'import torch' (the floor)", 2.0, 2.0),
            answer("--help", 0.3, 0.36),
            answer("first optimizer step", 5.0, 5.0),
        ]
    )
    assert {name: ratio.value for name, ratio in ratios.items()} == {
        "--help": pytest.approx(1.5),
        "first optimizer step": pytest.approx(2.5),
    }
    assert ratios["--help"].spread == pytest.approx(0.3)


def test_ratios_over_a_peer():
    faster = {"median": 1.2, "q1": 1.14, "q3": 1.26}
    figures = {
        "ddp": {
            "fabric": {"faster": faster, "memory": 0.9, "start": 1.1},
            "olmo_core": {"refused": "loss 2 at step 1, ours 3"},
        }
    }
    assert BENCHMARKS["peers"].ratios(figures) == {
        "ddp, over fabric: tokens per second": Ratio(1.2, "higher", pytest.approx(0.1)),
        "ddp, over fabric: peak memory": Ratio(0.9, "lower", 0.0),
        "ddp, over fabric: time to the first step": Ratio(1.1),
    }


def test_a_sweep_and_a_report_are_multiples_of_their_floors():
    sweep = [
        {"what": "compose, Hydra alone", "points": 20, "seconds": 1.0, "target_s": None},
        {"what": "freeze", "points": 1000, "seconds": 5.0, "target_s": 10.0},
    ]
    assert BENCHMARKS["sweep"].ratios(sweep) == {"freeze": Ratio(pytest.approx(0.1))}
    report = [
        {"what": "the figures' data by json.dumps", "value": 0.5, "unit": "s"},
        {"what": "page", "value": 1.5, "unit": "s"},
        {"what": "size of the page", "value": 3.4, "unit": "MB"},
    ]
    assert BENCHMARKS["report"].ratios(report) == {"page": Ratio(3.0)}


def test_every_result_at_hand_has_ratios_of_the_baseline():
    """The readers fit what the benchmarks print, and the baseline's names are theirs."""
    baseline = read(guard.BASELINE)
    results = guard.ROOT / "benchmarks" / "results"
    for name in ("cli", "step", "statistics", "tests_cost", "analysis", "projection", "simulate_sync"):
        content = json.loads((results / f"{name.replace('_', '-')}-cpu.json").read_text())
        ratios = BENCHMARKS[name].ratios(guard.figures_in(content))
        assert ratios and baseline[name].keys() & ratios.keys(), name


# --- the command, with a benchmark that prints what a test wants


@pytest.fixture
def printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with what the benchmark `fake` prints, once on each line; a baseline with two ratios of it."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "fake.py").write_text(
        "import pathlib, sys\n"
        "file = pathlib.Path('printed')\n"
        "line, _, rest = file.read_text().partition('\\n')\n"
        "file.write_text(rest)\n"
        "print('its table', file=sys.stderr)\n"
        "print(line)\n"
        "sys.exit('met' not in line)\n"
    )

    def ratios(figures: dict[str, float]) -> Ratios:
        return {name: Ratio(value) for name, value in figures.items()}

    monkeypatch.setattr(guard, "BENCHMARKS", {"fake": Benchmark(ratios), "other": Benchmark(ratios)})
    monkeypatch.setattr(guard, "ROOT", tmp_path)
    monkeypatch.setattr(guard, "BASELINE", tmp_path / "baseline.json")
    guard.write({"fake": {"a": entry(1.0), "b": entry(1.0)}, "other": {"c": entry(1.0)}}, guard.BASELINE)
    return tmp_path / "printed"


def told(*figures: dict[str, float], met: bool = True) -> str:
    return "".join(
        json.dumps({"figures": each, "verdict": "met" if met else "missed"}) + "\n" for each in figures
    )


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["guard", "--only", "fake", *words])
    return guard.main()


def test_what_is_worse_twice_fails_and_says_how_to_accept(
    printed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    printed.write_text(told({"a": 1.3, "b": 1.0}, {"a": 1.2, "b": 1.5}))
    assert command(monkeypatch) == 1
    text = capfd.readouterr()
    assert "fake, a: 1.2, worse than 1 by 20.0%; tolerance 10.0%" in text.out
    assert "accept: python -m benchmarks.guard --only fake --update" in text.out
    assert "2 ratios, 1 worse" in text.out and text.err.count("its table") == 2


def test_what_is_worse_once_passes(printed: Path, monkeypatch: pytest.MonkeyPatch):
    printed.write_text(told({"a": 1.3, "b": 1.0}, {"a": 1.0, "b": 1.3}))
    assert command(monkeypatch) == 0


def test_its_own_targets_are_said_and_do_not_count(
    printed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    printed.write_text(told({"a": 1.0, "b": 1.0}, met=False))
    assert command(monkeypatch) == 0
    assert "missed targets of its own" in capfd.readouterr().out


def test_update_keeps_what_it_did_not_measure(printed: Path, monkeypatch: pytest.MonkeyPatch):
    printed.write_text(told({"a": 1.3, "d": 2.0}, {"a": 1.3, "d": 2.0}))
    assert command(monkeypatch, "--update") == 0
    baseline = read(guard.BASELINE)
    assert baseline["other"] == {"c": entry(1.0)} and baseline["fake"]["b"] == entry(1.0)
    assert baseline["fake"]["a"] == Entry(1.3, 0.25, **guard.here())
    assert baseline["fake"]["d"].ratio == 2.0


def test_json_alone_on_standard_output(
    printed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    printed.write_text(told({"a": 1.05, "b": 0.5}))
    assert command(monkeypatch, "--json") == 0
    figures = json.loads(capfd.readouterr().out)["figures"]["fake"]
    assert {figure["name"]: figure["verdict"] for figure in figures} == {"a": "", "b": "better"}


@pytest.mark.parametrize("what", ["", "no json"])
def test_a_benchmark_that_fails_is_told_and_fails(
    printed: Path, what: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    printed.write_text(what)
    assert command(monkeypatch) == 1
    assert "fake: FAILED, printed no figures" in capfd.readouterr().out


def test_a_benchmark_that_hangs_is_ended_with_its_processes(printed: Path, monkeypatch: pytest.MonkeyPatch):
    child = "import os, pathlib, time; pathlib.Path('child').write_text(str(os.getpid())); time.sleep(60)"
    (printed.parent / "benchmarks" / "fake.py").write_text(
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])\n"
    )
    monkeypatch.setattr(guard, "LIMIT_S", 3.0)
    began = time.monotonic()
    with pytest.raises(Failed, match="did not end"):
        guard.run("fake")
    assert time.monotonic() - began < 30
    stat = Path("/proc") / (printed.parent / "child").read_text() / "stat"
    deadline = time.monotonic() + 10
    while _runs(stat):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(stat: Path) -> bool:
    """Whether the process of this /proc/N/stat is there, and not only its exit code."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
