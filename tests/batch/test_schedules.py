"""Schedules against their definitions: given statistics, the decisions."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batch import names, plan, schedule_class
from pipeline.batch._interface import State, StepDone, round_up
from pipeline.config import ConfigError
from pipeline.gradients.statistics import GradientStatistics
from tests.support import config

SMALL = [
    "model=tiny",
    "data.sequence_length=128",
    "data.micro_batch=4",
    "budget.tokens=256k",
]  # 2000 sequences


def statistics(gradients: np.ndarray, unit: int) -> GradientStatistics:
    """Of equal units of `unit` sequences with these mean gradients [units, parameters]."""
    squares = (gradients**2).sum(axis=1)
    mean = gradients.mean(axis=0)
    return GradientStatistics(
        units=len(gradients),
        sequences=unit * len(gradients),
        sum_weighted_sq_norm=unit * squares.sum(),
        sum_sq_norm=squares.sum(),
        mean_sq_norm=(mean**2).sum(),
    )


def gradients(seed: int = 0, units: int = 8, signal: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return signal * np.ones(50) / math.sqrt(50) + rng.normal(size=(units, 50))


def decide(*overrides: str, g: np.ndarray, unit: int = 4, state: State | None = None, tokens: int = 1024):
    """The decision after one step with these unit gradients, of the batch that `state` had requested."""
    composed = config(*SMALL, "batch=norm_test", *overrides)
    schedule = schedule_class("norm_test")(composed)
    state = state or schedule.start()[0]
    batch = round_up(state.requested, composed.batch_multiple)
    done = StepDone(step=1, tokens=tokens, sequences=tokens // 128, batch=batch)
    return schedule.decide(state, done, statistics(g, unit))


def sizes(*overrides: str) -> list[int]:
    planned = plan(config(*SMALL, *overrides)).sizes
    assert planned is not None
    return planned


def test_constant_never_changes_but_in_the_last_step_which_ends_on_the_budget():
    assert sizes("batch=constant", "batch.size=40") == [40] * 50
    assert sizes("batch=constant", "batch.size=48") == [48] * 41 + [2000 - 48 * 41]


def test_requested_size_is_rounded_up_to_ranks_times_micro_batch():
    overrides = ["batch=constant", "batch.size=33", "parallel=ddp", "parallel.replicate=2"]
    assert sizes(*overrides)[0] == 40
    assert sizes(*overrides, "batch.round_to=24")[0] == 48


def test_stages_change_where_the_fractions_say():
    planned = sizes("batch=stages", "batch.sizes=[8,16,64]", "batch.fractions=[0.1,0.2,0.7]")
    # 200 sequences, then 400, then the rest
    assert planned == [8] * 25 + [16] * 25 + [64] * 21 + [2000 - 600 - 64 * 21]


def test_what_measurements_decide_is_planned_as_a_range():
    planned = plan(config(*SMALL, "batch=norm_test", "parallel=ddp", "batch.size=12", "batch.max_size=100"))
    assert (planned.sizes, planned.first, planned.largest) == (None, 16, 96)


@pytest.mark.parametrize("estimator", ["microbatch", "worker"])
def test_norm_test_demands_what_equation_3_says(estimator: str):
    """Lau et al. eq. 3 with unbiased tr Σ of one sequence, recomputed from the gradients themselves."""
    g = gradients()
    per_sequence = 4 * ((g - g.mean(0)) ** 2).sum() / (len(g) - 1)
    expected = per_sequence / (0.7**2 * (g.mean(0) ** 2).sum())
    ddp = ["parallel=ddp", f"batch.estimator={estimator}", "batch.eta=0.7", "batch.growth_cap=1000"]
    _, decision = decide(*ddp, "batch.max_size=1024", "batch.ema=0", g=g)
    assert decision.log["test/statistic"] == pytest.approx(expected)
    assert decision.requested == pytest.approx(expected)
    assert decision.size == math.ceil(expected / 8) * 8
    assert decision.reason == "grew"


def test_paper_estimator_is_equation_5_as_printed():
    g = gradients(units=2)
    printed = ((g - g.mean(0)) ** 2).sum(axis=1).mean() / (0.2**2 * (g.mean(0) ** 2).sum())
    overrides = ["parallel=ddp", "batch.estimator=paper", "batch.eta=0.2", "batch.ema=0"]
    _, decision = decide(*overrides, g=g, unit=16)
    assert decision.log["test/statistic"] == pytest.approx(printed)


def test_debiased_signal_subtracts_the_noise_of_the_mean():
    g = gradients(signal=3.0)
    trace = 4 * ((g - g.mean(0)) ** 2).sum() / (len(g) - 1)
    signal = (g.mean(0) ** 2).sum() - trace / 32
    _, decision = decide("batch.signal=debiased", "batch.ema=0", "batch.eta=1", g=g)
    assert decision.log["test/statistic"] == pytest.approx(trace / signal)


def test_averages_numerator_and_denominator_apart():
    """The ratio of averages, not the average of ratios."""
    schedule = schedule_class("norm_test")(
        config(*SMALL, "batch=norm_test", "batch.ema=0.9", "batch.eta=0.5")
    )
    state, _ = schedule.start()
    numerator = denominator = 0.0
    for step in range(1, 6):
        s = statistics(gradients(seed=step), 4)
        state, decision = schedule.decide(state, StepDone(step, 1, 1, 32), s)
        numerator = 0.9 * numerator + 0.1 * s.variance / 0.25
        denominator = 0.9 * denominator + 0.1 * s.mean_sq_norm
        assert decision.log["test/statistic"] == pytest.approx(numerator / denominator)


def test_guards():
    noisy, quiet = gradients(signal=0.01), gradients(signal=1e4)
    common = ["batch.ema=0", "batch.size=8"]
    assert decide(*common, g=quiet)[1].reason == "passed"
    state, capped = decide(*common, "batch.growth_cap=1.5", g=noisy)
    assert (capped.requested, capped.reason) == (12, "capped")
    assert decide(*common, "batch.growth_cap=1e9", "batch.max_size=20", g=noisy)[1].size == 20
    held = State(16, changed_at_tokens=1000)
    assert decide(*common, "batch.hold_tokens=100", g=noisy, state=held)[1].reason == "held"
    assert decide(*common, "batch.hold_tokens=20", g=noisy, state=held)[1].reason == "capped"
    assert decide(*common, g=quiet, state=State(64))[1].requested == 64
    _, shrank = decide(*common, "batch.monotone=false", g=quiet, state=State(64))
    assert (shrank.requested, shrank.reason) == (32, "shrank")
    assert state.changed_at_tokens == 1024


def test_the_test_is_of_the_batch_that_was_measured():
    """Requested 9, applied 16 on two ranks: a demand for 12 passes (Algorithm 1 compares with b_k)."""
    g = gradients(signal=3.0)
    demanded = decide("batch.ema=0", "batch.eta=1", g=g)[1].log["test/statistic"]
    eta = f"batch.eta={math.sqrt(demanded / 12)}"
    _, decision = decide("parallel=ddp", "batch.size=9", "batch.ema=0", eta, g=g)
    assert decision.log["test/statistic"] == pytest.approx(12)
    assert decision.log["test/threshold"] == 16
    assert (decision.reason, decision.size) == ("passed", 16)


def test_no_signal_left_grows_to_the_cap_and_nan_changes_nothing():
    flat = np.stack([np.ones(4), -np.ones(4)])
    assert decide("batch.ema=0", g=flat)[1].reason == "capped"
    lost = GradientStatistics(1, 8, 1.0, 1.0, 1.0)  # one unit: variance undefined
    schedule = schedule_class("norm_test")(config(*SMALL, "batch=norm_test"))
    state, _ = schedule.start()
    assert schedule.decide(state, StepDone(1, 1, 1, 8), lost)[1].reason == "unmeasured"


def test_one_unmeasurable_step_does_not_poison_the_averages():
    schedule = schedule_class("norm_test")(config(*SMALL, "batch=norm_test", "batch.ema=0.9"))
    state, _ = schedule.start()
    after, _ = schedule.decide(state, StepDone(1, 1, 1, 8), GradientStatistics(1, 8, 1.0, 1.0, 1.0))
    assert after == state


def test_the_test_stops_at_the_cap():
    schedule = schedule_class("norm_test")(config(*SMALL, "batch=norm_test", "batch.max_size=64"))
    assert schedule.wants_statistics(State(63), 1)
    assert not schedule.wants_statistics(State(64), 1)
    every_third = schedule_class("norm_test")(config(*SMALL, "batch=norm_test", "batch.interval=3"))
    assert [every_third.wants_statistics(State(8), s) for s in range(1, 7)] == [False, False, True] * 2


@given(
    signal=st.floats(0, 10),
    seed=st.integers(0, 99),
    requested=st.floats(8, 250),
    ranks=st.sampled_from([1, 2, 4]),
    monotone=st.booleans(),
)
def test_decisions_respect_every_limit(signal, seed, requested, ranks, monotone):
    overrides = ["parallel=ddp", f"parallel.replicate={ranks}", "batch.max_size=250", "batch.size=16"]
    composed = _cached(*overrides, f"batch.monotone={str(monotone).lower()}")
    schedule = schedule_class("norm_test")(composed)
    s = statistics(gradients(seed, signal=signal), 4)
    state, decision = schedule.decide(
        State(requested), StepDone(1, 10, 10, round_up(requested, ranks * 4)), s
    )
    unit = ranks * 4
    assert decision.size % unit == 0 and unit <= decision.size <= 250
    assert decision.size == min(round_up(state.requested, unit), 250 // unit * unit)
    if monotone:
        assert state.requested >= requested
    assert State(**json.loads(json.dumps(dataclasses.asdict(state)))) == state


_configs: dict[tuple[str, ...], object] = {}


def _cached(*overrides: str):
    if overrides not in _configs:
        _configs[overrides] = config(*SMALL, "batch=norm_test", *overrides)
    return _configs[overrides]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["batch=stages", "batch.fractions=[0.5,0.4,0.2]"],
            "sum to 1.1, they must sum to 1; [0.5, 0.4, 0.1] does",
        ),
        (["batch=stages", "batch.fractions=[0.5,0.5]"], "3 sizes for 2 fractions"),
        (["batch=stages", "batch.sizes=[2,32,64]"], "2 is smaller than one micro-batch"),
        (["batch=norm_test", "batch.estimator=worker"], "does not show"),
        (
            ["batch=norm_test", "batch.max_size=4"],
            "below the first batch, batch.size=8 rounded up to a multiple of 4. Nearest: 8",
        ),
        (
            ["batch=norm_test", "parallel=ddp", "batch.size=18", "batch.max_size=20"],
            "multiple of 8. Nearest: 24",
        ),
        (["batch=norm_test", "batch.max_size=null"], "needs a cap"),
        (["batch=norm_test", "batch.size=4"], "Nearest batch.size: 8"),
        (["batch=norm_test", "batch.schedule=normtest"], "Did you mean norm_test?"),
    ],
)
def test_refuses_what_cannot_run(overrides: list[str], message: str):
    with pytest.raises(ConfigError) as refused:
        config(*SMALL, *overrides)
    assert message in str(refused.value)


def test_every_file_is_an_option():
    assert names() == ["constant", "norm_test", "stages"]
