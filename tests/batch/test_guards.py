"""What every adaptive schedule makes of a demand: limits, guards and reasons."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.batch import plan
from pipeline.batch._interface import State, StepDone, round_up
from pipeline.gradients.statistics import GradientStatistics
from tests.batch.support import ADAPTIVE, decide, gradients, schedule_of, small, statistics

NOISY, QUIET = gradients(signal=0.01), gradients(signal=1e4)


def demanding(batch: float) -> GradientStatistics:
    """Of a step whose norm test with η = 1 demands this batch."""
    return GradientStatistics(
        units=2, sequences=8, sum_weighted_sq_norm=batch + 8, sum_sq_norm=0, mean_sq_norm=1
    )


def test_what_measurements_decide_is_planned_as_a_range():
    planned = plan(small("batch=norm_test", "parallel=ddp", "batch.size=12", "batch.max_size=100"))
    assert (planned.sizes, planned.first, planned.largest) == (None, 16, 96)


def test_reasons():
    assert decide(g=QUIET)[1].reason == "passed"
    state, capped = decide("batch.growth_cap=1.5", g=NOISY)
    assert (capped.requested, capped.size, capped.reason) == (12, 12, "capped")
    assert state.changed_at_tokens == 1024
    _, at_the_cap = decide("batch.max_size=20", g=NOISY)
    assert (at_the_cap.size, at_the_cap.reason) == (20, "capped")
    held = State(16, changed_at_tokens=1000)
    assert decide("batch.hold_tokens=100", g=NOISY, state=held)[1].reason == "held"
    assert decide("batch.hold_tokens=20", g=NOISY, state=held)[1].reason == "grew"
    assert decide(g=QUIET, state=State(64))[1].requested == 64
    shrinking = ["batch.monotone=false", "batch.growth_cap=2"]
    _, shrank = decide(*shrinking, g=QUIET, state=State(64))
    assert (shrank.requested, shrank.reason) == (32, "shrank")


def test_a_demand_that_rounds_up_to_the_same_batch_changes_nothing():
    schedule = schedule_of(small("batch=norm_test", "batch.eta=1", "batch.ema=0", "batch.monotone=false"))
    _, decision = schedule.decide(State(16.0), StepDone(2, 1, 1, 16), demanding(13))
    assert decision.log["test/statistic"] == pytest.approx(13)
    assert (decision.requested, decision.size, decision.reason) == (16, 16, "rounded")


def test_rounding_does_not_undo_a_small_step_down_for_ever():
    """32 / 1.5 = 21.3 rounds up to 32 where multiples are of 16."""
    overrides = ["batch.monotone=false", "batch.growth_cap=1.5", "batch.size=16", "batch.round_to=16"]
    _, decision = decide(*overrides, g=QUIET, state=State(32.0))
    assert (decision.size, decision.reason) == (16, "shrank")


def test_the_test_is_of_the_batch_that_was_measured():
    """Requested 9, applied 16 on two ranks: a demand for 12 passes (Algorithm 1 compares with b_k)."""
    composed = small("batch=norm_test", "parallel=ddp", "batch.size=9", "batch.ema=0", "batch.eta=1")
    _, decision = schedule_of(composed).decide(State(9.0), StepDone(1, 1, 1, 16), demanding(12))
    assert decision.log["test/threshold"] == 16
    assert (decision.reason, decision.size) == ("passed", 16)


def test_several_tests_must_agree():
    """AdaBatchGrad: the smallest of the last k demands, and then k new ones."""
    overrides = ["batch.confirmations=3", "batch.eta=1", "batch.ema=0", "batch.growth_cap=100"]
    schedule = schedule_of(small("batch=norm_test", *overrides))
    state, decision = schedule.start()
    reasons, sizes = [], []
    for demand in (40, 24, 60, 200, 12, 300, 300, 300, 300):
        state, decision = schedule.decide(state, StepDone(1, 1, 1, decision.size), demanding(demand))
        reasons.append(decision.reason)
        sizes.append(decision.size)
    assert sizes == [8, 8, 24, 24, 24, 24, 24, 24, 256]
    assert reasons == ["held", "held", "grew", "held", "held", "passed", "held", "held", "capped"]


def test_shrinking_needs_agreement_as_well():
    overrides = ["batch.confirmations=2", "batch.monotone=false", "batch.eta=1", "batch.ema=0"]
    schedule = schedule_of(small("batch=norm_test", *overrides))
    state, sizes = State(64.0), []
    for demand in (40, 100, 40, 36):
        state, decision = schedule.decide(state, StepDone(1, 1, 1, 64), demanding(demand))
        sizes.append(decision.size)
    assert sizes == [64, 64, 64, 40]


def test_when_tests_take_place():
    schedule = schedule_of(small("batch=norm_test", "batch.max_size=64"))
    assert schedule.wants_statistics(State(60), 1, 0)
    assert not schedule.wants_statistics(State(64), 1, 0)
    assert not schedule.wants_statistics(State(60.5), 1, 0)  # rounded up to the cap
    every_third = schedule_of(small("batch=norm_test", "batch.interval=3"))
    assert [every_third.wants_statistics(State(8), s, 0) for s in range(1, 7)] == [False, False, True] * 2
    late = schedule_of(small("batch=norm_test", "batch.start_tokens=1000"))
    assert [late.wants_statistics(State(8), 1, tokens) for tokens in (0, 999, 1000)] == [False, False, True]
    shrinking = schedule_of(small("batch=norm_test", "batch.max_size=64", "batch.monotone=false"))
    assert shrinking.wants_statistics(State(64), 1, 0)


signals = st.one_of(st.floats(0, 10), st.floats(10, 1e6))


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(ADAPTIVE)),
    steps=st.lists(st.tuples(signals, st.integers(0, 99)), min_size=1, max_size=12),
    ranks=st.sampled_from([2, 4]),
    monotone=st.booleans(),
    confirmations=st.sampled_from([1, 3]),
    growth_cap=st.sampled_from([1.5, 100.0]),
    cut=st.integers(0, 11),
)
@example("noise_scale", [(0.0, 6), (0.0, 0)], 2, False, 1, 100.0, 0)  # at the cap, and more is demanded
def test_decisions_respect_every_limit_and_survive_a_restart(
    name, steps, ranks, monotone, confirmations, growth_cap, cut
):
    """Along a whole run, and whatever is measured; the state goes through JSON at a random point."""
    overrides = [*ADAPTIVE[name], "parallel=ddp", f"parallel.replicate={ranks}", "batch.size=16"]
    overrides += [f"batch.monotone={str(monotone).lower()}", f"batch.confirmations={confirmations}"]
    composed = small(*overrides, "batch.max_size=250", f"batch.growth_cap={growth_cap}")
    schedule, unit = schedule_of(composed), ranks * 4
    state, decision = schedule.start()
    for step, (signal, seed) in enumerate(steps, 1):
        before, asked = decision.size, state.requested
        measured = statistics(gradients(seed, units=4, signal=signal), 4)
        done = StepDone(step, 10 * step, 10 * step, decision.size)
        if step == cut:
            restored = State.from_tree(json.loads(json.dumps(dataclasses.asdict(state))))
            assert schedule.decide(restored, done, measured) == schedule.decide(state, done, measured)
            state = restored
        state, decision = schedule.decide(state, done, measured)
        assert decision.size % unit == 0 and unit <= decision.size <= 250
        assert decision.size == min(round_up(state.requested, unit), 250 // unit * unit)
        assert decision.requested == state.requested
        assert decision.size <= max(before, round_up(before * growth_cap, unit))
        changed = decision.size != before
        assert changed == (decision.reason in ("grew", "capped", "shrank"))
        if monotone:
            assert state.requested >= asked and decision.size >= before
        assert decision.size >= schedule.start()[1].size


def test_a_decision_does_not_depend_on_what_came_before_but_through_the_state():
    schedule = schedule_of(small("batch=norm_test"))
    once = schedule.decide(State(8.0), StepDone(1, 1, 1, 8), statistics(NOISY))
    schedule.decide(State(8.0), StepDone(1, 1, 1, 8), statistics(QUIET))
    assert schedule.decide(State(8.0), StepDone(1, 1, 1, 8), statistics(NOISY)) == once


def test_infinite_demands_are_numbers_to_the_guards():
    flat = np.stack([np.ones(4), -np.ones(4)])
    _, decision = decide("batch.max_size=64", g=flat)
    assert math.isinf(decision.log["test/statistic"])
    assert decision.size == 64
