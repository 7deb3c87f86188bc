"""What the benchmark of tests compares is the same test, on the same samples."""

from __future__ import annotations

from pathlib import Path

import pytest

import benchmarks.tests_cost
from benchmarks.tests_cost import ByVmap, Problem, figures_of, step_times, trainer_of
from pipeline.gradients.statistics import GradientStatistics


@pytest.fixture(autouse=True)
def tiny(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = {"logistic": Problem((5,), 8, 4, 1), "cnn": Problem((1, 6, 6), 8, 4, 1)}
    monkeypatch.setattr(benchmarks.tests_cost, "PROBLEMS", problems)


def test_every_variant_takes_its_steps():
    seconds = step_times("logistic", rounds=3)
    assert {len(steps) for steps in seconds.values()} == {3}
    figures = figures_of(seconds)
    assert figures.keys() == {"norm test", "augmented test"}
    assert all(figure["costs"].keys() == {"units", "samples", "vmap"} for figure in figures.values())


def test_both_exact_ways_see_the_same(monkeypatch: pytest.MonkeyPatch):
    by_vmap = ByVmap(trainer_of("cnn", "vmap"), augmented=True)
    ours = trainer_of("cnn", "augmented test, samples")
    assert ours.capture
    seen: list[GradientStatistics] = []
    statistics = ours.capture.statistics

    def kept(*arguments: object) -> GradientStatistics:
        seen.append(statistics(*arguments))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(ours.capture, "statistics", kept)
    for _ in range(2):
        by_vmap.step()
        ours.step()
        assert seen[-1].variance == pytest.approx(by_vmap.variance, rel=1e-4)
        assert seen[-1].parallel_variance == pytest.approx(by_vmap.along, rel=1e-4)
        assert seen[-1].orthogonal_variance == pytest.approx(by_vmap.across, rel=1e-4)


def test_a_cost_is_what_comes_on_top():
    steps = {"plain": [(1.0, 1.0)] * 3}
    for test in ("norm test", "augmented test"):
        steps |= {
            f"{test}, units": [(1.25, 1.0)] * 3,
            f"{test}, samples": [(2.0, 1.0)] * 3,
            f"{test}, vmap": [(2.5, 1.0)] * 3,
        }
    figure = figures_of(steps)["norm test"]
    assert [figure["costs"][way]["cost"] for way in ("units", "samples", "vmap")] == [0.25, 1.0, 1.5]
    assert figure["vmap costs as many times"] == {"units": 6.0, "samples": 1.5} and figure["met"]
    steps["norm test, samples"] = [(2.6, 1.0)] * 3
    assert not figures_of(steps)["norm test"]["met"]
