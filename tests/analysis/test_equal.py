from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest

from analysis.equal import Equal, compare_at_equal
from analysis.evaluations import AXES, FLOPS, STEPS, TIME, TOKENS, Axis, evaluations
from analysis.load import Sweep, load_sweep
from analysis.render import render, render_html
from analysis.report import Report, build
from analysis.tables import to_json
from pipeline.store import Row
from tests.analysis.synthetic import Point, pairs, short_run, train_row, val_row, write_sweep
from tests.analysis.test_report import cells
from tests.analysis.test_verdict import BASELINE, P_3, P_10, around
from tests.support import config

NAN = math.nan
Evaluation = tuple[int, int, float, float]  # step, tokens, seconds, validation loss


def evaluated(*found: Evaluation, shift: float = 0.0) -> list[Row]:
    """A run that is evaluated after each of these steps."""
    rows = []
    for step, tokens, seconds, loss in found:
        rows.append(train_row(step, tokens, 3.0, 8, seconds))
        rows.append(val_row(step, tokens, loss + shift, seconds))
    return rows


SMALL = [(10, 100, 10.0, 4.0), (20, 200, 20.0, 3.0), (40, 400, 40.0, 2.0)]  # 10 tokens a step
LARGE = [(5, 100, 8.0, 4.4), (10, 200, 16.0, 3.6), (20, 400, 32.0, 2.5)]  # 20 tokens a step


def report(points: Sequence[Point], *baseline: str) -> Report:
    write_sweep("s", points)
    return build(load_sweep("s"), baseline, 0.0)


def at(found: Report, axis: Axis, schedule: str = "norm_test") -> Equal:
    (equal,) = (e for e in found.equal if e.axis is axis and e.schedule == schedule)
    return equal


def two_seeds() -> list[Point]:
    """The second seed is 0.1 higher in both, and 0.02 more in the larger batches."""
    runs = {"constant_16": [(SMALL, 0.0), (SMALL, 0.1)], "norm_test": [(LARGE, 0.0), (LARGE, 0.12)]}
    return [
        Point({"batch": batch, "seed": str(seed)}, evaluated(*curve, shift=shift))
        for batch, both in runs.items()
        for seed, (curve, shift) in enumerate(both)
    ]


@pytest.mark.parametrize(
    ("axis", "place", "difference", "tokens", "kind"),
    [
        (TOKENS, 400, 0.5, (400, 400), "worse"),
        (STEPS, 20, -0.5, (400, 200), "better"),
        (TIME, 32, 0.1, (400, 320), "not distinguishable"),  # 3.0 to 2.0 on the way from 20 s to 40 s: 2.4
    ],
)
def test_the_same_runs_are_worse_better_and_level(
    home: Path, axis: Axis, place: float, difference: float, tokens: tuple[int, int], kind: str
) -> None:
    """Two differences 0.02 apart: their mean ± 12.706 · 0.01."""
    equal = at(report(two_seeds()), axis)
    assert equal.place == place and equal.kind == kind and equal.seeds == ("0", "1") and equal.hosts == 1
    assert equal.difference is not None and equal.loss is not None and equal.baseline_loss is not None
    assert equal.difference.mean == pytest.approx(difference + 0.01)
    assert equal.difference.half_width == pytest.approx(12.7062 * 0.01, rel=1e-4)
    assert equal.loss.mean == pytest.approx(2.5 + 0.06)
    assert equal.loss.half_width == pytest.approx(12.7062 * 0.06, rel=1e-4)
    assert equal.baseline_loss.mean == pytest.approx(2.5 - difference + 0.05)
    assert equal.tokens == pytest.approx(tokens)
    assert equal.progress == pytest.approx((1.0, tokens[1] / 400))
    t = (difference + 0.01) / 0.01
    assert equal.p == pytest.approx(1 - 2 / math.pi * math.atan(abs(t)), abs=1e-9) == equal.p_adjusted


def test_equal_flops_are_those_of_the_model(home: Path) -> None:
    """6 for each parameter that multiplies, 12 · layers · width · length for attention."""
    found = report(two_seeds())
    settings = config("experiment=demo")
    model = settings.model
    embedding = 0 if model.tied else model.vocab * model.width
    per_token = 6 * (model.parameters - embedding) + 12 * model.layers * model.width * 128
    assert settings.data.sequence_length == 128
    assert at(found, FLOPS).place == pytest.approx(400 * per_token)
    assert at(found, FLOPS).difference == at(found, TOKENS).difference
    assert found.axes == [TOKENS, STEPS, TIME]  # with one model FLOPs say nothing more
    assert any(note.startswith("FLOPs: as at equal tokens") for note in found.equal_notes)


