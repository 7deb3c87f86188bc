"""Refused configs: what the message says."""

from __future__ import annotations

import pytest
import yaml

import pipeline.parallel as strategies
from pipeline.config import ConfigError, known_keys, parse, parse_tokens, to_tree
from tests.support import ROOT, compose_tree, config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+batch.etaa=0.3"], "batch.etaa: no such setting. Did you mean batch.eta?"),
        (["+experiment.lr=0.3"], "must begin with the line `# @package _global_`"),
        (["+optimizer.lr=0.3"], "optimizer: no such setting. Did you mean optim?"),
        (["batch.size=many"], "batch.size=many: a whole number is needed, not a text"),
        (["batch.size=8.5"], "batch.size=8.5: a whole number is needed, not a number"),
        (["model.tied=1"], "model.tied=1: true or false is needed, not a whole number"),
        (["data.files=a.txt"], "data.files=a.txt: a list of texts is needed, such as [a, b]"),
        (["+model.l2=0.1"], "model.l2: only a model of model.kind=logistic|mlp|cnn|resnet18 has it"),
        (["model=logistic", "data=digits", "+model.heads=2"], "model.heads: only a model of model.kind=llama has it"),
        (["optim.lr=inf"], "optim.lr=inf: a finite number is needed"),
        (["budget.tokens=2Q"], "budget.tokens=2Q: a count of tokens is needed, such as 300000, 300k, 2M or 1.5B"),
        (["parallel.precision=bf16"], "one of float32, bfloat16. Did you mean bfloat16?"),
        (["model.heads=5"], "model.width=64: not divisible by 2 × model.heads = 10. Nearest model.width: 60 or 70"),
        (["model.kv_heads=3"], "model.heads=4: not divisible by model.kv_heads = 3. Nearest model.heads: 3 or 6"),
        (["model.width=68"], "model.width=68: not divisible by 2 × model.heads = 8. Nearest model.width: 64 or 72"),
        (["model.vocab=200"], "model.vocab=200: byte tokens need 257"),
        (["parallel.tensor=3"], "model.vocab=272: not divisible by parallel.tensor = 3. Nearest model.vocab: 270 or 273"),
        (["parallel.tensor=3"], "model.heads=4: not divisible by parallel.tensor = 3. Nearest model.heads: 3 or 6"),
        (["parallel.tensor=3"], "data.sequence_length=256: not divisible by parallel.tensor = 3"),
        (["parallel.replicate=2"], "parallel=single does not use this axis; it must be 1"),
        (["parallel=ddp", "batch.size=6"], "(ranks 2 × data.micro_batch=4 = 8). Nearest batch.size: 8"),
        (["batch.round_to=6"], "batch.round_to=6: not divisible by ranks × data.micro_batch = 4"),
        (["budget.tokens=5k"], "less than one batch (the first is 32 sequences × data.sequence_length=256 = 8192 tokens)"),
        (["batch=stages", "batch.sizes=[64,128]", "batch.fractions=[0.5,0.5]", "budget.tokens=5k"], "(the first is 64 sequences"),
        (["data=text"], "data=text needs at least one file or glob"),
        (["lr.warmup_steps=10"], "set one and leave the other null"),
        (["lr.warmup_tokens=3M"], "longer than the run (budget.tokens=2000000)"),
        (["optim.betas=[0.9]"], "two numbers, each at least 0 and below 1"),
        (["batch.size=0"], "batch.size=0: must be above 0"),
        (["batch.ema=1.0"], "batch.ema=1.0: must be at least 0 and below 1"),
        (["launch.minutes=3", "launch.warning_s=91"], "takes more than half of launch.minutes=3. Nearest launch.warning_s: 90"),
        (["launch.pack=2", "parallel=ddp", "launch.nodes=2"], "launch.pack=2: runs share one node, but this one needs 2. Use launch.pack=1"),
        (["parallel=ddp", "parallel.replicate=6", "batch.size=48", "launch.gpus_per_node=4"], "6 ranks cannot be spread equally over nodes of launch.gpus_per_node=4. Nearest number of ranks: 4 or 8"),
        (["parallel=ddp", "parallel.replicate=5", "batch.size=40", "launch.nodes=2"], "5 ranks cannot be spread equally over launch.nodes=2. Nearest number of ranks: 4 or 6"),
        (["parallel=single", "launch.nodes=2"], "1 ranks cannot be spread equally over launch.nodes=2. Nearest number of ranks: 2"),
        (["launch.confirm_gpu_hours=-1"], "launch.confirm_gpu_hours=-1.0: must not be negative"),
        (["launch.minutes=0"], "launch.minutes=0: must be above 0"),
    ],
)  # fmt: skip
def test_message(overrides: list[str], message: str):
    with pytest.raises(ConfigError) as refused:
        config(*overrides)
    assert message in str(refused.value)


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigError) as refused:
        config("batch.size=2", "model.kv_heads=3", "optim.betas=[2,0]")
    assert len(refused.value.problems) == 3


@pytest.mark.parametrize(
    ("text", "tokens"),
    [(300, 300), ("300k", 300_000), ("2M", 2_000_000), ("1.5B", 1_500_000_000), (1e6, 10**6), ("0.5k", 500)],
)
def test_token_counts(text: object, tokens: int):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "k", "1.0005k", -1, True, "nanM", "1e400k", None, 1.5])
def test_no_token_counts(text: object):
    with pytest.raises(ValueError, match="count of tokens"):
        parse_tokens(text)


