"""What the study of small problems reads off its records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks.problems_study import (
    PRESETS,
    Method,
    Preset,
    batches_over,
    curve_of,
    described,
    draw,
    over_seeds,
    reached,
    rounds_per_epoch,
    styles,
    table,
)
from tests.support import ROOT


def rows(sizes: list[int], gaps: list[float]) -> list[dict[str, float]]:
    """Of a run on 100 samples, with an evaluation after every step."""
    found = []
    for step, (size, seen, gap) in enumerate(zip(sizes, np.cumsum(sizes), gaps, strict=True), 1):
        clock = {"step": step, "epochs": seen / 100, "time": float(step)}
        found += [{**clock, "train/loss": 1.0, "batch/size": size}, {**clock, "exact/gap": gap}]
    return found


def test_a_step_that_the_budget_cut_is_left_out():
    cut = curve_of(rows([10, 20, 40, 30], [0.8, 0.4, 0.1, 0.5]), "exact/gap")
    assert cut.values.tolist() == [0.8, 0.4, 0.1] and cut.batches.tolist() == [10, 20, 40]
    assert len(curve_of(rows([10, 20, 40], [0.8, 0.4, 0.1]), "exact/gap").values) == 3


@pytest.mark.parametrize(("level", "epochs"), [(0.8, 0.1), (0.5, 0.3), (0.1, 0.7), (0.05, None)])
def test_when_a_level_is_reached(level: float, epochs: float | None):
    curve = curve_of(rows([10, 20, 40], [0.8, 0.4, 0.1]), "exact/gap")
    assert reached(curve, level, better=-1) == (epochs and pytest.approx(epochs))


def test_a_measure_of_which_more_is_better():
    curve = curve_of(rows([10, 20, 40], [0.5, 0.7, 0.9]), "exact/gap")
    assert reached(curve, 0.6, better=1) == pytest.approx(0.3)


def test_lines_are_medians_over_seeds_read_off_logarithms():
    gaps = {"0": [1.0, 0.01], "1": [1.0, 0.0001], "2": [1.0, 1.0]}
    method = Method("norm test", "", {s: curve_of(rows([10, 20], g), "exact/gap") for s, g in gaps.items()})
    median, least, most = over_seeds(method, np.array([0.05, 0.2, 0.3]), log=True)
    assert np.isnan(median[0]) and median[1:] == pytest.approx([0.1, 0.01])
    assert least[1:] == pytest.approx([0.01, 0.0001]) and most[1:] == pytest.approx([1, 1])
    assert batches_over(method, np.array([0.05, 0.1, 0.11, 0.3])).tolist() == [10, 10, 20, 20]


def test_a_kind_of_test_has_one_colour_and_its_lines_differ():
    settings = [
        {"batch": "norm_test", "batch.eta": "0.5"},
        {"batch": "inner_product", "batch.theta": "0.5", "batch.nu": "1.0e+6"},
        {"batch": "norm_test", "batch.eta": "0.5", "optim": "adagrad_norm", "optim.lr": "1.0"},
        {"batch": "constant", "batch.size": "8"},
        {"batch": "constant", "batch.size": "128"},
    ]
    sizes = [10, 10, 10, 8, 128]
    methods = [
        Method(*described(setting), {"0": curve_of(rows([size], [1.0]), "exact/gap")})
        for setting, size in zip(settings, sizes, strict=True)
    ]
    assert methods[2].label == "norm test, η 0.5, adagrad_norm" and methods[1].kind == "inner product alone"
    found = styles(methods)
    assert found[0][0] == found[2][0] and len(set(found)) == len(found)


def axes_of(row: str) -> dict[str, str]:
    axis, value = zip(*(word.split("=", 1) for word in row.split()), strict=True)
    return dict(zip(axis, value, strict=True))


@pytest.mark.parametrize("name", PRESETS)
def test_every_row_of_a_preset_has_a_line_of_its_own(name: str):
    experiment = yaml.safe_load((ROOT / "conf" / "experiment" / f"{name}.yaml").read_text())
    settings = [axes_of(row) for row in experiment["hydra"]["sweeper"]["rows"]]
    methods = [
        Method(*described(axes), {"0": curve_of(rows([int(axes.get("batch.size", 8))], [1.0]), "exact/gap")})
        for axes in settings
    ]
    assert len({method.label for method in methods}) == len(methods)
    assert len(set(styles(methods))) == len(methods)


def test_rounds_of_averaging(tmp_path: Path):
    """Of 6 steps of 10 samples, of 100: averaged every 2 steps, 3 rounds in 0.6 epochs."""
    curve = curve_of(rows([10] * 6, [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]), "exact/gap")
    method = Method(*described({"sync": "local_sgd", "sync.period": "2"}), {"0": curve}, period=2)
    assert method.rounds(curve) == 3 and rounds_per_epoch(method) == pytest.approx(5)
    preset = Preset("", "exact/gap", "AUC", [0.65], better=1, log=False, form=".3f", rounds=True)
    shown = table([method], preset).splitlines()
    assert shown[0] == "| method | steps | rounds | AUC at the end | epochs to AUC ≥ 0.65 |"
    assert shown[2] == "| variables averaged every 2 | 6 | 3 | 0.950 | 0.3 |"
    draw([method], preset, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0
