from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from analysis import figures
from analysis.__main__ import main
from analysis.evaluations import STEPS, TIME, TOKENS, Axis
from analysis.load import load_sweep
from analysis.render import render, render_html
from analysis.report import Report, build
from analysis.tables import targets_table, to_json
from analysis.target import Reach, crossing
from tests.analysis.synthetic import Point, pairs, write_sweep
from tests.analysis.test_equal import Evaluation, evaluated
from tests.analysis.test_report import cells

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("losses", "target", "reached", "place"),
    [
        ([4.0, 3.0, 2.0], 2.5, "there", 30.0),
        ([4.0, 3.0, 2.0], 3.75, "there", 12.5),
        ([4.0, 3.0, 2.0], 3.0, "there", 20.0),  # right at an evaluation
        ([4.0, 3.0, 2.0], 2.0, "there", 40.0),  # right at the last
        ([4.0, 3.0, 3.0], 3.0, "there", 20.0),  # a tie: the first counts
        ([4.0, 2.0, 5.0], 3.0, "there", 15.0),  # it rises again
        ([4.0, 2.0, NAN], 3.0, "there", 15.0),  # it diverges afterwards
        ([4.0, 3.0, 2.0], 1.9, "not", 40.0),
        ([4.0, NAN, NAN], 3.0, "not", 40.0),
        ([NAN, NAN, NAN], 3.0, "not", 40.0),
        ([4.0, 3.0, 2.0], 4.0, "before", 10.0),
        ([4.0, 3.0, 2.0], 9.0, "before", 10.0),
        ([4.0, NAN, 2.0], 3.0, "before", 40.0),  # somewhere on the way there
        ([INF, 2.0, 2.0], 3.0, "before", 20.0),
    ],
)
def test_the_first_crossing_by_hand(losses: list[float], target: float, reached: str, place: float) -> None:
    assert crossing(np.array([10.0, 20.0, 40.0]), np.array(losses), target) == (reached, pytest.approx(place))


def test_a_single_evaluation_tells_only_by_when() -> None:
    assert crossing(np.array([10.0]), np.array([3.0]), 3.0) == ("before", 10.0)
    assert crossing(np.array([10.0]), np.array([3.0]), 2.9) == ("not", 10.0)