def test_round_trip():
    assert parse(to_tree(config("batch=stages"))) == config("batch=stages")


def test_every_setting_has_its_default_in_the_composed_tree():
    missing = compose_tree()
    del missing["seed"]
    with pytest.raises(ConfigError, match="seed: missing"):
        parse(missing)
    assert "batch.eta" in known_keys()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel=ddp", "parallel.shard=2"], "parallel.shard=2: parallel=ddp does not use this axis"),
        (["parallel=fsdp", "parallel.replicate=2"], "parallel.replicate=2: parallel=fsdp does not use this"),
        (["parallel=hsdp", "parallel.tensor=2"], "parallel.tensor=2: parallel=hsdp does not use this axis"),
        (["parallel=tp", "parallel.shard=0"], "parallel.shard=0: must be above 0, or -1 for the rest"),
        (
            ["parallel=ddp", "parallel.shard=-1", "launch.gpus_per_node=4"],
            "parallel.shard=-1: parallel=ddp does not use",
        ),
        (["parallel=tp", "parallel.tensor=8"], "parallel.tensor=8: the nearest that divides all of .* is 2"),
        (["parallel=fsdp", "parallel.shard=-1"], "the rest of how many ranks.* Set launch.gpus_per_node"),
        (
            ["parallel=fsdp_tp", "parallel.shard=-1", "parallel.tensor=-1", "launch.gpus_per_node=8"],
            "parallel.shard=-1 and parallel.tensor=-1: only one axis can be the rest",
        ),
        (
            ["parallel=fsdp_tp", "parallel.shard=-1", "parallel.tensor=3", "launch.gpus_per_node=8"],
            r"= 8 ranks cannot be divided by the other axes' 3. Nearest number of ranks: 6 or 9",
        ),
        (
            ["parallel=hsdp", "launch.nodes=1", "launch.gpus_per_node=8"],
            r"replicate 2 × shard 2 × tensor 1 = 4 ranks, but launch.nodes=1 × launch.gpus_per_node=8 = 8. "
            r"Make them equal, or set parallel.shard=-1",
        ),
        (["parallel=tp", "parallel.tensor=3"], "model.heads=4: not divisible by parallel.tensor = 3"),
        (["parallel=tp", "parallel.tensor=4"], "model.kv_heads=2: not divisible by parallel.tensor = 4"),
        (
            ["parallel=tp", "model.ffn=171"],
            "model.ffn=171: not divisible by .* = 2. Nearest model.ffn: 170 or 172",
        ),
        (["parallel=tp", "model.vocab=273"], "model.vocab=273: not divisible by parallel.tensor = 2"),
        (
            ["parallel=fsdp_tp", "data.sequence_length=63"],
            "data.sequence_length=63: not divisible by parallel.tensor",
        ),
        (
            ["parallel=tp", "batch=norm_test", "batch.estimator=worker"],
            r"parallel=tp \(replicate 1, shard 1, tensor 2\) does not show",
        ),
        (["parallel=hsdp", "parallel.shard=1", "batch=norm_test", "batch.estimator=paper"], "does not show"),
        (
            ["parallel=ddp", "batch=norm_test", "batch.estimator=worker", "batch.measured_units=2"],
            "batch.measured_units=2: counts micro-batches",
        ),
    ],
)
def test_meshes_that_do_not_fit_are_refused(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        config(*overrides)


@pytest.mark.parametrize(
    ("overrides", "mesh"),
    [
        (["parallel=ddp", "parallel.replicate=-1"], (8, 1, 1)),
        (["parallel=fsdp", "parallel.shard=-1"], (1, 8, 1)),
        (["parallel=hsdp", "parallel.replicate=-1"], (4, 2, 1)),
        (["parallel=fsdp_tp", "parallel.replicate=2", "parallel.shard=-1"], (2, 2, 2)),
    ],
)
def test_one_axis_can_be_the_rest_of_the_ranks(overrides: list[str], mesh: tuple[int, int, int]):
    """And the frozen config, whose hash is the run's id, names the number."""
    parallel = config(*overrides, "launch.nodes=2", "launch.gpus_per_node=4").parallel
    assert (parallel.replicate, parallel.shard, parallel.tensor) == mesh


def test_every_parallel_option_sets_the_same_keys():
    keys = {
        path.stem: yaml.safe_load(path.read_text()).keys() for path in (ROOT / "conf/parallel").glob("*.yaml")
    }
    assert sorted(keys) == strategies.names()
    assert set(map(tuple, keys.values())) == {("strategy", "replicate", "shard", "tensor")}


@pytest.mark.parametrize(
    "overrides",
    [
        ["launch.minutes=3", "launch.warning_s=90"],
        ["launch.pack=2", "parallel=ddp", "launch.nodes=1"],
        ["parallel=ddp", "parallel.replicate=8", "launch.gpus_per_node=4"],
        ["parallel=ddp", "parallel.replicate=4", "launch.nodes=2"],
    ],
)
def test_the_nearest_launch_settings_that_a_message_names_are_taken(overrides: list[str]):
    config(*overrides)
