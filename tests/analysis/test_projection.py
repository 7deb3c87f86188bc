"""Projected times against steps that are gone through one by one, and what the ranks really send."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import benchmarks.projection
from analysis import projection_notes
from analysis.load import load_sweep
from analysis.projection import Projection, project, projection_table, step_traces
from analysis.projection_notes import notes
from analysis.records import table
from analysis.step_cost import Cost, Machine, StepTrace, cells, checks, cost, least_absolute, step_trace
from analysis.summary import run_numbers, summarise
from analysis.synchronisation import Network, mesh_at, synchronisation
from benchmarks.statistics import Footprint, footprint
from pipeline.config import Config, ConfigError
from pipeline.store import Row
from tests.analysis.synthetic import Point, train_row, val_row, write_sweep
from tests.distributed import gloo_ranks, ranks_of
from tests.gradients.support import SMALL
from tests.meshes import MESHES
from tests.support import ROOT, config

GPU = Machine(96, "NVIDIA H100 80GB HBM3")
NETWORK = Network(bandwidth_gb_per_s=2.0, latency_us=50.0)
MICRO_S, REST_S = 0.030, 0.011
LENGTH = 128


# --- the truth: every message, every rank, every step ----------------------------------------------------


def all_reduce_s(ranks: int, size: float, network: Network = NETWORK) -> float:
    """Recursive halving and doubling, message by message: in each round half of what the last one sent."""
    seconds, part, group = 0.0, size, ranks
    while group > 1:
        part, group = part / 2, group // 2
        seconds += 2 * (network.latency_us / 1e6 + part / (network.bandwidth_gb_per_s * 1e9))
    return seconds


def sync_s(composed: Config, ranks: int, network: Network = NETWORK) -> float:
    """DDP's: a small model's gradient in its two buckets, and the numbers of the step."""
    elements = composed.model.parameters
    assert 2**20 < 4 * elements < 26 * 2**20
    one = all_reduce_s(ranks, 2**20, network) + all_reduce_s(ranks, 4 * elements - 2**20, network)
    return one + all_reduce_s(ranks, 0, network)


def step_s(batch: int, ranks: int, micro: int, micro_s: float, rest_s: float) -> float:
    """Deals micro-batches to the ranks in turn; the step takes as long as the rank with most of them."""
    dealt = [0] * ranks
    for unit, _ in enumerate(range(0, batch, micro)):
        dealt[unit % ranks] += 1
    return max(dealt) * micro_s + rest_s


def made_up(
    batches: Iterable[int],
    *more: str,
    ranks: int = 1,
    machine: Machine | None = GPU,
    extra_s: Callable[[int], float] = lambda step: 0.0,
    micro_s: float = MICRO_S,
    statistics_s: float | None = None,
    scale: float = 1.0,
    network: Network = NETWORK,
) -> StepTrace:
    """A run whose every step takes what it must; where `statistics_s` is given, each third one takes so much
    longer for each micro-batch."""
    composed = settings(ranks, *more)
    rows, clock, tokens = [], 0.0, 0
    for step, batch in enumerate(batches, start=1):
        measured = statistics_s is not None and step % 3 == 0
        each = micro_s + (statistics_s or 0.0) * measured
        clock += step_s(batch, ranks, composed.data.micro_batch, each, REST_S)
        clock += scale * sync_s(composed, ranks, network) + extra_s(step)
        tokens += batch * LENGTH
        row = train_row(step, tokens, 3.0, batch, clock, **({"stat/noise_scale": 7.0} if measured else {}))
        rounds = -(-batch // (ranks * composed.data.micro_batch))
        rows.append(row | {"batch/accumulation": rounds})
    whole = dataclasses.replace(composed, budget=dataclasses.replace(composed.budget, tokens=tokens))
    return step_trace(whole, machine, table(rows))


@functools.cache  # composing takes a while
def settings(ranks: int, *more: str) -> Config:
    mesh = ["parallel=ddp", f"parallel.replicate={ranks}"] if ranks > 1 else ["parallel=single"]
    small = ["model=tiny", "model.width=128", "model.ffn=512", f"data.sequence_length={LENGTH}"]
    return config(*small, "data.micro_batch=4", "budget.tokens=50M", "batch.size=64", *mesh, *more)


SMALL_BATCH, LARGE_BATCH = [16] * 40, [64] * 10


# --- synchronisation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 8, 4096])
def test_an_all_reduce_takes_as_long_as_its_messages(ranks: int):
    assert NETWORK.all_reduce_s(ranks, 1e8) == pytest.approx(all_reduce_s(ranks, 1e8))


def test_a_number_of_ranks_between_powers_of_two_takes_the_rounds_of_the_next():
    only_latency = Network(1e9, 1e6)
    assert [only_latency.gather_s(ranks, 0) for ranks in (4, 5, 8, 9)] == [2, 3, 3, 4]


@pytest.mark.parametrize(
    "wrong",
    [{key: value} for key in ("bandwidth_gb_per_s", "latency_us") for value in (-1.0, math.inf, math.nan)]
    + [{"bandwidth_gb_per_s": 0.0}, {"bandwidth_gb_per_s": 1e-300}, {"latency_us": 1e300}],
)
def test_a_network_that_cannot_be_is_refused(wrong: dict[str, float]):
    with pytest.raises(ConfigError, match="must be"):
        Network(**wrong)


ACCUMULATION = 3


def sent(rank: int, overrides: list[str]) -> Footprint:
    return footprint(ranks_of(config(*overrides), rank), overrides, ACCUMULATION, "plain")


@pytest.mark.slow
@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("mesh", ["ddp2", "fsdp2", "fsdp2 whole gradients"])
def test_ranks_send_the_bytes_that_are_charged(mesh: str, tied: str, home: Path, small_corpus: list[str]):
    overrides = [*SMALL, "data.sequence_length=32", *small_corpus, *MESHES[mesh], f"model.tied={tied}"]
    composed = config(*overrides)
    parallel = composed.parallel
    found = gloo_ranks(parallel.world_size, sent, overrides)[0].sent_mib
    cost_s = synchronisation(composed, parallel.replicate, parallel.shard, Network(1.0, 0.0))
    seconds = ACCUMULATION * cost_s.per_micro_s + cost_s.per_step_s
    assert seconds * 1e9 / 2**20 == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize(
    ("mesh", "width", "expected"),
    [
        ("single", 64, (64, 1)),
        ("ddp4", 64, (64, 1)),
        ("fsdp2", 64, (1, 64)),
        ("hsdp2x2", 64, (32, 2)),
        ("hsdp2x2", 1, (1, 1)),
    ],
)
def test_the_mesh_grows_as_it_was_laid_out(mesh: str, width: int, expected: tuple[int, int]):
    assert mesh_at(config(*MESHES[mesh]).parallel, width) == expected


# --- what a step costs -----------------------------------------------------------------------------------


def test_least_absolute_deviations_shrug_off_a_third_of_wild_points():
    x = np.arange(1.0, 31.0)
    y = 2.0 * x + 5.0
    y[::3] *= 7.0
    assert least_absolute([x, np.ones(30)], y, np.ones(30)) == pytest.approx([2.0, 5.0], rel=1e-6)


def test_least_absolute_deviations_reach_the_least_of_any_corner():
    """The optimum passes through as many points as there are coefficients, or has a zero: tries them all."""
    random_ = np.random.default_rng(3)
    x, y = random_.uniform(1, 9, 12), random_.uniform(0, 20, 12)
    weights, ones = random_.uniform(0.5, 2, 12), np.ones(12)

    def deviation(slope: float, level: float) -> float:
        return float(np.sum(weights * np.abs(y - slope * x - level)))

    corners = [(max(0.0, s), 0.0) for s in y / x] + [(0.0, level) for level in y]
    for i in range(12):
        for j in range(i):
            slope = (y[i] - y[j]) / (x[i] - x[j])
            corners.append((slope, y[i] - slope * x[i]))
    least = min(deviation(*corner) for corner in corners if min(corner) >= 0)
    slope, level = least_absolute([x, ones], y, weights)
    assert min(slope, level) >= 0
    assert deviation(slope, level) == pytest.approx(least, rel=1e-6)


def fitted(runs: Sequence[StepTrace], network: Network = NETWORK) -> Cost:
    found = cost(cells(runs, network))
    assert found
    return found


def test_two_batch_sizes_on_one_rank_tell_a_micro_batch_from_the_rest():
    found = fitted([made_up(SMALL_BATCH), made_up(LARGE_BATCH)])
    assert (found.micro_s, found.step_s) == pytest.approx((MICRO_S, REST_S))
    assert found.sync_scale is None


def test_disturbed_steps_do_not_count():
    dice = random.Random(0)
    disturbed = [
        made_up(b, extra_s=lambda step: 3.0 * (dice.random() < 0.3)) for b in (SMALL_BATCH, LARGE_BATCH)
    ]
    found = fitted(disturbed)
    assert (found.micro_s, found.step_s) == pytest.approx((MICRO_S, REST_S))


def test_two_widths_tell_how_long_synchronisation_takes():
    runs = [made_up(b, ranks=ranks, scale=3.5) for b in (SMALL_BATCH, LARGE_BATCH) for ranks in (1, 2)]
    found = fitted(runs)
    assert (found.micro_s, found.step_s, found.sync_scale) == pytest.approx((MICRO_S, REST_S, 3.5))


def test_one_width_of_several_ranks_has_the_modelled_synchronisation_in_it():
    found = fitted([made_up(b, ranks=4) for b in (SMALL_BATCH, LARGE_BATCH)])
    assert (found.micro_s, found.step_s) == pytest.approx((MICRO_S, REST_S))


def test_what_is_taken_off_leaves_no_negative_time():
    slow = Network(bandwidth_gb_per_s=1e-3)
    assert fitted([made_up(b, ranks=4) for b in (SMALL_BATCH, LARGE_BATCH)], slow).step_s == 0


def test_ranks_that_share_cores_are_slower_by_as_much():
    """Two ranks of one thread on each core: everything takes twice as long, synchronisation too."""
    shared = Machine(2, None)
    four = made_up(LARGE_BATCH, "launch.cpus_per_task=1", ranks=4, machine=shared)
    doubled = four.steps.with_columns(seconds=2 * four.steps["seconds"])
    alone = [made_up(b, "launch.cpus_per_task=1", machine=shared) for b in (SMALL_BATCH, LARGE_BATCH)]
    (check,) = (
        c for c in checks(cells([dataclasses.replace(four, steps=doubled), *alone], NETWORK)) if c.ranks == 4
    )
    assert four.oversubscription == 2
    assert check.error == pytest.approx(0, abs=1e-6)


def test_the_first_steps_of_an_attempt_do_not_count():
    warm = [made_up(b, extra_s=lambda step: 9.0 if step <= 2 else 0.0) for b in ([16] * 7, [64] * 7)]
    assert fitted(warm).micro_s == pytest.approx(MICRO_S)
    assert [cell.steps for cell in cells(warm, NETWORK)] == [5, 5]


def test_steps_of_an_attempt_on_another_mesh_do_not_count():
    rows: list[Row] = []
    for step in range(1, 31):
        second = step > 15  # on two ranks, which take half the rounds
        row = train_row(step, step * 16 * LENGTH, 3.0, 16, 0.1 * step + (5.0 * (step - 15) if second else 0))
        rows.append(row | {"batch/accumulation": 2 if second else 4, "attempt": 1 + second})
    found = step_trace(settings(1), GPU, table(rows)).steps
    assert found.filter("regular")["step"].to_list() == list(range(3, 16))


def test_a_last_step_of_part_of_a_round_does_not_count():
    found = made_up([16] * 10 + [3]).steps
    assert found["regular"].to_list()[-2:] == [True, False]


def with_rows(run: StepTrace, column: str, value: float | None) -> StepTrace:
    """The trace of a record in which every third row has this value."""
    steps = run.steps.rename({"batch": "batch/size", "accumulation": "batch/accumulation"}).with_columns(
        pl.col("seconds").fill_null(1.0).cum_sum().alias("time"), pl.lit(None).alias("stat/noise_scale")
    )
    other = pl.when(pl.int_range(pl.len()) % 3 == 0).then(pl.lit(value, pl.Float64)).otherwise(pl.col(column))
    return step_trace(run.config, run.machine, steps.with_columns(other.alias(column)))


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_time_that_is_none_spoils_no_other_step(value: float | None):
    found = [with_rows(made_up(batches), "time", value) for batches in (SMALL_BATCH, LARGE_BATCH)]
    assert [run.steps["regular"].sum() for run in found] == [13, 3]  # of each three, one with both ends
    plain = [with_rows(made_up([16 * n] * 40), "time", value) for n in (1, 4)]
    assert (fitted(plain).micro_s, fitted(plain).step_s) == pytest.approx((MICRO_S, REST_S))


@pytest.mark.parametrize("value", [None, math.nan])
def test_an_unknown_number_of_micro_batches_tells_nothing(value: float | None):
    runs = [with_rows(made_up(b), "batch/accumulation", value) for b in (SMALL_BATCH, LARGE_BATCH)]
    assert project({"s": runs}, {}).missing["s"].startswith("no step of its log can be used")


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_log_with_a_batch_that_is_no_number_is_not_whole(value: float | None):
    assert not with_rows(made_up(SMALL_BATCH), "batch/size", value).whole


def test_a_clock_that_stood_still_gives_no_projection():
    runs = [made_up(b, micro_s=0.0, extra_s=lambda step: -REST_S) for b in (SMALL_BATCH, LARGE_BATCH)]
    assert project({"s": runs}, {}).missing["s"].startswith("no step of its log can be used")


# --- the check -------------------------------------------------------------------------------------------


def three_widths(scale: float = 4.0, network: Network = NETWORK) -> list[StepTrace]:
    return [
        made_up(batches, ranks=ranks, scale=scale, network=network)
        for batches in (SMALL_BATCH, [32] * 20, LARGE_BATCH)
        for ranks in (1, 2, 4)
    ]


def test_each_width_is_predicted_from_the_others():
    found = checks(cells(three_widths(), NETWORK))
    assert [(c.ranks, c.from_ranks) for c in found] == [(1, (2, 4)), (2, (1, 4)), (4, (1, 2))]
    assert [c.error for c in found] == pytest.approx([0, 0, 0], abs=1e-6)


def test_the_check_tells_a_width_that_breaks_the_model():
    odd = [made_up(b, ranks=4, micro_s=2 * MICRO_S) for b in (SMALL_BATCH, LARGE_BATCH)]
    runs = [run for run in three_widths(1.0) if run.mesh != (4, 1)] + odd
    (four,) = (c for c in checks(cells(runs, NETWORK)) if c.ranks == 4)
    true = [step_s(b, 4, 4, 2 * MICRO_S, REST_S) + sync_s(settings(4), 4) for b in (16, 64)]
    said = [step_s(b, 4, 4, MICRO_S, REST_S) + sync_s(settings(4), 4) for b in (16, 64)]
    counts = [38, 8]  # without the first two steps
    expected = np.dot(counts, said) / np.dot(counts, true) - 1
    assert four.error == pytest.approx(expected, rel=1e-5)


def test_with_one_width_nothing_is_checked():
    assert checks(cells([made_up(SMALL_BATCH), made_up(LARGE_BATCH)], NETWORK)) == []


# --- the projection --------------------------------------------------------------------------------------


def of_two(network: Network | None = NETWORK, counts: Sequence[int] = (1, 8, 64, 4096)) -> Projection:
    growing = [16] * 30 + [64] * 20 + [250]
    runs = {"constant": [made_up(SMALL_BATCH)], "growing": [made_up(growing), made_up([*growing, 64])]}
    return project(runs, {"constant": "constant", "growing": "constant"}, counts, network)


def test_times_are_those_of_going_through_every_step():
    growing = [16] * 30 + [64] * 20 + [250]

    def simulated(batches: Sequence[int], gpus: int) -> float:
        return sum(step_s(b, gpus, 4, MICRO_S, REST_S) + sync_s(settings(1), gpus) for b in batches)

    table = projection_table(of_two()).rows(named=True)
    assert [(row["schedule"], row["gpus"]) for row in table] == [
        (label, gpus) for label in ("constant", "growing") for gpus in (1, 8, 64, 4096)
    ]
    for row in table:
        constant = simulated(SMALL_BATCH, row["gpus"])
        both = (simulated(growing, row["gpus"]) + simulated([*growing, 64], row["gpus"])) / 2
        seconds = constant if row["schedule"] == "constant" else both
        assert row["seconds"] == pytest.approx(seconds, rel=1e-6)
        assert row["gpu_hours"] == pytest.approx(seconds * row["gpus"] / 3600, rel=1e-6)
        assert row["speedup"] == pytest.approx(constant / seconds, rel=1e-6)


def test_ranks_without_a_micro_batch_stand_idle():
    constant, growing = of_two().outlooks
    busy = [forecast.busy for forecast in constant.forecasts]
    rounds_of_one = sync_s(settings(1), 64) + MICRO_S + REST_S
    assert busy[0] == pytest.approx(4 * MICRO_S / (4 * MICRO_S + REST_S))
    assert busy[2] == pytest.approx(4 * MICRO_S / (64 * rounds_of_one))
    assert constant.enough < growing.enough  # what larger batches are for


def test_enough_is_where_another_doubling_saves_too_little():
    (outlook, _) = of_two(counts=[2**n for n in range(12)]).outlooks
    seconds = [forecast.seconds for forecast in outlook.forecasts]
    saved = [1 - many / few for few, many in itertools.pairwise(seconds)]
    assert outlook.enough == 2 ** next(n for n, share in enumerate(saved) if share < 0.1)


def test_measured_synchronisation_is_projected_unless_a_network_is_asked_for():
    runs = {"w": three_widths(4.0, Network())}
    (as_measured,) = project(runs, {}, [4]).outlooks
    (asked,) = project(runs, {}, [4], NETWORK).outlooks
    batches = [*SMALL_BATCH, *[32] * 20, *LARGE_BATCH]
    alone = sum(step_s(b, 4, 4, MICRO_S, REST_S) for b in batches) / 3
    each, measured = (len(batches) / 3 * sync_s(settings(1), 4, n) for n in (NETWORK, Network()))
    assert asked.forecasts[0].seconds == pytest.approx(alone + each, rel=1e-5)
    assert as_measured.forecasts[0].seconds == pytest.approx(alone + 4 * measured, rel=1e-5)


@pytest.mark.parametrize("widths", [(4,), (1, 2, 4)])
def test_a_network_asked_for_changes_what_is_projected_and_not_what_was_measured(widths: tuple[int, ...]):
    runs = [made_up(b, ranks=r, network=Network()) for b in (SMALL_BATCH, LARGE_BATCH) for r in widths]
    slow = Network(bandwidth_gb_per_s=0.1)
    as_is, asked = (project({"w": runs}, {}, [4], network) for network in (None, slow))
    assert asked.fits[0].cost == as_is.fits[0].cost
    assert asked.fits[0].cost.step_s == pytest.approx(REST_S, rel=1e-4)
    steps = (len(SMALL_BATCH) + len(LARGE_BATCH)) / 2
    dearer = steps * (sync_s(settings(1), 4, slow) - sync_s(settings(1), 4, Network()))
    seconds = [found.outlooks[0].forecasts[0].seconds for found in (as_is, asked)]
    assert seconds[1] - seconds[0] == pytest.approx(dearer, rel=1e-3)


def test_the_network_that_the_runs_are_taken_to_have_had_is_stated():
    runs = [made_up(b, ranks=4) for b in (SMALL_BATCH, LARGE_BATCH)]
    words = " ".join(notes(project({"w": runs}, {}, [4], NETWORK)))
    assert "2 GB/s and 50 µs per message for each rank, as asked for" in words
    assert "taken to have had 50 GB/s and 10 µs" in words


def test_taking_statistics_costs_the_schedule_that_takes_them():
    tested = made_up([16] * 60, statistics_s=0.006)
    found = project(
        {"plain": [made_up(SMALL_BATCH), made_up(LARGE_BATCH)], "tested": [tested]}, {}, [4], NETWORK
    )
    plain, measuring = found.outlooks
    assert plain.statistics_s == 0
    assert measuring.statistics_s == pytest.approx(0.006)
    one = MICRO_S + REST_S + sync_s(settings(1), 4)
    assert measuring.forecasts[0].seconds == pytest.approx(60 * one + 20 * 0.006)


def test_where_every_step_takes_statistics_a_micro_batch_includes_them():
    def always(batches: Sequence[int]) -> StepTrace:
        run = made_up(batches, micro_s=0.036)
        return dataclasses.replace(run, steps=run.steps.with_columns(measured=True))

    (found,) = project({"tested": [always(SMALL_BATCH), always(LARGE_BATCH)]}, {}, [1], NETWORK).fits
    assert found.cost.micro_s == pytest.approx(0.036)


def test_gpus_that_a_tensor_parallel_group_does_not_divide_are_left_out():
    more = ["parallel=tp", "parallel.tensor=2"]
    runs = {"tp": [made_up(SMALL_BATCH, *more), made_up(LARGE_BATCH, *more)]}
    (outlook,) = project(runs, {}, [1, 2, 7, 8], NETWORK).outlooks
    assert [forecast.gpus for forecast in outlook.forecasts] == [2, 8]
    assert outlook.enough % 2 == 0


def throttled(run: StepTrace) -> StepTrace:
    return dataclasses.replace(run, steps=run.steps.gather_every(10))


@pytest.mark.parametrize(
    ("runs", "reason"),
    [
        ([], "none of its runs has finished"),
        ([made_up(SMALL_BATCH)], "nothing tells its micro-batches"),
        ([throttled(made_up(SMALL_BATCH)), made_up(LARGE_BATCH)], "misses steps"),
        ([made_up(SMALL_BATCH), made_up(LARGE_BATCH, machine=None)], "different hardware"),
        (
            [made_up(batch, "sync=local_sgd", ranks=2) for batch in (SMALL_BATCH, LARGE_BATCH)],
            "sync=local_sgd",
        ),
        ([made_up(batch, "imbalance=delay", ranks=2) for batch in (SMALL_BATCH, LARGE_BATCH)], "on purpose"),
    ],
)
def test_what_cannot_be_projected_says_why(runs: list[StepTrace], reason: str):
    found = project({"s": runs}, {})
    assert found.outlooks == [] and reason in found.missing["s"]
    assert any("No projection of s" in note and reason in note for note in notes(found))
    assert projection_table(found).is_empty()


def test_no_gpus_are_refused():
    with pytest.raises(ConfigError, match="0 GPUs"):
        project({}, {}, [8, 0])


def test_a_sharded_mesh_grows_by_shards_also_from_one_rank():
    runs = [
        made_up(b, "parallel=fsdp", f"parallel.shard={ranks}")
        for b in (SMALL_BATCH, LARGE_BATCH)
        for ranks in (1, 2)
    ]
    (fit,) = project({"w": runs}, {}, [8], NETWORK).fits
    assert fit.sync_at(8, NETWORK) == synchronisation(runs[1].config, 1, 8, NETWORK)


# --- in words --------------------------------------------------------------------------------------------


def test_the_sentences_say_what_it_rests_on_and_how_far_to_trust_it():
    words = " ".join(notes(of_two()))
    assert "30 ms for a micro-batch of 4 sequences, 11 ms for the rest of a step" in words
    assert "NVIDIA H100" in words and "2 GB/s and 50 µs" in words
    assert "Not checked in this sweep" in words and "benchmarks/results/projection-cpu.json" in words
    assert "nothing of the synchronisation hidden" in words


def test_a_sweep_of_several_widths_states_its_own_error():
    odd = made_up(LARGE_BATCH, ranks=4, micro_s=2 * MICRO_S, scale=4.0)
    words = " ".join(notes(project({"w": [*three_widths()[:6], odd]}, {}, [8])))
    assert "Checked in this sweep" in words and "on 4 from 1 and 2 by −" in words


@pytest.mark.parametrize(
    ("hosts", "named"),
    [(("a", "a"), None), (("a", "b"), "(hosts: a and b)"), ((None, None), "(hosts: unknown)")],
)
def test_runs_of_unknown_machines_that_may_differ_are_not_taken_together_in_silence(
    hosts: tuple[str | None, str | None], named: str | None
):
    pairs = zip((SMALL_BATCH, LARGE_BATCH), hosts, strict=True)
    runs = [dataclasses.replace(made_up(b, machine=None), host=host) for b, host in pairs]
    words = " ".join(notes(project({"w": runs}, {})))
    assert named in words if named else "hosts" not in words
    known = [dataclasses.replace(run, machine=GPU) for run in runs]
    assert "hosts" not in " ".join(notes(project({"w": known}, {})))


def test_batches_that_follow_from_comparing_ranks_are_marked():
    more = ["batch=norm_test", "batch.size=64", "batch.estimator=worker"]
    runs = [made_up(b, *more, ranks=2) for b in (SMALL_BATCH, LARGE_BATCH)]
    assert project({"worker": runs}, {}).by_rank == ["worker"]
    assert of_two().by_rank == []


def test_the_error_quoted_is_the_benchmarks():
    found: dict[str, Any] = json.loads((ROOT / projection_notes.BENCHMARK).read_text())
    again = found["repetition"]["errors on 1, 2 and 4"]
    errors = [abs(error) for error in (*(check["error"] for check in found["figures"]["errors"]), *again)]
    assert f"{max(errors):.0%}" == f"{projection_notes.BENCHMARK_ERROR:.0%}"


# --- from files ------------------------------------------------------------------------------------------


def write_rows(batch: int) -> list[Row]:
    steps = 800_000 // LENGTH // batch
    one = step_s(batch, 2, 8, MICRO_S, REST_S)
    rows = [
        train_row(i, i * batch * LENGTH, 3.0, batch, i * one) | {"batch/accumulation": -(-batch // 16)}
        for i in range(1, steps + 1)
    ]
    rest = 800_000 // LENGTH - steps * batch
    if rest:
        tokens = (steps * batch + rest) * LENGTH
        rounds = -(-rest // 16)
        rows.append(
            train_row(steps + 1, tokens, 3.0, rest, (steps + 1) * one) | {"batch/accumulation": rounds}
        )
    return [*rows, val_row(len(rows), rows[-1]["tokens"], 2.5, rows[-1]["time"])]


def test_a_sweep_on_disk_is_projected(home: Path):
    points = [
        Point({"batch": f"constant_{b}", "seed": str(s)}, write_rows(b)) for b in (16, 64) for s in (0, 1)
    ]
    write_sweep("here", points, common=("experiment=demo", "data.micro_batch=8"))
    for logs in (run / "logs" for run in (home / "runs").iterdir()):
        logs.mkdir()
        (logs / "attempt-1.environment.json").write_text(json.dumps({"cpus": 64, "gpus": [{"name": "A100"}]}))
    sweep = load_sweep("here")
    found = step_traces(sweep, summarise(sweep, run_numbers(sweep.rows)))
    assert {run.machine for own in found.values() for run in own} == {Machine(64, "A100")}
    slow, fast = project(found, dict.fromkeys(found, "constant_16"), [8, 512], Network(1e9, 0.0)).outlooks
    assert (slow.seeds, fast.seeds) == (2, 2)
    # The runs are taken to have spent part of the rest of a step on Network().
    example = found["constant_16"][0].config
    alone_s = MICRO_S + REST_S - synchronisation(example, 2, 1, Network()).per_step_s
    # 390 steps of 16 and one of 10 sequences; 97 of 64 and one of 42; 8 micro-batches of 8 sequences at most.
    for outlook, steps in ((slow, 391), (fast, 98)):
        seconds = [forecast.seconds for forecast in outlook.forecasts]
        assert seconds == pytest.approx([steps * alone_s] * 2, rel=1e-4)
    assert fast.forecasts[0].speedup == pytest.approx(391 / 98, rel=1e-4)


def test_a_run_without_a_note_of_its_machine_is_still_projected(home: Path):
    points = [Point({"batch": f"constant_{b}", "seed": "0"}, write_rows(b)) for b in (16, 64)]
    write_sweep("here", points, common=("experiment=demo", "data.micro_batch=8"))
    sweep = load_sweep("here")
    found = project(step_traces(sweep, summarise(sweep, run_numbers(sweep.rows))), {})
    assert len(found.outlooks) == 2
    assert "an unknown machine" in " ".join(notes(found))
    assert "hosts" not in " ".join(notes(found))  # both ran on node-1


def test_a_tensor_parallel_sweep_is_projected_to_whole_groups(home: Path):
    """One data-parallel rank of two GPUs, with rounds of 8 sequences: 2 and 8 of them."""

    def rows(batch: int) -> list[Row]:
        done = np.minimum(np.arange(1, -(-6250 // batch) + 1) * batch, 6250)
        sizes, clock = np.diff(done, prepend=0), 0.0
        found: list[Row] = []
        for step, (size, sequences) in enumerate(zip(sizes.tolist(), done.tolist(), strict=True), start=1):
            clock += step_s(size, 1, 8, MICRO_S, REST_S)
            found.append(train_row(step, sequences * LENGTH, 3.0, size, clock))
        return [*found, val_row(len(found), 6250 * LENGTH, 2.5, clock)]

    mesh = ("experiment=demo", "data.micro_batch=8", "parallel=tp", "parallel.tensor=2")
    points = [Point({"batch": f"constant_{b}", "seed": "0"}, rows(b)) for b in (16, 64)]
    write_sweep("here", points, common=mesh)
    sweep = load_sweep("here")
    found = project(step_traces(sweep, summarise(sweep, run_numbers(sweep.rows))), {}, [1, 2, 3, 8], NETWORK)
    assert found.missing == {}
    table = projection_table(found)
    assert table["gpus"].to_list() == [2, 8] * 2
    assert all(enough % 2 == 0 for enough in table["enough_gpus"])
    # On 2 GPUs as measured: 390 steps of 2 rounds and one of 10 sequences; 97 of 8 and one of 42.
    alone = [391 * (2 * MICRO_S + REST_S), 97 * (8 * MICRO_S + REST_S) + 6 * MICRO_S + REST_S]
    assert table.filter(gpus=2)["seconds"].to_list() == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_real_runs_on_1_2_and_4_processes_predict_each_other(home: Path, small_corpus: list[str]):
    """Other work on the machine moves the times by more than the model is off (benchmarks.projection): this
    catches what is grossly wrong, the tests above have exact steps."""
    runs = benchmarks.projection.train(rounds=1, more=small_corpus)
    found = checks(cells(runs, Network()))
    assert [(c.ranks, c.from_ranks) for c in found] == [(1, (2, 4)), (2, (1, 4)), (4, (1, 2))]
    ratios = [check.predicted_s / check.measured_s for check in found]
    assert all(1 / 4 < ratio < 4 for ratio in ratios), (ratios, cells(runs, Network()))
