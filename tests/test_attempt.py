"""An attempt on another mesh is the same run; anything else would not be."""

from __future__ import annotations

import pytest

from pipeline.attempt import for_attempt, mesh_of
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


def test_batches_stay_multiples_of_what_they_were_when_ranks_cannot_share_them_evenly():
    frozen = config("data.micro_batch=2", "batch.size=12", "batch.round_to=4")
    assert for_attempt(frozen, ["parallel=ddp", "parallel.replicate=3"]).batch_multiple == 12


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
    ],
)
def test_refused(change: str, message: str):
    with pytest.raises(ConfigError) as refused:
        for_attempt(config(), [change])
    assert message in str(refused.value)