def test_flops_are_an_axis_of_their_own_where_models_differ(home: Path) -> None:
    """The larger model spends the smaller one's 400 tokens' worth on fewer of its own."""
    points = [
        Point({"model": model, "seed": "0"}, evaluated((0, 1, 0.1, 5.0), *SMALL), extra=["batch=constant_16"])
        for model in ("tiny", "10m")
    ]
    found = report(points)
    equal = at(found, FLOPS, "10m")
    assert equal.tokens is not None and equal.tokens[0] < 200 and equal.tokens[1] == pytest.approx(400)
    assert FLOPS in found.axes
    assert at(found, STEPS, "10m").where == "at 40 steps"  # after as many tokens


def test_one_schedule_that_ends_early_shortens_no_other_comparison(home: Path) -> None:
    early = [(1, 100, 1.0, 5.0), (4, 400, 4.0, 4.9)]
    points = [*two_seeds(), Point({"batch": "stages", "seed": "0"}, evaluated(*early))]
    found = report(points)
    assert at(found, STEPS).place == 20
    assert at(found, STEPS, "stages").kind == "no common range"  # constant_16 is first evaluated at step 10
    assert at(found, TOKENS, "stages").place == 400


def test_nothing_is_read_off_beyond_a_run(home: Path) -> None:
    """Evaluated at their ends alone, runs of other lengths meet nowhere on that axis."""
    shape = {"constant_16": {"steps": 8, "seconds": 9.0}}
    found = report(pairs({"constant_16": [2.0, 2.1], "norm_test": [2.2, 2.3]}, **shape))
    for axis in (STEPS, TIME):
        equal = at(found, axis)
        assert equal.kind == "no common range" and equal.difference is None and equal.where == ""
    assert at(found, TOKENS).kind == "worse"


def test_what_happens_after_the_place_is_no_divergence_there(home: Path) -> None:
    """constant_16 diverges after step 20, where norm_test ends."""
    points = two_seeds()
    for seed in (0, 1):
        points[seed].rows = evaluated(*SMALL[:2], (40, 400, 40.0, NAN), shift=0.1 * seed)
    found = report(points)
    assert [at(found, axis).kind for axis in (TOKENS, STEPS, TIME)] == ["diverged", "better", "diverged"]
    assert at(found, STEPS).baseline_loss is not None
    assert at(found, STEPS).baseline_loss.mean == pytest.approx(3.05)  # type: ignore[union-attr]
    diverged = at(found, TOKENS)
    assert diverged.p is None and diverged.loss is not None and diverged.loss.mean == pytest.approx(2.56)
    assert json.dumps(to_json(found), allow_nan=False)


def test_one_seed_has_a_difference_without_an_interval(home: Path) -> None:
    equal = at(report(two_seeds()[::2]), STEPS)
    assert equal.kind == "one seed" and equal.p is None and equal.difference is not None
    assert (equal.difference.mean, equal.difference.half_width) == (pytest.approx(-0.5), None)


def test_seeds_that_do_not_meet_are_not_compared(home: Path) -> None:
    first, _, _, last = two_seeds()
    assert at(report([first, last]), TOKENS).kind == "no shared seed"


def test_each_axis_is_corrected_by_itself(home: Path) -> None:
    """At equal tokens, which are the ends of the runs, p-values and verdicts are those of the runs' ends.

    Twice 0.035 is no verdict (test_verdict has the numbers), though both intervals leave out zero.
    """
    losses = {"norm_test": around(-0.03), "stages": around(-0.10), "constant_64": around(0.03)}
    found = report(pairs({"constant_16": BASELINE, **losses}))
    equal = [at(found, TOKENS, comparison.schedule) for comparison in found.comparisons]
    assert [e.kind for e in equal] == ["not distinguishable", "better", "not distinguishable"]
    assert [e.p for e in equal] == [pytest.approx(p) for p in (P_3, P_10, P_3)]
    assert [e.p_adjusted for e in equal] == [pytest.approx(p) for p in (2 * P_3, 3 * P_10, 2 * P_3)]


def test_runs_that_were_never_evaluated(home: Path) -> None:
    points = pairs({"constant_16": [2.0], "norm_test": [2.1], "stages": [2.2]})
    points[1].rows = short_run(2.1)[:-1]
    points[2].state = None
    found = report(points)
    assert {e.kind for e in found.equal} == {"not evaluated"}
    assert found.equal_notes == [] and "Better at equal what?" not in render("report.md.j2", found)