def falling(*tokens: int, ends: float = 2.0) -> list[Evaluation]:
    """From loss 4 at tokens[0] to 3 at tokens[1] and so on, a step for every 10 tokens, a second for 20."""
    losses = [4.0, 3.0, ends]
    return [(n // 10, n, n / 20, loss) for n, loss in zip(tokens, losses, strict=True)]


def sweep(**runs: Sequence[Sequence[Evaluation]]) -> list[Point]:
    return [
        Point({"batch": batch, "seed": str(seed)}, evaluated(*curve))
        for batch, curves in runs.items()
        for seed, curve in enumerate(curves)
    ]


def report(points: Sequence[Point], target: float | None = None, *baseline: str) -> Report:
    write_sweep("s", points)
    return build(load_sweep("s"), baseline, 0.0, target)


def of(found: Report, schedule: str, axis: Axis = TOKENS) -> Reach:
    (target,) = found.targets
    (reach,) = (reach for reach in target.of(axis) if reach.schedule == schedule)
    return reach


BASELINE = [falling(100, 200, 400), falling(100, 200, 600, ends=2.2)]


def test_the_default_target_is_the_one_that_every_run_of_the_baseline_reaches(home: Path) -> None:
    """Seed 1 ends at 2.2, at 600 tokens; seed 0 comes down to that at 200 + 0.8 · 200."""
    found = report(sweep(constant_16=BASELINE, norm_test=[falling(50, 100, 200), falling(50, 100, 200)]))
    (target,) = found.targets
    assert (target.loss, target.baseline) == (2.2, "constant_16")
    assert target.why == "the highest final one of constant_16, reached by each of its runs"
    baseline = of(found, "constant_16")
    assert [(c.seed, c.reached, c.at) for c in baseline.costs] == [
        ("0", "there", pytest.approx(360)),
        ("1", "there", pytest.approx(600)),
    ]
    assert baseline.mean is not None and baseline.mean.mean == pytest.approx(480)
    assert baseline.mean.half_width == pytest.approx(12.7062 * 120, rel=1e-4)
    assert (baseline.kind, baseline.ratio, baseline.words) == (None, None, "480 ± 1.52k tokens")


def test_the_speed_up_is_paired_and_geometric(home: Path) -> None:
    """At 3.0 the baseline is after 200 tokens, norm_test after 100 and 50: ratios 2 and 4, so √8 and a half
    width of 12.706 · ln(4/2)/2 in the logarithm."""
    found = report(sweep(constant_16=BASELINE, norm_test=[falling(50, 100, 200), falling(25, 50, 100)]), 3.0)
    reach = of(found, "norm_test")
    assert reach.ratio is not None and reach.speedup is not None and reach.speedup.n == 2
    assert reach.ratio.mean == pytest.approx(math.sqrt(8))
    assert math.log(reach.ratio.high / reach.ratio.mean) == pytest.approx(12.7062 * math.log(2) / 2, rel=1e-4)
    assert reach.ratio.low * reach.ratio.high == pytest.approx(8)
    assert reach.kind == "not distinguishable"
    assert (
        reach.p == pytest.approx(1 - 2 / math.pi * math.atan(math.log(8) / math.log(2))) == reach.p_adjusted
    )
    assert found.targets[0].why == "the one asked for with --target"


def test_sooner_in_tokens_and_later_in_time(home: Path) -> None:
    """Half the tokens, ten times the time for each of them, in both seeds: no scatter at all."""
    slow = [(n // 10, n, n / 2, loss) for n, loss in ((50, 4.0), (100, 3.0), (200, 2.0))]
    found = report(sweep(constant_16=BASELINE, norm_test=[slow, slow]), 3.0)
    assert [of(found, "norm_test", axis).kind for axis in (TOKENS, STEPS, TIME)] == [
        "sooner",
        "sooner",
        "later",
    ]
    ratios = [of(found, "norm_test", axis).ratio for axis in (TOKENS, STEPS, TIME)]
    assert [ratio.mean for ratio in ratios if ratio] == pytest.approx([2.0, 2.0, 0.2])
    rows = cells(render("report.md.j2", found), "What it takes to reach validation loss 3.000")
    assert [row["training time"] for row in rows] == ["10.0 s ± 0.0 s", "50.0 s ± 0.0 s"]
    assert [row["speed-up"] for row in rows] == ["baseline", "0.20× later"]  # the last of three, in time
    assert '<span class="kind better">sooner</span> 2.00×' in render_html(found)


def test_verdicts_on_an_axis_are_corrected_for_their_number(home: Path) -> None:
    """Of two degrees of freedom p = 1 − t/√(2 + t²); with stages beside it, twice that."""

    def scaled(factors: Sequence[float]) -> list[list[Evaluation]]:
        return [[(int(f * s), int(f * n), f * t, loss) for s, n, t, loss in LONG] for f in factors]

    others = {"norm_test": (0.5, 0.4, 0.28), "stages": (0.9, 1.0, 1.2)}
    curves = {name: scaled(factors) for name, factors in others.items()}
    found = report(sweep(constant_16=scaled((1.0, 1.0, 1.0)), **curves), 3.0)
    gains = [-math.log(f) for f in others["norm_test"]]
    mean = sum(gains) / 3
    t = mean / math.sqrt(sum((g - mean) ** 2 for g in gains) / 2 / 3)
    p = 1 - t / math.sqrt(2 + t**2)
    reach = of(found, "norm_test")
    assert reach.p == pytest.approx(p) and reach.p_adjusted == pytest.approx(2 * p)
    assert p < 0.05 < 2 * p and reach.kind == "not distinguishable"


LONG = [(100, 1000, 50.0, 4.0), (200, 2000, 100.0, 3.0), (400, 4000, 200.0, 2.0)]


def test_a_run_that_never_gets_there_is_said_and_never_averaged_away(home: Path) -> None:
    late = falling(100, 200, 300, ends=2.5)
    found = report(sweep(constant_16=BASELINE, norm_test=[falling(50, 100, 200), late]))
    reach = of(found, "norm_test")
    assert (reach.mean, reach.ratio, reach.kind) == (None, None, "censored")
    assert reach.words == "not within 300 tokens (1 of 2 seeds)"
    assert of(found, "norm_test", STEPS).words == "not within 30 steps (1 of 2 seeds)"
    assert [(c.reached, c.at) for c in reach.costs] == [("there", pytest.approx(180)), ("not", 300)]
    (row,) = (
        row
        for row in targets_table(found).to_dicts()
        if row["axis"] == "tokens" and row["schedule"] == "norm_test"
    )
    assert (row["runs"], row["reached"], row["cost"], row["verdict"]) == (2, 1, None, "censored")
    for words in (render("report.md.j2", found), render_html(found)):
        assert "not within 300 tokens (1 of 2 seeds)" in words


def test_a_diverged_run_is_looked_for_up_to_its_end(home: Path) -> None:
    diverged = [(10, 100, 5.0, 4.0), (20, 200, 10.0, NAN), (30, 300, 15.0, NAN)]
    found = report(sweep(constant_16=BASELINE, norm_test=[falling(50, 100, 200), diverged]))
    assert of(found, "norm_test").words == "not within 300 tokens (1 of 2 seeds)"
    assert json.dumps(to_json(found), allow_nan=False)


def test_a_run_that_starts_below_the_target_was_there_before(home: Path) -> None:
    found = report(sweep(constant_16=BASELINE, norm_test=[falling(50, 100, 200), falling(70, 100, 200)]), 4.5)
    reach = of(found, "norm_test")
    assert (reach.words, reach.mean, reach.kind) == ("at most 70 tokens", None, "censored")
    assert [c.reached for c in reach.costs] == ["before", "before"]


def test_a_diverged_baseline_has_the_target_of_its_other_runs(home: Path) -> None:
    diverged = [*falling(100, 200, 400)[:2], (40, 400, 20.0, NAN)]
    found = report(sweep(constant_16=[BASELINE[0], diverged], norm_test=[falling(50, 100, 200)] * 2))
    (target,) = found.targets
    assert target.loss == 2.0 and target.why.endswith("each of its runs that did not diverge")
    assert of(found, "constant_16").words == "not within 400 tokens (1 of 2 seeds)"
    assert of(found, "norm_test").kind == "censored"


def test_one_seed_has_a_ratio_without_an_interval(home: Path) -> None:
    found = report(sweep(constant_16=BASELINE[:1], norm_test=[falling(50, 100, 200)]))
    reach = of(found, "norm_test", TIME)
    assert reach.kind == "one seed" and reach.ratio is not None and reach.p is None
    assert reach.ratio.mean == reach.ratio.low == reach.ratio.high == pytest.approx(2.0)
    assert "Training time to validation loss 2.000 (the final one of constant_16): constant_16 20.0 s" in (
        found.targets[0].sentence
    )
    assert found.targets[0].sentence.endswith("norm_test 10.0 s (speed-up 2.00×).")


def test_each_baseline_has_its_own_target(home: Path) -> None:
    points = [
        Point({"model": model, "batch": batch, "seed": "0"}, evaluated(*falling(100, 200, 400, ends=loss)))
        for model, loss in (("tiny", 2.5), ("10m", 2.0))
        for batch in ("constant_16", "norm_test")
    ]
    found = report(points)
    assert [(t.baseline, t.loss) for t in found.targets] == [
        ("tiny · constant_16", 2.5),
        ("10m · constant_16", 2.0),
    ]
    assert [[r.schedule for r in t.of(TIME)] for t in found.targets] == [
        ["tiny · constant_16", "tiny · norm_test"],
        ["10m · constant_16", "10m · norm_test"],
    ]
    for words in (render("report.md.j2", found), render_html(found)):
        assert words.count("What it takes to reach") == 2 and words.count("Speed-up: what the baseline") == 1


def test_a_single_schedule_has_a_target_only_when_asked(home: Path) -> None:
    write_sweep("s", sweep(constant_16=BASELINE))
    assert build(load_sweep("s"), [], 0.0).targets == []
    assert of(build(load_sweep("s"), [], 0.0, 3.0), "constant_16").words == "200 ± 0 tokens"


def test_without_any_evaluation_there_is_nothing_to_reach(home: Path) -> None:
    points = pairs({"constant_16": [2.0], "norm_test": [2.1]})
    for point in points:
        assert point.rows is not None
        point.rows = point.rows[:-1]
    write_sweep("s", points)
    assert build(load_sweep("s"), [], 0.0).targets == []
    assert (
        build(load_sweep("s"), [], 0.0, 2.0).targets[0].sentence.endswith(": no finished run was evaluated.")
    )


@pytest.mark.parametrize("target", ["nan", "inf", "-1", "0"])
def test_a_target_that_is_no_loss(home: Path, capsys: pytest.CaptureFixture[str], target: str) -> None:
    write_sweep("s", sweep(constant_16=BASELINE))
    assert main(["s", f"--target={target}"]) == 2
    assert "a validation loss to reach is a positive number, such as 2.5" in capsys.readouterr().err


def test_the_screen_has_one_line_about_the_target(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "images", lambda spec: {"png": b"", "pdf": b"", "svg": b""})
    write_sweep("s", sweep(constant_16=BASELINE, norm_test=[falling(50, 100, 200)] * 2))
    assert main(["s", "--target", "3"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("validation loss 3.000") == 1
    assert (
        "Training time to validation loss 3.000 (the one asked for with --target): constant_16 10.0 s ± 0.0 s, "
        "norm_test 5.0 s ± 0.0 s (speed-up 2.00×, sooner).\n"
    ) in shown
    assert shown.count("/tables") == 1
