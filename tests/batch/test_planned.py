"""Schedules that the config decides alone: every batch of a run, against the formula."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batch import plan
from pipeline.batch._interface import BatchPlan, StepDone
from pipeline.config import Config
from pipeline.optim._learning_rate import learning_rate
from tests.batch.support import schedule_of, small

SEESAW = ["batch=seesaw", "lr.cut_factor=1.1", "lr.batch_scaling=sqrt", "batch.size=20"]


def planned(*overrides: str) -> tuple[Config, list[int]]:
    composed = small(*overrides)
    sizes = plan(composed).sizes
    assert sizes is not None
    assert sum(sizes) == composed.budget_sequences
    return composed, sizes


def sizes(*overrides: str) -> list[int]:
    return planned(*overrides)[1]


def test_constant_never_changes_but_in_the_last_step_which_ends_on_the_budget():
    assert sizes("batch=constant", "batch.size=40") == [40] * 50
    assert sizes("batch=constant", "batch.size=48") == [48] * 41 + [2000 - 48 * 41]


def test_requested_size_is_rounded_up_to_ranks_times_micro_batch():
    overrides = ["batch=constant", "batch.size=33", "parallel=ddp", "parallel.replicate=2"]
    assert sizes(*overrides)[0] == 40
    assert sizes(*overrides, "batch.round_to=24")[0] == 48


def test_stages_change_where_the_fractions_say():
    # 200 sequences, then 400, then the rest
    assert sizes("batch=stages", "batch.sizes=[8,16,64]", "batch.fractions=[0.1,0.2,0.7]") == [
        *[8] * 25,
        *[16] * 25,
        *[64] * 21,
        2000 - 600 - 64 * 21,
    ]


def test_linear_ramp():
    steps = sizes("batch=linear", "batch.size=8", "batch.max_size=64", "batch.ramp_tokens=128k")
    seen = 0
    for size in steps[:-1]:
        asked = 8 + 56 * min(1.0, seen * 128 / 128_000)
        assert size == min(math.ceil(asked / 4) * 4, 64)
        seen += size
    assert steps[0] == 8 and 64 in steps
    ramp = schedule_of(small("batch=linear", "batch.size=8", "batch.max_size=64", "batch.ramp_tokens=128k"))
    state, _ = ramp.start()
    assert ramp.decide(state, StepDone(9, 256_000, 2000, 64), None)[1].requested == 64


def test_seesaw_grows_where_the_reference_is_cut_and_gives_back_a_root_of_it():
    """α√β: with cuts of the rate by √1.1 and growth by 1.1, the rate times the root of the batch's growth is
    the reference's rate, at every step."""
    composed, steps = planned(*SEESAW, "lr.warmup_tokens=0")
    seen, grown = 0, set()
    for size in steps[:-1]:
        progress = seen / composed.budget_sequences
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
        cuts = math.floor(math.log(1 / cosine) / math.log(1.1) + 1e-9)
        assert size == math.ceil(20 * 1.1**cuts / 4) * 4
        factor = math.sqrt(size / 20)
        rate = learning_rate(composed, step=1, start=seen * 128, step_tokens=size * 128, batch_factor=factor)
        assert rate == pytest.approx(composed.optim.lr * factor * 1.1**-cuts)
        grown.add(size)
        seen += size
    assert max(grown) <= schedule_of(composed).largest == plan(composed).largest
    assert len(grown) > 10


def test_the_steps_that_seesaw_saves():
    """Its batch is 1/decay times the first one: in the limit of small cuts the mean of the decay is left, 1/2."""
    budget = ["budget.tokens=40M", "batch.round_to=4", "lr.min_ratio=0", "lr.warmup_tokens=0"]
    fine = [*SEESAW, *budget, "lr.cut_factor=1.005", "batch.size=1000", "batch.max_size=1000000"]
    saved = 1 - len(sizes(*fine)) / len(sizes(*budget, "batch=constant", "batch.size=1000"))
    assert saved == pytest.approx(0.5, abs=0.01)


def test_the_rate_follows_the_reference_where_the_cap_stops_seesaw():
    composed, steps = planned(*SEESAW, "batch.max_size=40", "lr.warmup_tokens=0")
    assert max(steps) == 40
    late = round(0.95 * composed.budget_tokens)
    rate = learning_rate(composed, step=1, start=late, step_tokens=0, batch_factor=math.sqrt(2))
    cosine = 0.1 + 0.9 * (1 + math.cos(0.95 * math.pi)) / 2
    cuts = math.floor(math.log(1 / cosine) / math.log(1.1))
    assert rate == pytest.approx(composed.optim.lr * 1.1**-cuts * math.sqrt(2))


def test_critical_doubles_when_the_measured_critical_batch_is_twice_the_batch():
    """Merrill et al. 2025: B*(t) > 2 B_t. Here B* rises from 20 to 100 between 64k and 128k tokens."""
    measured = ["batch.measured_tokens=[64k,128k]", "batch.measured_sizes=[20,100]"]
    steps = sizes("batch=critical", "batch.size=16", *measured)
    seen, batch, highest = 0, 16, 0.0
    for size in steps[:-1]:
        tokens = seen * 128
        if tokens >= 64_000:
            highest = max(highest, 20 + 80 * min(1.0, (tokens - 64_000) / 64_000))
        while highest > 2 * batch:
            batch *= 2
        assert size == batch
        seen += size
    assert sorted(set(steps[:-1])) == [16, 32, 64]


def test_twice_the_batch_is_not_yet_above_it():
    measured = ["batch.measured_tokens=[10k,20k]", "batch.measured_sizes=[32,32]"]
    assert max(sizes("batch=critical", "batch.size=16", *measured)) == 16


def test_critical_does_not_shrink_when_a_later_measurement_is_smaller():
    measured = ["batch.measured_tokens=[10k,20k]", "batch.measured_sizes=[100,10]"]
    steps = sizes("batch=critical", "batch.size=16", *measured)
    assert steps[-2] == 64 and sorted(steps[:-1]) == steps[:-1]


SPANS = {
    "constant": ["batch=constant"],
    "stages": ["batch=stages"],
    "linear": ["batch=linear"],
    "seesaw": [*SEESAW],
    "critical": ["batch=critical", "batch.measured_tokens=[10k,99k]", "batch.measured_sizes=[50,300]"],
}


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(SPANS)),
    ranks=st.sampled_from([1, 2, 4]),
    first=st.integers(16, 60),
    cap=st.one_of(st.none(), st.integers(64, 300)),
)
def test_every_planned_batch_is_a_multiple_within_its_limits(name, ranks, first, cap):
    overrides = ["parallel=ddp", f"parallel.replicate={ranks}"] if ranks > 1 else []
    overrides += [] if name == "stages" else [f"batch.size={first}"]
    overrides += [f"batch.max_size={cap}"] if cap and name not in ("constant", "stages") else []
    composed = small(*SPANS[name], *overrides)
    made: BatchPlan = plan(composed)
    assert made.sizes
    unit = 4 * ranks
    whole = made.sizes[:-1]
    assert all(size % unit == 0 and unit <= size <= made.largest for size in whole)
    assert whole == sorted(whole)
    assert made.sizes[-1] <= made.largest
    if cap and name not in ("constant", "stages"):
        assert made.largest <= cap
