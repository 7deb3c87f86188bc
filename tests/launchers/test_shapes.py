"""What a job asks the cluster for, and which runs can share an array."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchers.shapes import Shape, by_shape, gpu_hours, grouped, shares
from tests.support import config

FITS = ["model.heads=8", "model.kv_heads=8", "model.width=128", "batch.size=256", "budget.tokens=4M"]


def shape(*overrides: str) -> Shape:
    return Shape.of(config(*FITS, *overrides))


@pytest.mark.parametrize(
    ("overrides", "nodes", "ranks", "gpus"),
    [
        (["parallel=single"], 1, 1, 1),
        (["parallel=single", "launch.gpus_per_node=8"], 1, 1, 1),  # one GPU of a node, the others stay free
        (["parallel=ddp", "parallel.replicate=4", "launch.gpus_per_node=8"], 1, 4, 4),
        (["parallel=ddp", "parallel.replicate=4"], 1, 4, 4),  # nothing said of nodes: one
        (["parallel=ddp", "parallel.replicate=16", "launch.gpus_per_node=8"], 2, 8, 8),
        (["parallel=ddp", "parallel.replicate=8", "launch.nodes=4"], 4, 2, 2),
        (["parallel=hsdp", "parallel.replicate=2", "parallel.shard=8", "launch.gpus_per_node=4"], 4, 4, 4),
        (["parallel=fsdp", "parallel.shard=-1", "launch.nodes=3", "launch.gpus_per_node=8"], 3, 8, 8),
        (["parallel=ddp", "parallel.replicate=4", "launch.nodes=2", "launch.device=cpu"], 2, 2, 0),
    ],
)
def test_ranks_are_spread_over_nodes(overrides: list[str], nodes: int, ranks: int, gpus: int) -> None:
    s = shape(*overrides)
    assert (s.nodes, s.ranks_per_node, s.gpus_per_node) == (nodes, ranks, gpus)
    assert s.devices == nodes * ranks


def test_runs_share_an_array_when_their_jobs_ask_for_the_same() -> None:
    points = [
        ("a", config("seed=0")),
        ("b", config("seed=1", "launch.minutes=30")),
        (
            "c",
            config("seed=2", "batch=norm_test", "launch.max_parallel=3"),
        ),  # neither changes what is asked for
        ("d", config("seed=3", "parallel=ddp")),
        ("e", config("seed=4", "launch.minutes=30")),
    ]
    assert list(by_shape(points).values()) == [["a", "c"], ["b", "e"], ["d"]]


@pytest.mark.parametrize(
    "setting",
    [
        "launch.minutes=7", "launch.warning_s=7", "launch.partition=p", "launch.qos=q", "launch.account=a",
        "launch.constraint=c", "launch.cpus_per_task=3", "launch.mem_gb=3", "launch.setup=[x]",
        "launch.sbatch=[exclusive]", "launch.pack=2", "launch.device=cpu",
    ],
)  # fmt: skip
def test_whatever_sbatch_is_told_separates_arrays(setting: str) -> None:
    assert shape(setting) != shape()


def test_groups_are_full_but_for_the_last() -> None:
    assert grouped("abcdefg", 3) == [["a", "b", "c"], ["d", "e", "f"], ["g"]]
    assert grouped("ab", 5) == [["a", "b"]] and grouped("", 2) == []


sizes_of_arrays = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@given(st.integers(1, 400), sizes_of_arrays)
def test_shares_keep_the_limit_and_are_proportional(limit: int, sizes: list[int]) -> None:
    given_ = shares(limit, sizes)
    assert all(1 <= share <= size for share, size in zip(given_, sizes, strict=True))
    assert sum(given_) == min(sum(sizes), max(limit, len(sizes)))  # and nothing is left unused
    ideal = [min(limit, sum(sizes)) * size / sum(sizes) for size in sizes]
    for share, wanted in zip(given_, ideal, strict=True):
        # Arrays too small for their own share take what they must from the others.
        assert wanted - len(sizes) < share < wanted + 1 + 1e-9 or share == 1


@given(st.integers(0, 100), sizes_of_arrays)
def test_where_there_is_room_every_job_may_run(spare: int, sizes: list[int]) -> None:
    assert shares(sum(sizes) + spare, sizes) == shares(None, sizes) == sizes


def test_shares_in_figures() -> None:
    assert shares(8, [30, 10]) == [6, 2]
    assert shares(2, [100, 100, 100]) == [1, 1, 1]  # each array goes on, whatever the limit
    assert shares(10, [1, 99]) == [1, 9]


def test_gpu_hours_are_those_until_the_time_limits() -> None:
    two_nodes = shape("parallel=ddp", "parallel.replicate=16", "launch.gpus_per_node=8", "launch.minutes=90")
    packed = shape("launch.pack=4", "launch.minutes=30")
    cpu = shape("launch.device=cpu", "launch.minutes=6000")
    assert gpu_hours({two_nodes: range(3)}) == 3 * 16 * 1.5
    assert gpu_hours({packed: range(4), cpu: range(10)}) == 4 * 0.5


@pytest.mark.parametrize("dashes", ["", "--"])
def test_what_else_sbatch_is_told(dashes: str) -> None:
    told = shape(
        f'launch.sbatch=["{dashes}reservation=a=b",{dashes}exclusive,"{dashes}mail-type=END"]'
    ).parameters()
    further = told["additional_parameters"]
    assert (further["reservation"], further["exclusive"], further["mail-type"]) == ("a=b", True, "END")
    assert further["requeue"] is True


def test_a_job_of_several_runs_asks_for_all_of_them() -> None:
    ddp = ["parallel=ddp", "launch.cpus_per_task=3", "launch.mem_gb=1.5"]
    one, three = shape(*ddp).parameters(), shape(*ddp, "launch.pack=3").parameters()
    assert (one["ntasks_per_node"], one["gpus_per_node"], one["mem"]) == (2, 2, "1536MB")
    assert (three["ntasks_per_node"], three["gpus_per_node"], three["mem"]) == (6, 6, "4608MB")
    assert one["cpus_per_task"] == three["cpus_per_task"] == 3 and three["nodes"] == 1
    # One that fails ends its own job and nobody else's.
    assert (one["srun_args"], three["srun_args"]) == (
        ["--kill-on-bad-exit=1", "--wait=0"],
        ["--kill-on-bad-exit=0", "--wait=0"],
    )


def test_what_is_not_asked_for_is_left_to_the_cluster() -> None:
    told = shape("launch.device=cpu").parameters()
    assert {"gpus_per_node", "mem", "partition", "qos", "account", "constraint"}.isdisjoint(told)
    assert shape("launch.setup=['module load cuda']", "launch.cpus_per_task=2").parameters()["setup"] == [
        "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
        "module load cuda",
    ]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ([], "1 × 1 GPU, 60 min"),
        (["launch.partition=main", "launch.qos=high", "launch.pack=2"], "1 × 1 GPU, 60 min, partition main, qos high, 2 in a job"),
        (["parallel=ddp", "launch.nodes=2", "launch.device=cpu"], "2 × 1 rank, 60 min"),
    ],
)  # fmt: skip
def test_in_words(overrides: list[str], text: str) -> None:
    assert str(shape("launch.minutes=60", *overrides)) == text
