"""An attempt on another mesh is the same run; anything else would not be."""

from __future__ import annotations

import pytest

from pipeline.attempt import for_attempt, mesh_of
from pipeline.batch import schedule_class
from pipeline.config import ConfigError
from tests.support import config


def test_the_mesh_changes_and_the_batches_do_not():
    frozen = config("parallel=ddp", "parallel.replicate=4", "data.micro_batch=2")
    moved = for_attempt(frozen, ["parallel=fsdp_tp", "parallel.shard=2", "launch.device=cpu"])
    assert (moved.parallel.strategy, moved.parallel.shard, moved.parallel.tensor) == ("fsdp_tp", 2, 2)
    assert moved.parallel.replicate == 1  # of the option, not left over
    assert moved.batch_multiple == frozen.batch_multiple == 8
    assert mesh_of(moved) == "fsdp_tp, shard 2, tensor 2" and mesh_of(config()) == "single"
    assert (moved.batch.size, moved.seed, moved.data) == (frozen.batch.size, frozen.seed, frozen.data)


def test_batches_stay_what_they_were_when_ranks_cannot_share_them_evenly():
    """Not even when the first batch is less than a micro-batch for every rank: the run may have grown since."""
    frozen = config("data.micro_batch=2", "batch=norm_test", "batch.size=8", "batch.max_size=512")
    moved = for_attempt(frozen, ["parallel=fsdp", "parallel.shard=6"])
    assert moved.batch_multiple == frozen.batch_multiple == 2
    for composed in (frozen, moved):
        schedule = schedule_class("norm_test")(composed)
        assert (schedule.start()[1].size, schedule.largest) == (8, 512)


def test_options_come_before_settings_in_whatever_order():
    orders = [["parallel=fsdp", "parallel.shard=4"], ["parallel.shard=4", "parallel=fsdp"]]
    assert [for_attempt(config(), order).parallel.shard for order in orders] == [4, 4]


WORKER = [
    "parallel=ddp",
    "parallel.replicate=4",
    "batch=norm_test",
    "batch.size=16",
    "batch.estimator=worker",
]


def test_ranks_that_are_compared_stay_as_many():
    frozen = config(*WORKER)
    assert for_attempt(frozen, ["parallel=hsdp"]).parallel.data_ranks == 4
    for changes in (["parallel=fsdp"], ["parallel=fsdp_tp", "parallel.replicate=4", "parallel.shard=1"]):
        with pytest.raises(ConfigError, match="compares the 4 data-parallel ranks of this run"):
            for_attempt(frozen, changes)


@pytest.mark.parametrize(
    ("more", "changes", "message"),
    [
        ("sync=local_sgd", ["parallel.replicate=2"], "Keep parallel.replicate=4"),
        ("sync=local_sgd", ["parallel=fsdp", "parallel.shard=4"], "Use parallel=ddp"),
        ("data.distribution=by_rank", ["parallel.replicate=2"], "Keep replicate × shard = 4"),
        ("imbalance=variable_length", ["parallel.replicate=2"], "Keep replicate × shard = 4"),
        ("imbalance=delay", ["parallel=single", "parallel.replicate=1"], "imbalance.ranks=2: of 1"),
    ],
)
def test_ranks_that_make_the_run_what_it_is_stay_as_many(more: str, changes: list[str], message: str):
    frozen = config("parallel=ddp", "parallel.replicate=4", more)
    with pytest.raises(ConfigError, match=message):
        for_attempt(frozen, changes)
    assert for_attempt(frozen, ["launch.cpus_per_task=1"]).parallel == frozen.parallel


def test_gradients_of_single_samples_need_whole_parameters():
    frozen = config("model=logistic", "data=digits", "batch=norm_test", "batch.estimator=sample")
    assert for_attempt(frozen, ["parallel=ddp"]).parallel.data_ranks == 2
    with pytest.raises(ConfigError, match="Use parallel=single or parallel=ddp"):
        for_attempt(frozen, ["parallel=fsdp"])


TUMOURS = ["data=breast_cancer", "model=logistic", "model.loss=binary", "parallel=ddp", "optim=sgd"]
NORM_TEST = ["batch=norm_test", "batch.size=8", "batch.max_size=64"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.loss=auc", "optim=coda"],
        ["optim=prox_sgd", "optim.regulariser=simplex"],
        [*NORM_TEST, "batch.averaged_steps=10"],
        ["batch=composite", "optim=prox_sgd", "optim.clip=null"],
    ],
    ids=" ".join,
)
def test_what_needs_the_whole_model_on_a_rank(overrides: list[str]):
    """Refused as for a new run: on shards they fail, or are another method without a word."""
    frozen = config(*TUMOURS, *overrides)
    assert for_attempt(frozen, ["parallel=single", "parallel.replicate=1"]).parallel.data_ranks == 1
    with pytest.raises(ConfigError, match="Use parallel=single or parallel=ddp"):
        for_attempt(frozen, ["parallel=fsdp"])


@pytest.mark.parametrize(("here", "there"), [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_an_optimizer_that_measures_goes_on_measuring_the_same(here: str, there: str):
    """Backtracking: single samples where every rank has the model, else micro-batches."""
    frozen = config(*TUMOURS, "optim=backtracking", f"parallel={here}")
    with pytest.raises(ConfigError, match=f"parallel={there}: .* Keep parallel={here}"):
        for_attempt(frozen, [f"parallel={there}"])
    by_micro_batches = config(*TUMOURS, *NORM_TEST, "optim=backtracking", f"parallel={here}")
    assert for_attempt(by_micro_batches, [f"parallel={there}"]).parallel.strategy == there


def test_a_stage_smaller_than_a_micro_batch_for_every_new_rank_goes_on():
    frozen = config("batch=stages", "batch.sizes=[8,16,32]", "data.micro_batch=4")
    assert for_attempt(frozen, ["parallel=ddp", "parallel.replicate=4"]).batch_multiple == 4


def test_the_rest_of_the_ranks():
    moved = for_attempt(config(), ["parallel=fsdp", "parallel.shard=-1", "launch.gpus_per_node=4"])
    assert moved.parallel.shard == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("batch.size=64", "batch.size=64: an attempt can change parallel=…, parallel.* and launch.* alone"),
        ("parallel", "parallel: an attempt can change"),
        ("parallel=fsdq", "parallel=fsdq: no such option of parallel. Did you mean fsdp?"),
        ("parallel.shart=2", "parallel.shart: no such setting. Did you mean parallel.shard?"),
        ("parallel.shard=2", "parallel=single does not use this axis"),
        ("parallel.shard=two", "parallel.shard=two: a whole number is needed"),
        ("parallel.shard=[1", "parallel.shard=[1: the value cannot be read"),
        ("parallel.shard=", "parallel.shard=null: a whole number is needed, not nothing"),
        ("parallel.precision=bfloat16", "the run computes in float32; in another precision"),
    ],
)
def test_refused(change: str, message: str):
    with pytest.raises(ConfigError) as refused:
        for_attempt(config(), [change])
    assert message in str(refused.value)