@pytest.mark.parametrize("seconds", [1.0, 0.0])
def test_a_single_row(home: Path, seconds: float) -> None:
    rows = [train_row(1, 1024, 5.0, 8, seconds) | {"val/loss": 4.0}]
    points = [Point({"batch": batch, "seed": "0"}, rows) for batch in ("constant_16", "norm_test")]
    found = report(points)
    assert {e.kind for e in found.equal} == {"one seed"}
    assert all(e.difference is not None and e.difference.mean == 0 for e in found.equal)


def without(sweep: Sweep, column: str, point: int | None = None) -> Sweep:
    gone = pl.lit(True) if point is None else pl.col("point") == point
    emptied = pl.when(gone).then(None).otherwise(pl.col(column)).alias(column)
    return dataclasses.replace(sweep, record=sweep.record.with_columns(emptied))


def test_an_axis_that_was_not_recorded_is_a_gap(home: Path) -> None:
    found = report(two_seeds())
    sweep = without(found.sweep, "time")
    equal = compare_at_equal(found.comparisons, evaluations(sweep, found.schedules))
    assert {e.axis.name: e.kind for e in equal}["time"] == "not recorded"
    assert [e for e in equal if e.axis is not TIME] == [e for e in found.equal if e.axis is not TIME]
    one_less = evaluations(without(found.sweep, "time", point=3), found.schedules)
    (time,) = (e for e in compare_at_equal(found.comparisons, one_less) if e.axis is TIME)
    assert (time.kind, time.seeds) == ("one seed", ("0",))


def test_runs_without_a_config_have_no_flops(home: Path) -> None:
    found = report(two_seeds())
    foreign = [
        dataclasses.replace(s, runs=[dataclasses.replace(run, config=None) for run in s.runs])
        for s in found.schedules
    ]
    equal = compare_at_equal(found.comparisons, evaluations(found.sweep, foreign))
    assert [e.kind for e in equal if e.axis is FLOPS] == ["not recorded"]
    shown = dataclasses.replace(found, equal=equal)
    assert shown.axes == [TOKENS, STEPS, TIME]
    assert any(note.startswith("FLOPs: not known") for note in shown.equal_notes)


def test_a_time_that_runs_backwards_is_no_axis(home: Path) -> None:
    points = two_seeds()
    assert points[0].rows is not None
    points[0].rows[3]["time"] = points[0].rows[2]["time"] = 5.0
    assert at(report(points), TIME).seeds == ("1",)


def test_times_of_several_hosts_are_said(home: Path) -> None:
    write_sweep("s", two_seeds())
    sweep = load_sweep("s")
    moved = [
        dataclasses.replace(run, status=dataclasses.replace(run.status, host=f"node-{run.seed}"))
        for run in sweep.runs
        if run.status
    ]
    found = build(dataclasses.replace(sweep, runs=moved), [], 0.0)
    assert at(found, TIME).hosts == 2
    assert any("on up to 2 hosts" in note for note in found.equal_notes)


def test_a_schedule_without_a_baseline_is_listed(home: Path) -> None:
    points = [*two_seeds(), Point({"model": "10m", "batch": "norm_test", "seed": "0"}, evaluated(*LARGE))]
    for point in points[:4]:
        point.axes["model"] = "tiny"
    found = report(points)
    assert [e.kind for e in found.equal if e.schedule == "10m · norm_test"] == ["no baseline"] * len(AXES)


def test_another_budget_is_compared_in_the_middle_of_its_run_and_says_so(home: Path) -> None:
    longer = [*SMALL, (80, 800, 80.0, 1.5)]
    points = [
        Point({"batch": "constant_16", "seed": "0"}, evaluated(*longer), extra=["budget.tokens=1600k"]),
        Point({"batch": "norm_test", "seed": "0"}, evaluated(*LARGE)),
    ]
    found = report(points)
    assert at(found, TOKENS).where == "at 400 tokens, after 100% of the runs against 50%"
    assert any("before its learning rate has come down" in note for note in found.equal_notes)


def test_the_answer_is_one_table(home: Path) -> None:
    found = report(two_seeds())
    (row,) = cells(render("report.md.j2", found), "Better at equal what?")
    assert row == {
        "schedule": "norm_test",
        "against": "constant_16",
        "at equal tokens": "worse +0.51 ± 0.13 at 400 tokens",
        "at equal optimizer steps": "better −0.49 ± 0.13 at 20 steps, 400 against 200 tokens",
        "at equal training time": "not distinguishable +0.11 ± 0.13 at 32.0 s, 400 against 320 tokens",
    }
    page = render_html(found)
    assert '<span class="kind better">better</span> −0.49 ± 0.13<br>' in page
    assert "at 20 steps, 400 against 200 tokens" in page
