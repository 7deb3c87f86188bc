"""Sweeps on disk -> verdicts. Expected numbers are worked out by hand beside each test."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from analysis.load import load_sweep
from analysis.report import Report, build
from analysis.typeset import latex
from analysis.verdict import Comparison
from pipeline.config import ConfigError
from pipeline.store import Row
from tests.analysis.synthetic import Point, pairs, short_run, train_row, val_row, write_sweep

MINUS = "\N{MINUS SIGN}"


def report(points: list[Point], *baseline: str, common: tuple[str, ...] = ("experiment=demo",)) -> Report:
    write_sweep("s", points, common)
    return build(load_sweep("s"), baseline, written=0.0)


def verdict(points: list[Point], *baseline: str) -> Comparison:
    (comparison,) = report(points, *baseline).comparisons
    return comparison


def test_the_demo_table_is_not_distinguishable(home: Path) -> None:
    """Differences −0.001 and 0.015: mean 0.007, half width 12.706 × 0.008 = 0.102.

    Means: norm_test (2.190 + 2.175)/2 = 2.1825 with 12.706 × 0.0075 = 0.095.
    """
    found = verdict(
        pairs(
            {"constant_16": [2.191, 2.160], "norm_test": [2.190, 2.175]},
            constant_16={"steps": 50, "seconds": 20.0},
            norm_test={"steps": 40, "seconds": 18.0},
        )
    )
    assert found.kind == "not distinguishable"
    assert found.sentence == (
        f"norm_test ends at validation loss 2.183 ± 0.095, 0.01 higher than constant_16 (95% interval {MINUS}0.09 "
        f"to 0.11, 2 seeds): not distinguishable; it took 40 optimizer steps instead of 50 ({MINUS}20%) and 18.0 s "
        f"of training instead of 20.0 s ({MINUS}10%)."
    )


def test_the_verdict_follows_the_data(home: Path) -> None:
    low, high = [2.100, 2.051, 2.149], [2.200, 2.152, 2.251]  # differences 0.100, 0.101, 0.102
    worse = verdict(pairs({"constant_16": low, "norm_test": high}))
    assert worse.kind == "worse" and "higher than constant_16" in worse.sentence
    assert worse.difference is not None
    assert worse.difference.mean == pytest.approx(0.101)
    assert worse.difference.half_width == pytest.approx(4.30265 * 0.001 / math.sqrt(3), rel=1e-4)


def test_the_verdict_flips_when_the_data_flip(home: Path) -> None:
    low, high = [2.100, 2.051, 2.149], [2.200, 2.152, 2.251]
    better = verdict(pairs({"constant_16": high, "norm_test": low}))
    assert better.kind == "better" and "lower than constant_16" in better.sentence
    assert better.difference is not None and better.difference.mean == pytest.approx(-0.101)


def test_the_headline_says_what_cannot_be_told_from_the_best(home: Path) -> None:
    losses = {
        "constant_16": [2.0, 2.1],
        "norm_test": [2.01, 2.12],
        "stages": [2.02, 2.10],
        "constant_64": [3.0, 3.1],
    }
    assert report(pairs(losses)).headline.endswith("; norm_test and stages are not distinguishable from it.")
    found = report(pairs({"constant_16": [2.0, 2.1], "norm_test": [1.99, 2.10]})).headline
    assert found.startswith("norm_test has the lowest") and found.endswith(
        "not distinguishable from constant_16."
    )
    found = report(pairs({"constant_16": [2.0, 2.1], "norm_test": [3.0, 3.1]})).headline
    assert (
        found == "constant_16 has the lowest mean validation loss after 800k tokens: 2.05 ± 0.64 (2 seeds)."
    )


def around(difference: float, scatter: float = 0.01) -> list[float]:
    """Three losses off those of BASELINE: the difference is √3 · difference / scatter standard errors."""
    return [b + difference + e for b, e in zip(BASELINE, (-scatter, 0.0, scatter), strict=True)]


BASELINE = [2.2, 2.0, 2.1]
P_3, P_10 = 1 - math.sqrt(27 / 29), 1 - math.sqrt(300 / 302)  # 2 degrees: 1 − t/√(2 + t²), t² = 3 · (d/s)²


def test_a_single_comparison_is_not_corrected(home: Path) -> None:
    found = report(pairs({"constant_16": BASELINE, "norm_test": around(-0.03)}))
    (comparison,) = found.comparisons
    assert comparison.kind == "better" and "correction" not in comparison.sentence
    assert comparison.p == pytest.approx(P_3) == pytest.approx(0.0351, abs=1e-4)
    assert comparison.p_adjusted == comparison.p
    assert not any("Holm" in note for note in found.cautions)


def test_several_comparisons_are_corrected_for_their_number(home: Path) -> None:
    """Holm: 3 · 0.0033 = 0.010 is below 0.05, 2 · 0.0351 = 0.070 is not, nor the last, which is no less."""
    losses = {"norm_test": around(-0.03), "stages": around(-0.10), "constant_64": around(0.03)}
    found = report(pairs({"constant_16": BASELINE, **losses}))
    norm_test, stages, constant_64 = found.comparisons
    assert [c.p for c in found.comparisons] == [pytest.approx(p) for p in (P_3, P_10, P_3)]
    assert [c.p_adjusted for c in found.comparisons] == [
        pytest.approx(p) for p in (2 * P_3, 3 * P_10, 2 * P_3)
    ]
    assert [c.kind for c in found.comparisons] == ["not distinguishable", "better", "not distinguishable"]
    assert norm_test.sentence.startswith(
        f"norm_test ends at validation loss 2.07 ± 0.24, 0.030 lower than constant_16 (95% interval {MINUS}0.055 to "
        f"{MINUS}0.005, 3 seeds); the interval leaves out zero, but not after correction for 3 comparisons (p = 0.070): "
        "not distinguishable; it took "
    )
    assert "higher than" in constant_64.sentence and "not after correction" in constant_64.sentence
    assert "correction" not in stages.sentence
    assert any("p below 0.05 after Holm's correction for 3 comparisons" in note for note in found.cautions)


def test_only_comparisons_with_a_verdict_count_in_the_correction(home: Path) -> None:
    losses = {"norm_test": around(-0.03), "stages": [1.0, 2.0, math.nan], "constant_64": [2.0]}
    found = report(pairs({"constant_16": BASELINE, **losses}))
    assert [c.kind for c in found.comparisons] == ["better", "diverged", "one seed"]
    assert [c.p_adjusted for c in found.comparisons] == [pytest.approx(P_3), None, None]
    assert [c.improvement is None for c in found.comparisons] == [False, True, True]


def test_the_probability_of_improvement_is_that_of_the_shared_seeds(home: Path) -> None:
    """Lower, equal, lower: 2½ of three. Two or more of three have a probability 3p² − 2p³."""
    found = verdict(pairs({"constant_16": [2.0, 2.1, 2.2, 0.0], "norm_test": [1.9, 2.1, 2.1]})).improvement
    assert found is not None and found.mean == pytest.approx(5 / 6)
    assert 3 * found.low**2 - 2 * found.low**3 == pytest.approx(0.025) and found.high == 1.0


def test_one_seed_gives_no_interval_and_no_verdict(home: Path) -> None:
    found = report(pairs({"constant_16": [2.2], "norm_test": [2.0]}))
    (comparison,) = found.comparisons
    assert comparison.kind == "one seed"
    assert "0.200 lower than constant_16 (1 seed, so no interval and no verdict)" in comparison.sentence
    assert "±" not in comparison.sentence and "±" not in found.headline
    assert (comparison.p, comparison.p_adjusted, comparison.improvement) == (None, None, None)
    assert any(note.startswith("With one seed") for note in found.cautions)


def test_only_shared_seeds_are_compared(home: Path) -> None:
    """Seed 2 of the baseline, far off, is in its mean and not in the difference."""
    points = pairs({"constant_16": [2.0, 2.1, 9.0], "norm_test": [2.2, 2.3]})
    found = verdict(points)
    assert found.seeds == ["0", "1"] and found.difference is not None
    assert found.difference.mean == pytest.approx(0.2)
    assert found.kind == "worse"


def test_a_diverged_run_is_said_and_never_averaged_away(home: Path) -> None:
    found = report(pairs({"constant_16": [2.0, 2.1], "norm_test": [1.9, math.nan]}))
    (comparison,) = found.comparisons
    assert comparison.kind == "diverged" and "runs of norm_test diverged" in comparison.sentence
    assert any("1 of 2 finished runs of norm_test" in note for note in found.cautions)
    assert found.headline.startswith("constant_16 ends at validation loss 2.05")


def broken(axes: dict[str, str], last: list[Row], error: str | None) -> Point:
    return Point(axes, [*short_run(2.0)[:2], *last], "FAILED", error)


@pytest.mark.parametrize(
    ("last", "error"),
    [
        ([train_row(3, 600_000, math.nan, 1562, 6.0)], None),
        ([train_row(3, 600_000, 2.5, 1562, 6.0), val_row(3, 600_000, math.inf, 6.0)], None),
        (
            [train_row(3, 600_000, 2.5, 1562, 6.0)],
            "rank 0: Diverged: step 3: training loss 2.5, squared gradient norm inf; lr 0.1, batch 1562",
        ),
    ],
)
def test_a_run_that_was_ended_since_it_diverged_is_none_to_skip(
    home: Path, last: list[Row], error: str | None
) -> None:
    """The trainer ends such a run as failed. Its other seeds alone would be better in every comparison."""
    points = pairs({"constant_16": [2.2, 2.151, 2.252, 2.21], "norm_test": [2.1, 2.051, 2.149]})
    found = report([*points, broken({"batch": "norm_test", "seed": "3"}, last, error)])
    (comparison,) = found.comparisons
    assert comparison.kind == "diverged" and "runs of norm_test diverged" in comparison.sentence
    assert {equal.kind for equal in found.equal} == {"no common range"}  # those of constant_16 are at the end
    assert {reach.kind for target in found.targets for reach in target.reaches} == {None, "censored"}
    assert any("1 of 4 runs of norm_test failed since" in note for note in found.cautions)
    assert found.headline.startswith("constant_16 ends at validation loss 2.20")
    assert not any("textbf" in source for source in latex(found).values())


def test_a_run_that_failed_for_another_reason_did_not_diverge(home: Path) -> None:
    points = pairs({"constant_16": [2.2, 2.151, 2.252, 2.21], "norm_test": [2.1, 2.051, 2.149]})
    killed = broken({"batch": "norm_test", "seed": "3"}, [], "rank 0 was killed by SIGKILL (signal 9)")
    assert [c.kind for c in report([*points, killed]).comparisons] == ["better"]


def test_different_budgets_are_no_comparison(home: Path) -> None:
    points = pairs({"constant_16": [2.0, 2.1], "norm_test": [1.0, 1.1]})
    for point in points[2:]:
        point.extra = ["budget.tokens=1600k"]
    found = report(points)
    assert found.comparisons[0].kind == "different budget"
    assert "norm_test trained on 1.6M, constant_16 on 800k tokens" in found.comparisons[0].sentence
    assert "800k to 1.6M tokens" in found.headline


def test_unfinished_runs_count_in_no_mean(home: Path) -> None:
    points = pairs({"constant_16": [2.0, 2.1], "norm_test": [1.9, 0.1]})
    points[3].state, points[3].error = "FAILED", "out of memory"
    found = report(points)
    norm_test = found.schedules[1]
    assert norm_test.val_loss is not None and norm_test.val_loss.mean == 1.9
    assert (len(norm_test.finished), len(norm_test.runs)) == (1, 2)
    assert "1 run is not finished and counts in no mean." in found.cautions


def test_a_schedule_without_a_finished_run(home: Path) -> None:
    points = pairs({"constant_16": [2.0], "norm_test": [1.9]})
    points[1].state = None
    found = verdict(points)
    assert found.kind == "not finished"
    assert found.sentence == "norm_test against constant_16: no finished run of norm_test yet."


# --- baselines -------------------------------------------------------------------------------------------


def test_default_baseline_is_the_first_constant_batch(home: Path) -> None:
    found = report(pairs({"norm_test": [2.0], "constant_64": [2.1], "constant_16": [2.2]}))
    assert found.baseline == {"batch": "constant_64"}
    assert [c.schedule for c in found.comparisons] == ["norm_test", "constant_16"]


def test_without_a_constant_batch_the_first_schedule_is_the_baseline(home: Path) -> None:
    assert report(pairs({"stages": [2.0], "norm_test": [2.1]})).baseline == {"batch": "stages"}


def test_a_requested_baseline(home: Path) -> None:
    found = verdict(pairs({"constant_16": [2.0], "norm_test": [2.1]}), "batch=norm_test")
    assert (found.schedule, found.baseline) == ("constant_16", "norm_test")


def test_a_wrong_baseline_lists_the_choices(home: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        report(pairs({"constant_16": [2.0], "norm_test": [2.1]}), "batch=constant_61")
    assert "batch=constant_16" in caught.value.problems[0]
    assert caught.value.problems[1] == "Choices: batch=constant_16, batch=norm_test"


def test_like_meets_like_when_several_axes_vary(home: Path) -> None:
    points = [
        Point({"model": model, "batch": batch, "seed": str(seed)}, short_run(loss + seed))
        for model, batch, loss in (
            ("tiny", "constant_16", 3.0),
            ("tiny", "norm_test", 3.2),
            ("10m", "constant_16", 2.0),
            ("10m", "norm_test", 2.1),
        )
        for seed in (0, 1)
    ]
    found = report(points)
    assert [(c.schedule, c.baseline) for c in found.comparisons] == [
        ("tiny · norm_test", "tiny · constant_16"),
        ("10m · norm_test", "10m · constant_16"),
    ]
    means = [c.difference.mean for c in found.comparisons if c.difference]
    assert means == pytest.approx([0.2, 0.1])


def test_like_meets_like_within_the_batch_group_as_well(home: Path) -> None:
    losses = {("0.5", "2.0"): 2.0, ("0.2", "2.0"): 2.1, ("0.5", "4.0"): 3.0, ("0.2", "4.0"): 3.3}
    points = [
        Point({"batch.eta": eta, "batch.growth_cap": cap, "seed": "0"}, short_run(loss))
        for (eta, cap), loss in losses.items()
    ]
    found = report(points, "batch.eta=0.5", common=("experiment=demo", "batch=norm_test"))
    assert [(c.schedule, c.baseline) for c in found.comparisons] == [
        ("eta=0.2 · growth_cap=2.0", "eta=0.5 · growth_cap=2.0"),
        ("eta=0.2 · growth_cap=4.0", "eta=0.5 · growth_cap=4.0"),
    ]


@pytest.mark.parametrize("named_twice", [False, True])
def test_an_axis_that_a_schedule_does_not_read_makes_no_second_schedule(
    home: Path, named_twice: bool
) -> None:
    """A constant batch with eta 0.2 and 0.3 is one run, and the baseline of both norm tests.

    The manifest may name it with each eta or with the first alone.
    """
    points = [
        Point({"batch": batch, "batch.eta": eta, "seed": "0"}, short_run(loss))
        for batch, eta, loss in (
            ("constant_16", "0.2", 2.0),
            ("norm_test", "0.2", 2.1),
            ("norm_test", "0.3", 2.2),
        )
    ]
    if named_twice:
        points.insert(1, Point({"batch": "constant_16", "batch.eta": "0.3", "seed": "0"}, None))
    found = report(points)
    assert [s.label for s in found.schedules] == ["constant_16", "norm_test · eta=0.2", "norm_test · eta=0.3"]
    assert len(found.sweep.runs) == 3
    assert [c.baseline for c in found.comparisons] == ["constant_16", "constant_16"]


def test_the_same_axes_under_an_edited_configuration_are_two_schedules(home: Path) -> None:
    points = [
        *pairs({"constant_16": [2.0], "norm_test": [2.1]}),
        Point({"batch": "constant_16", "seed": "0"}, short_run(1.0), extra=["optim.lr=0.001"]),
        Point({"batch": "norm_test", "seed": "0"}, short_run(1.5), extra=["optim.lr=0.001"]),
    ]
    found = report(points)
    assert [s.label for s in found.schedules] == [
        "constant_16 (1)",
        "norm_test (1)",
        "constant_16 (2)",
        "norm_test (2)",
    ]
    gaps = [c.difference.mean for c in found.comparisons if c.difference]
    assert gaps == pytest.approx([0.1, 0.5])
    assert any(note.startswith("Numbered schedules") for note in found.cautions)


# --- baselines beside other axes -------------------------------------------------------------------------


def test_the_default_baseline_is_one_for_each_model(home: Path) -> None:
    points = [
        Point({"model": model, "batch.size": size, "seed": "0"}, short_run(loss))
        for model, size, loss in (
            ("tiny", "8", 3.0),
            ("tiny", "16", 3.1),
            ("10m", "8", 2.0),
            ("10m", "16", 2.2),
        )
    ]
    found = report(points, common=("experiment=demo", "batch=constant_16"))
    assert found.baseline == {"batch.size": "8"}
    assert [(c.schedule, c.baseline) for c in found.comparisons] == [
        ("tiny · size=16", "tiny · size=8"),
        ("10m · size=16", "10m · size=8"),
    ]


def test_where_nothing_of_the_batch_varies_the_first_schedule_is_the_baseline(home: Path) -> None:
    points = [Point({"model": m, "seed": "0"}, short_run(loss)) for m, loss in (("tiny", 3.0), ("10m", 2.0))]
    found = report(points, common=("experiment=demo", "batch=constant_16"))
    assert found.baseline == {"model": "tiny"}
    assert [(c.schedule, c.baseline) for c in found.comparisons] == [("10m", "tiny")]


# --- over several models ---------------------------------------------------------------------------------


def over_models(tiny: list[float], large: list[float]) -> list[Point]:
    """norm_test lower than constant_16, which ends at 4 and at 2, by these shares of it, seed by seed."""
    return [
        Point({"model": model, "batch": batch, "seed": str(seed)}, short_run(loss * (1 - own)))
        for model, loss, shares in (("tiny", 4.0, tiny), ("10m", 2.0, large))
        for batch in ("constant_16", "norm_test")
        for seed, share in enumerate(shares)
        for own in (share if batch == "norm_test" else 0.0,)
    ]


def test_a_schedule_over_several_models_is_summed_up_in_shares_of_the_loss(home: Path) -> None:
    """Each model is resampled by itself: without any scatter inside a model the interval has no width."""
    (line,) = report(over_models([0.01] * 5, [0.03] * 5)).overall
    assert (line.schedule, line.against) == ("norm_test", ["tiny · constant_16", "10m · constant_16"])
    assert line.pairs == 10
    assert [line.change.mean, line.change.low, line.change.high] == pytest.approx([-0.02] * 3)


def test_the_sentence_over_several_models(home: Path) -> None:
    scattered = [0.010, 0.011, 0.012, 0.013, 0.014]
    (line,) = report(over_models(scattered, scattered)).overall
    assert line.change.mean == pytest.approx(-0.012)
    assert -0.014 < line.change.low < -0.012 < line.change.high < -0.010
    assert line.sentence.startswith(
        f"norm_test against tiny · constant_16 and 10m · constant_16 together: validation loss {MINUS}1.2"
    )


def test_models_without_enough_seeds_or_a_verdict_are_not_summed_up(home: Path) -> None:
    assert report(over_models([0.01] * 5, [0.03] * 4)).overall == []


def test_nor_are_models_of_which_one_diverged(home: Path) -> None:
    assert report(over_models([0.01] * 5, [0.01, 0.02, 0.03, 0.04, math.nan])).overall == []


def test_one_model_is_its_own_comparison(home: Path) -> None:
    assert report(pairs({"constant_16": [2.0] * 5, "norm_test": [2.1] * 5})).overall == []


def test_a_comparison_of_more_than_the_batch_says_so(home: Path) -> None:
    """A later command added points of another model and learning rate, for which there is no baseline."""
    other = pairs({"norm_test": [1.8, 1.9]})
    for point in other:
        point.extra = ["model=10m", "optim.lr=0.0001"]
    (caution,) = [c for c in report([*pairs({"constant_16": [2.0, 2.1]}), *other]).cautions if "differ" in c]
    assert caution.startswith("norm_test and constant_16 differ in more than the batch: ")
    assert "model.layers" in caution and "optim.lr" in caution and "batch" not in caution.partition(": ")[2]


def test_a_baseline_of_another_axis_is_not_called_unlike_in_it(home: Path) -> None:
    points = [
        Point({"optim.lr": rate, "seed": str(seed)}, short_run(loss + seed / 10))
        for rate, loss in (("1e-3", 2.0), ("3e-3", 2.2))
        for seed in range(2)
    ]
    assert not any("differ" in caution for caution in report(points, "optim.lr=1e-3").cautions)


def test_finished_runs_without_a_loss_are_not_called_unfinished(home: Path) -> None:
    found = report(pairs({"constant_16": [math.nan], "norm_test": [math.nan]}))
    assert found.headline.startswith("No finished run has a finite validation loss at its end")


def test_two_baselines_of_one_axis_are_refused(home: Path) -> None:
    points = pairs({"constant_16": [2.0], "norm_test": [2.1]})
    with pytest.raises(
        ConfigError, match="--baseline batch=norm_test: there is --baseline batch=constant_16"
    ):
        report(points, "batch=constant_16", "batch=norm_test")


def test_a_run_that_ended_at_step_0_is_no_measure_of_cost(home: Path) -> None:
    point = Point(
        {"batch": "constant_16", "seed": "0"}, [val_row(0, 0, 2.0, 0.0), train_row(0, 0, 2.0, 8, 0.0)]
    )
    point.rows = [*reversed(point.rows or [])]
    (found,) = report([point, *pairs({"norm_test": [2.1]})]).comparisons
    assert found.cost == ""
