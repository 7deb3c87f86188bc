"""Optimizers that ask for more than a gradient, in whole runs: averages, resuming, meshes, what is counted and
what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from pipeline.batch._interface import Decision, State
from pipeline.checkpoint import Progress, load_weights
from pipeline.config import Config, ConfigError, check, parse
from pipeline.identity import identity_fields, run_id
from pipeline.optim._proximal import simplex
from pipeline.problem import problem_of
from pipeline.store import RunDirectory, thawed
from pipeline.train import train
from tests.distributed import column, gloo_ranks, ranks_of, train_here, train_rank
from tests.optim.softmax import DIGITS, Matrix, Softmax, as_matrix, checkpoint, steps, tensors
from tests.support import compose_tree, config

EVERY_STEP = ["checkpoint.interval_tokens=64", "checkpoint.keep=20"]
HALF_WAY = "checkpoint.interval_tokens=192"  # after step 3 of 6
NEW = [
    ["optim=adam"],
    ["optim=adamp", "model=mlp"],
    ["optim=adagrad_norm"],
    ["optim=adagrad_norm", "optim.per_row=true", "optim.delayed=true"],
    ["optim=muon", "model=mlp"],
    ["optim=prox_sgd", "optim.regulariser=elastic_net"],
    ["optim=backtracking"],
    ["optim=sam", "optim.base=adamw"],
    ["optim=sam", "optim.base=muon", "model=mlp"],
    ["optim=swa", "optim.base=adamw", "optim.average_start=0", "optim.average_restart_tokens=128"],
    [
        "optim=swa",
        "optim.base=muon",
        "model=mlp",
        "optim.average_start=0",
        "optim.average_restart_tokens=192",
    ],
    ["optim=swa", "optim.base=adagrad", "optim.average_start=0.2", "optim.average_interval_tokens=128"],
    ["optim=swa", "optim.base=backtracking", "optim.clip=null", "optim.average_restart_tokens=64"],
]


def iterate(run: RunDirectory, step: int) -> Matrix:
    weights = tensors(checkpoint(run, step))
    return as_matrix({name: weights[f"model.{name}"] for name in ("linear.weight", "linear.bias")})


def mean(run: RunDirectory, step: int) -> Matrix:
    kept = tensors(checkpoint(run, step))
    return as_matrix({name: kept[f"captured.average.{name}"] for name in ("linear.weight", "linear.bias")})


@pytest.mark.parametrize(("interval", "taken"), [("null", [4, 5, 6, 7, 8]), ("128", [6, 8])])
def test_swa_is_the_mean_of_the_saved_iterates(home: Path, interval: str, taken: list[int]):
    """Of 8 steps of 64, from 0.4 × 512 ≈ 205 samples on: those that pass 205 + k × 128, or all."""
    overrides = ["optim=swa", "optim.average_start=0.4", f"optim.average_interval_tokens={interval}"]
    composed = config(*DIGITS, *overrides, "budget.tokens=512", *EVERY_STEP, "eval.interval_tokens=64")
    run = train_here(composed)
    iterates = {step: iterate(run, step) for step in range(1, 9)}
    expected = np.mean([iterates[step] for step in taken], axis=0)
    np.testing.assert_allclose(mean(run, 8), expected, rtol=1e-5, atol=1e-7)
    # The last iterate is that of a run without an average.
    plain = train_here(config(*DIGITS, "optim=sgd", "budget.tokens=512", "eval.interval_tokens=64"))
    assert column(run, "val/loss") == column(plain, "val/loss")
    # Both are evaluated, from the first mean on.
    rows = [row for row in run.rows() if "val/loss" in row]
    assert [row["step"] for row in rows if "val/loss_averaged" in row] == list(range(taken[0], 9))
    inputs, labels = problem_of(composed, ranks_of(composed)).held_out.read(0, 64)
    x = np.c_[inputs.reshape(64, -1).astype(float), np.ones(64)]
    for name, weights in (("", iterates[8]), ("_averaged", expected)):
        logits = x @ weights.T
        log_shares = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        assert rows[-1][f"val/loss{name}"] == pytest.approx(
            -log_shares[np.arange(64), labels].mean(), rel=1e-5
        )
        assert rows[-1][f"val/accuracy{name}"] == pytest.approx((logits.argmax(1) == labels).mean())


def test_swa_goes_on_from_its_mean(home: Path):
    """Every 128 samples after the second step; the last mean, at the end, stays a mean."""
    overrides = ["optim=swa", "optim.average_start=0.25", "optim.average_restart_tokens=128"]
    composed = config(*DIGITS, *overrides, "budget.tokens=512", "optim.clip=null")
    run = train_here(composed)
    softmax, w, momentum, iterates = Softmax(composed), np.zeros((10, 65)), 0.0, []
    for number, (first, size, lr) in enumerate(steps(run), 1):
        momentum = 0.9 * momentum + softmax.gradient(w, first, size)
        w = w - lr * momentum
        if number > 2:
            iterates.append(w)
        if number in (4, 6):
            w, iterates, momentum = np.mean(iterates, axis=0), [], 0.0
    np.testing.assert_allclose(as_matrix(load_weights(run)), w, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(mean(run, 8), np.mean(iterates, axis=0), rtol=1e-4, atol=1e-6)
    assert column(run, "val/loss_averaged")


@pytest.mark.parametrize("overrides", NEW, ids=" ".join)
def test_a_resumed_run_is_the_uninterrupted_one(home: Path, overrides: list[str]):
    """Bit for bit, with what it has counted; also from where the run went on from a mean."""
    composed = config(*DIGITS, *overrides, HALF_WAY)
    run = train_here(composed)
    whole, rows = tensors(checkpoint(run, 6)), logged(run)
    shutil.rmtree(checkpoint(run, 6))
    train_here(composed, attempt=2)
    again = tensors(checkpoint(run, 6))
    assert again.keys() == whole.keys()
    assert all(again[name].equal(whole[name]) for name in whole)
    assert logged(run) == rows


def test_resuming_does_not_project_again(home: Path):
    """A simplex is met to rounding, and a second projection changes the last bits of these weights."""
    composed = config("data=breast_cancer", "model=logistic", "model.loss=binary", "data.micro_batch=16",
                      "batch.size=64", "budget.tokens=640", "lr.warmup_tokens=0", "optim=prox_sgd", "optim.lr=0.5",
                      "optim.regulariser=simplex", "checkpoint.interval_tokens=448")  # fmt: skip
    run = train_here(composed)
    whole = load_weights(run)["linear.weight"]
    shutil.rmtree(checkpoint(run, 10))
    kept = load_weights(run)["linear.weight"]
    assert not simplex(kept, 0.5).equal(kept)
    train_here(composed, attempt=2)
    assert load_weights(run)["linear.weight"].equal(whole)


def logged(run: RunDirectory) -> list[dict[str, object]]:
    times = ("time", "wall", "attempt", "throughput/tokens_per_s")
    return [{key: value for key, value in row.items() if key not in times} for row in run.rows()]


def train_each(rank: int, runs: list[tuple[Config, str]]) -> None:
    for composed, path in runs:
        train(composed, RunDirectory(path), 1, ranks_of(composed, rank))


# Backtracking sees the noise of single samples where it can, and under fsdp that of micro-batches: there it is
# compared where all meshes see these, as a batch test does, whose batch is at its cap.
BY_MICRO_BATCHES = ["batch=norm_test", "batch.max_size=64"]
ON_MESHES = [
    *((overrides, ("ddp", "fsdp")) for overrides in NEW if "backtracking" not in " ".join(overrides)),
    (["optim=backtracking"], ("ddp",)),
    *(
        ([*overrides, *BY_MICRO_BATCHES], ("fsdp",))
        for overrides in NEW
        if "backtracking" in " ".join(overrides)
    ),
]


@pytest.mark.slow
def test_the_mesh_does_not_matter(home: Path):
    """Norms, losses and means are over all ranks; a checkpoint of a mesh is read by one process."""
    wide = ["model=mlp", "model.widths=[32]", "data.micro_batch=8"]  # the last of overrides counts
    parallels = {mesh: config(*DIGITS, f"parallel={mesh}").parallel for mesh in ("single", "ddp", "fsdp")}
    runs: dict[tuple[str, str], tuple[Config, RunDirectory]] = {}
    for overrides, meshes in ON_MESHES:
        one_process = config(*DIGITS, *overrides, *wide)
        for mesh in ("single", *meshes):
            composed = dataclasses.replace(one_process, parallel=parallels[mesh])
            if mesh == "fsdp":
                half_way = dataclasses.replace(composed.checkpoint, interval_tokens=192)
                composed = dataclasses.replace(composed, checkpoint=half_way)
            check(composed)
            run = RunDirectory.of(composed)
            run.freeze(composed)
            runs[" ".join(overrides), mesh] = composed, run
    for (_, mesh), (composed, _) in runs.items():
        if mesh == "single":
            train_here(composed)
    several = [(composed, str(run.path)) for (_, mesh), (composed, run) in runs.items() if mesh != "single"]
    gloo_ranks(2, train_each, several, timeout_s=400)
    for overrides, meshes in ON_MESHES:
        name = " ".join(overrides)
        _, one = runs[name, "single"]
        rounding = 1e-2 if "muon" in name else 1e-4 if "adam" in name or "adagrad" in name else 1e-5
        for mesh in meshes:
            _, many = runs[name, mesh]
            for metric in ("train/loss", "val/loss", "val/loss_averaged", "lr", "gradient_evaluations"):
                assert column(many, metric) == pytest.approx(column(one, metric), rel=rounding), (name, mesh)
        if "fsdp" not in meshes:
            continue
        composed, sharded = runs[name, "fsdp"]
        before = column(sharded, "train/loss")
        shutil.rmtree(checkpoint(sharded, 6))
        single = dataclasses.replace(composed, parallel=runs[name, "single"][0].parallel)
        train_rank(0, single, str(sharded.path), attempt=2)
        assert column(sharded, "train/loss") == pytest.approx(before, rel=rounding), name


def test_what_is_evaluated_is_counted(home: Path):
    """A gradient of every sample of a step, two under SAM; the losses of a line search apart."""
    for overrides, factor in ((["optim=sgd"], 1), (["optim=sam"], 2), (["optim=backtracking"], 1)):
        run = train_here(config(*DIGITS, *overrides))
        counted = [factor * sequences for sequences in column(run, "sequences")[:6]]
        assert column(run, "gradient_evaluations") == counted
        assert bool(column(run, "loss_evaluations")) == ("backtracking" in overrides[0])


def test_a_checkpoint_of_before_has_seen_every_sequence_once():
    progress = Progress(State(8.0), Decision(8, 8.0, "scheduled", {}), 8, step=3, sequences=24)
    tree = json.loads(json.dumps(dataclasses.asdict(progress)))
    for later in ("gradient_evaluations", "loss_evaluations", "averaged"):
        del tree[later]
    assert Progress.from_tree(tree) == dataclasses.replace(progress, gradient_evaluations=24)


LATER = ["delta", "decay_ratio", "accumulator", "per_row", "delayed", "regulariser", "l1", "l2", "lower", "upper",
         "base", "rho", "average_start", "average_interval_tokens", "average_restart_tokens", "stage_tokens",
         "stage_growth", "proximity"]  # fmt: skip


@pytest.mark.parametrize("name", ["adagrad", "adamw", "sgd", "signum"])
def test_the_first_optimizers_keep_their_ids(name: str):
    first = {"name", "lr", "weight_decay", "betas", "momentum", "eps", "clip"}
    assert identity_fields(config(f"optim={name}"))["optim"].keys() == first
    assert run_id(config(f"optim={name}", "optim.rho=0.3", "optim.base=adamw")) == run_id(
        config(f"optim={name}")
    )


@pytest.mark.parametrize(
    ("optimizer", "read", "unread"),
    [
        ("adam", ["betas=[0.8,0.9]", "eps=1e-6", "weight_decay=0.1"], ["momentum=0.5", "rho=0.1", "l1=1"]),
        ("adamp", ["delta=0.2", "decay_ratio=0.5", "betas=[0.8,0.9]"], ["momentum=0.5", "base=adamw"]),
        ("adagrad_norm", ["accumulator=1", "per_row=true", "delayed=true"], ["eps=1e-6", "betas=[0.8,0.9]"]),
        ("muon", ["momentum=0.9", "betas=[0.8,0.9]", "weight_decay=0"], ["rho=0.1", "delta=0.2"]),
        ("prox_sgd", ["l1=0.3", "regulariser=box", "lr=1"], ["l2=0.3", "lower=-1", "momentum=0.5"]),
        ("backtracking", ["lr=0.5"], ["momentum=0.5", "eps=1e-6", "betas=[0.8,0.9]"]),
        ("sam", ["rho=0.1", "momentum=0.5", "base=adamw"], ["betas=[0.8,0.9]", "average_start=0.5"]),
        ("swa", ["average_start=0.5", "average_interval_tokens=1k", "momentum=0"], ["rho=0.1", "eps=1e-6"]),
    ],
)
def test_settings_that_nobody_reads_are_no_part_of_the_id(optimizer: str, read: list[str], unread: list[str]):
    tree = compose_tree(f"optim={optimizer}")

    def id_with(*settings: str) -> str:
        changed = OmegaConf.merge(tree, OmegaConf.from_dotlist([f"optim.{setting}" for setting in settings]))
        composed = parse(OmegaConf.to_container(changed))  # type: ignore[arg-type]
        check(composed)
        return run_id(composed)

    known = id_with()
    assert all(id_with(setting) == known for setting in unread)
    assert all(id_with(setting) != known for setting in read)


@pytest.mark.parametrize(
    "overrides",
    [["optim=backtracking"], ["optim=swa", "optim.base=backtracking", "optim.clip=null"]],
    ids=" ".join,
)
def test_the_schedule_of_the_rate_is_no_part_of_the_id_where_the_rate_is_found(overrides: list[str]):
    found = run_id(config(*overrides))
    unread = ["lr=warmup_stable_decay", "lr.warmup_tokens=1k", "lr.min_ratio=0.5", "lr.cut_factor=2"]
    assert run_id(config(*overrides, *unread)) == found != run_id(config(*overrides, "optim.lr=0.3"))


def test_a_run_of_before_is_read():
    tree = compose_tree("optim=sgd")
    old = {**tree, "optim": {k: v for k, v in tree["optim"].items() if k not in LATER}}  # type: ignore[attr-defined]
    assert len(old["optim"]) == 7
    assert thawed(old) == config("optim=sgd")


DDP = ["parallel=ddp", "parallel.replicate=2"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.regulariser=l1"], "optim.regulariser=l1: optim=adamw has no proximal step. Use optim=prox_sgd"),
        (["optim=sam", "optim.regulariser=box"], "optim=sam has no proximal step"),
        (["optim=prox_sgd", "optim.regulariser=none"], "needs one. Use optim=sgd optim.momentum=0"),
        (["optim=prox_sgd", "optim.l1=-0.1"], "optim.l1=-0.1: must not be negative"),
        (["optim=prox_sgd", "optim.regulariser=box", "optim.lower=1", "optim.upper=1"], "optim.lower=1.0: must be"),
        (["optim=prox_sgd", "optim.regulariser=box", "optim.lower=null"], "a box needs at least one bound"),
        (["optim=prox_sgd", "optim.weight_decay=0.1"], "optim.weight_decay=0.1: optim=prox_sgd has no weight decay"),
        (
            ["optim=coda", "optim.weight_decay=0.1", "data=breast_cancer", "model=logistic", "model.loss=auc"],
            "optim.weight_decay=0.1: optim=coda has no weight decay. Use optim.weight_decay=0",
        ),
        (
            ["optim=adamw", "data=breast_cancer", "model=logistic", "model.loss=auc"],
            "optim.weight_decay=0.1: would also pull the saddle point's own parameters of model.loss=auc. Use "
            "optim.weight_decay=0",
        ),
        (["optim=prox_sgd", "optim.regulariser=simplex"], "this model has matrices. Use model=logistic model.loss"),
        (
            ["optim=prox_sgd", "optim.regulariser=simplex", "data=digits", "model=logistic"],
            "this model has matrices",
        ),
        (
            ["optim=prox_sgd", "optim.regulariser=simplex", "data=breast_cancer", "model=logistic",
             "model.loss=binary", "parallel=fsdp"],
            "parallel=fsdp: projecting on a simplex needs the whole vector on a rank. Use parallel=single",
        ),
        (["optim=backtracking", "optim.clip=1"], "optim.clip=1.0: backtracking tests the decrease"),
        (["optim=backtracking", "lr.batch_scaling=linear"], "is not defined for optim=backtracking, which has none"),
        (
            ["optim=backtracking", "data=breast_cancer", "model=logistic", "model.loss=auc"],
            "model.loss=auc: has a saddle point",
        ),
        (["optim=muon", "data=digits", "model=cnn"], "optim=muon model=cnn: it has no matrix between"),
        (["optim=muon", "data=digits", "model=logistic"], "Use optim=adamw, or model=mlp"),
        (["optim=sam", "optim.base=sdg"], "optim.base=sdg: one of adagrad, adagrad_norm, adam"),
        (["optim=swa", "optim.base=sam"], "optim.base=sam: one of adagrad"),
        (["optim=sam", "optim.base=backtracking"], "Use another optim.base, such as sgd"),
        (["optim=swa", "optim.base=backtracking"], "optim.clip=1.0: backtracking"),
        (["optim=swa", "optim.average_start=1"], "optim.average_start=1.0: must be at least 0 and below 1"),
        (
            ["optim=swa", "optim.average_interval_tokens=2k", "optim.average_restart_tokens=1k"],
            "shorter than optim.average_interval_tokens=2000, so that some means would be of nothing. Nearest: 2000",
        ),
        (
            ["optim=swa", "optim.average_interval_tokens=600k"],
            "longer than what is left of the budget from optim.average_start=0.75 on, so that there is no mean. "
            "Nearest: 499968",
        ),
        (["optim=adamp", "optim.decay_ratio=2"], "optim.decay_ratio=2.0: must lie between 0 and 1"),
        (["optim=sam", "sync=local_sgd", *DDP], "optim=sam sync=local_sgd: it evaluates one model of all ranks"),
        (["optim=swa", "sync=wagma", *DDP], "Use sync=allreduce or another optim"),
        (["optim=backtracking", "sync=dpsgd", *DDP], "optim=backtracking sync=dpsgd"),
    ],
)  # fmt: skip
def test_refuses_what_cannot_run(overrides: list[str], message: str):
    with pytest.raises(ConfigError) as refused:
        config(*overrides)
    assert message in str(refused.value)
