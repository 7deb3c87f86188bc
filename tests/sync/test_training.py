"""Replicas under the trainer: against one model where both must agree, resumed, stopped and killed."""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import checkpoint
from pipeline.batch._interface import Needs
from pipeline.config import Config, ConfigError
from pipeline.data import Stream, prepare
from pipeline.gradients.capture import capture_for
from pipeline.imbalance import Imbalance
from pipeline.store import RunDirectory
from pipeline.sync._agreement import SKETCH_COLUMNS, Sketch, consensus_distance
from tests.distributed import column, gloo_ranks, ranks_of, train_here, train_rank
from tests.support import config
from tests.training.test_worker import assert_nothing_torn, frozen, processes_of, start, wait_for_step

# 40 steps of 16 sequences of 32 tokens
TINY = [
    *("data.sequence_length=32", "data.micro_batch=2", "batch.size=16", "budget.tokens=20480"),
    *("lr.warmup_tokens=2k", "eval.sequences=16", "model.layers=1", "parallel=ddp", "parallel.replicate=4"),
]
PLAIN = ["optim=sgd", "optim.momentum=0", "optim.clip=null"]  # then the mean of models is one of gradients
STEP_TOKENS = 16 * 32


@pytest.mark.slow
@pytest.mark.parametrize(
    "sync",
    [
        ["sync=local_sgd", "sync.period=1"],
        ["sync=local_sgd", "sync.period=10", "sync.warm_steps=40"],
        ["sync=wagma", "sync.period=1", "sync.group_size=4"],
        ["sync=wagma", "sync.period=1", "sync.group_size=2"],
    ],
    ids=" ".join,
)
def test_averaging_all_models_in_every_step_is_allreduce(
    sync: list[str], home: Path, small_corpus: list[str]
):
    one = train_here(config(*TINY, *PLAIN, *small_corpus))
    many = train_here(config(*TINY, *PLAIN, *small_corpus, *sync, "sync.consensus=true"))
    for name in ("step", "tokens", "lr", "batch/size"):
        assert column(many, name) == column(one, name)
    assert column(many, "train/loss") == pytest.approx(column(one, "train/loss"), rel=1e-5)
    assert column(many, "val/loss") == pytest.approx(column(one, "val/loss"), rel=1e-5)
    assert column(many, "sync/consensus") == [0.0] * 40


@pytest.mark.slow
def test_local_sgd_is_a_loop_written_by_hand(home: Path, small_corpus: list[str]):
    """Four models, trained one after the other in this process."""
    from pipeline.model.init import initialise
    from pipeline.model.llama import Llama, loss_sum

    composed = config(*TINY, *PLAIN, *small_corpus, "sync=local_sgd", "sync.period=5", "lr.warmup_tokens=0")
    run = train_here(composed)
    stream = Stream(prepare(composed.data, home / "corpora").train, 32, composed.data.seed)
    models = [Llama(composed.model) for _ in range(4)]
    losses = []
    for model in models:
        initialise(model, composed.seed)
    for step in range(12):
        loss = 0.0
        for rank, model in enumerate(models):
            places = [16 * step + 8 * unit + 2 * rank for unit in range(2)]
            tokens = torch.from_numpy(np.concatenate([stream.read(place, 2) for place in places]))
            share = loss_sum(model(tokens[:, :-1]), tokens[:, 1:]) / (4 * 32)
            model.zero_grad()
            share.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= column(run, "lr")[step] * parameter.grad
            loss += share.item() / 4
        losses.append(loss)
        if (step + 1) % 5 == 0:
            with torch.no_grad():
                for same in zip(*(model.parameters() for model in models), strict=True):
                    mean = sum(same) / 4
                    for parameter in same:
                        parameter.copy_(mean)
    assert column(run, "train/loss")[:12] == pytest.approx(losses, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("saved_at", [13, 20], ids=["in the middle of a period", "at a synchronisation"])
def test_local_sgd_resumed_equals_uninterrupted(saved_at: int, home: Path, small_corpus: list[str]):
    """Bit for bit: every replica has its own weights and moments back."""
    composed = config(
        *(*TINY, *small_corpus, "sync=local_sgd", "sync.period=10", "sync.consensus=true"),
        *(
            f"checkpoint.interval_tokens={saved_at * STEP_TOKENS}",
            "checkpoint.keep=9",
            "eval.interval_tokens=5k",
        ),
    )
    run = train_here(composed)
    whole = {name: column(run, name) for name in ("train/loss", "val/loss", "grad/norm", "sync/consensus")}
    assert max(whole["sync/consensus"]) > 0
    for path in run.complete_checkpoints():
        if path.name > f"step-{saved_at:08d}":
            shutil.rmtree(path)
    train_here(composed, attempt=2)
    for name, values in whole.items():
        assert column(run, name) == values, name
    assert min(row["step"] for row in run.rows() if row["attempt"] == 2) == saved_at + 1


def test_what_an_export_reads_is_the_mean_of_the_replicas(home: Path, small_corpus: list[str]):
    run = train_here(config(*TINY, *small_corpus, "sync=local_sgd", "sync.period=100"))
    mean = checkpoint.load_weights(run)
    (path,) = run.complete_checkpoints()
    saved = torch.distributed.checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata
    replicas = []
    for rank in range(4):
        own = {name: torch.empty(saved[f"replica-{rank}.model.{name}"].size) for name in mean}
        torch.distributed.checkpoint.load(
            {f"replica-{rank}": {"model": own}}, checkpoint_id=path, no_dist=True
        )
        replicas.append(own)
    assert not torch.equal(replicas[0]["head.weight"], replicas[1]["head.weight"])
    for name, weight in mean.items():
        torch.testing.assert_close(weight, torch.stack([own[name] for own in replicas]).mean(0))


def test_what_is_evaluated_in_the_middle_of_a_period_is_the_mean_of_the_replicas(
    home: Path, small_corpus: list[str]
):
    from pipeline.model.llama import Llama, loss_sum

    composed = config(*TINY, *small_corpus, "sync=local_sgd", "sync.period=100", "optim.lr=2e-2")
    run = train_here(composed)
    model = Llama(composed.model)
    model.load_state_dict(checkpoint.load_weights(run))
    stream = Stream(prepare(composed.data, home / "corpora").validation, 32, seed=0)
    tokens = torch.from_numpy(stream.read(0, 16))
    with torch.no_grad():
        loss = loss_sum(model(tokens[:, :-1]), tokens[:, 1:]).item() / (16 * 32)
    assert column(run, "val/loss") == pytest.approx([loss], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["local_sgd", "wagma", "sgp", "eager_sgd"])
def test_a_replica_that_fails_where_all_meet_ends_all_at_once(sync: str, home: Path, small_corpus: list[str]):
    """In the last step, after which nobody would come to a meeting."""
    composed = config(*TINY, *small_corpus, f"sync={sync}")
    # The first to end is rank 2 itself or one whose connection to it closes (or is reset) in its hands.
    with pytest.raises(Exception, match=r"step 40: training loss nan|(closed|reset) by peer"):
        gloo_ranks(4, rank_2_fails, composed, str(RunDirectory.of(composed).path), timeout_s=60)


def rank_2_fails(rank: int, composed: Config, path: str) -> None:
    import pipeline.train

    class Poisoned(pipeline.train.Trainer):
        def _backward(self, *arguments: Any) -> torch.Tensor:
            loss = super()._backward(*arguments)
            return loss * math.nan if rank == 2 and self.progress.step == 39 else loss

    pipeline.train.Trainer = Poisoned
    train_rank(rank, composed, path)


def test_another_number_of_replicas_is_refused(home: Path, small_corpus: list[str]):
    settings = [*TINY, *small_corpus, "sync=local_sgd", "parallel.replicate=2", "budget.stop_tokens=5k"]
    run = train_here(config(*settings))
    other = config(*settings, "parallel.replicate=4", "budget.stop_tokens=null")
    shutil.copytree(run.path, RunDirectory.of(other).path)
    with pytest.raises(Exception, match=r"sync\.replicas is 2 there and 4 here"):
        train_here(other, attempt=2)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["0", "2"])
def test_a_rank_that_dies_ends_the_run_everywhere(victim: str, home: Path, small_corpus: list[str]):
    """Rank 0 has the store that the communication threads listen to. The same command finishes the run, from a
    checkpoint in the middle of a period."""
    composed = config(
        *(*TINY, *small_corpus, "sync=wagma", "sync.period=16", "budget.tokens=100k"),
        f"checkpoint.interval_tokens={13 * STEP_TOKENS}",
    )
    run = frozen(composed)
    worker = start(run)
    wait_for_step(run, 50)
    (pid,) = [pid for pid, rank in processes_of(run).items() if rank == victim]
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    output, _ = worker.communicate(timeout=60)
    assert time.monotonic() - killed < 60 and worker.returncode == 1, output
    assert run.status().state == "FAILED"
    assert f"rank {victim} was killed by SIGKILL" in run.status().error
    assert processes_of(run) == {}
    assert_nothing_torn(run)
    again = start(run)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert (run.status().state, run.status().attempt) == ("DONE", 2)
    assert column(run, "step") == sorted(column(run, "step"))
    trained = [row for row in run.rows() if "train/loss" in row]
    assert [row["step"] for row in trained] == list(range(1, trained[-1]["step"] + 1))
    assert max(column(run, "sync/staleness_max")) <= 16


@pytest.mark.slow
def test_a_stop_is_agreed_on_and_saved(home: Path, small_corpus: list[str]):
    run = frozen(config(*TINY, *small_corpus, "sync=wagma", "budget.tokens=2M"))
    worker = start(run)
    wait_for_step(run, 30)
    worker.terminate()
    output, _ = worker.communicate(timeout=60)
    assert run.status().state == "CANCELLED", output
    (path,) = run.complete_checkpoints()
    assert path.name == f"step-{run.last_row()['step']:08d}"


def test_statistics_are_of_the_replicas_gradients_when_they_meet(home: Path, small_corpus: list[str]):
    """The test decides every ten steps, and the batch grows alike on all ranks."""
    run = train_here(
        config(
            *(*TINY, *small_corpus, "sync=local_sgd", "sync.period=5", "budget.tokens=100k"),
            *("batch=norm_test", "batch.estimator=worker", "batch.interval=10", "batch.max_size=64"),
            *("batch.eta=0.2", "batch.ema=0"),
        )
    )
    tested = [row["step"] for row in run.rows() if "stat/variance" in row]
    assert tested and all(step % 10 == 0 for step in tested)
    assert column(run, "batch/size")[0] == 16 and max(column(run, "batch/size")) > 16


def gram_of_rank(rank: int, composed: Config) -> tuple[np.ndarray, np.ndarray]:
    ranks = ranks_of(composed, rank)
    model = torch.nn.Linear(700, 3)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(rank))
    capture = capture_for(Needs("worker"), model, torch.optim.SGD(model.parameters()), ranks)
    capture.start_step([2] * 8)
    statistics = capture.statistics(ranks.sum(capture.sums()), None)
    assert statistics.workers
    own = torch.cat([parameter.grad.view(-1) for parameter in model.parameters()]).double().numpy()
    return own, np.array([*statistics.workers.gram.flat, statistics.mean_sq_norm, statistics.variance])


def test_statistics_of_replicas_recomputed():
    """σ² = b/(M − 1) Σ ‖g_m − ḡ‖² of Lau et al. 2024 (arXiv 2406.13936), b sequences on each of M workers."""
    results = gloo_ranks(4, gram_of_rank, config(*TINY))
    gradients = np.stack([own for own, _ in results])
    mean = gradients.mean(0)
    variance = 4 / 3 * np.square(gradients - mean).sum()
    for _, found in results:
        np.testing.assert_allclose(found, [*(gradients @ gradients.T).flat, mean @ mean, variance], rtol=1e-5)


def test_consensus_distance_from_sketches():
    """Within a few standard errors of the distance itself, which is 1e-6 of the weights."""
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(100_003, generator=generator)
    replicas = [common + 1e-3 * torch.randn(len(common), generator=generator) for _ in range(8)]
    mean = torch.stack(replicas).double().mean(0)
    exact = np.mean([((own - mean) ** 2).sum() for own in replicas]) / (mean**2).sum().item()
    sketch = Sketch(len(common), torch.device("cpu"))
    told = [sketch(own) for own in replicas]
    report = {name: np.array([values[name] for values in told]) for name in told[0]}
    error = 2 * np.sqrt(2 / SKETCH_COLUMNS)  # of numerator and denominator
    assert consensus_distance(report) == pytest.approx(exact, rel=3 * error)


def test_each_rank_reads_a_part_of_the_corpus_of_its_own(home: Path, small_corpus: list[str]):
    """Four ranks, four quarters; each reads every sequence of its own before any again."""
    composed = config(*TINY, *small_corpus, "data.distribution=by_rank")
    corpus = prepare(composed.data, home / "corpora").train
    size = len(corpus) // 4
    parts = gloo_ranks(4, read_by_rank, composed, str(RunDirectory.of(composed).path), size // 32 // 4)
    for rank, (places, read) in enumerate(parts):
        assert places == list(range(len(places))) and len(places) >= size // 32 - 4
        part = corpus[rank * size : (rank + 1) * size + 4].tobytes()
        assert all(sequence.astype(corpus.dtype).tobytes() in part for sequence in read)


def read_by_rank(rank: int, composed: Config, path: str, steps: int) -> tuple[list[int], np.ndarray]:
    """The places of its stream that a rank reads in so many steps, and what is in the first four."""
    from pipeline.train import Trainer

    trainer = Trainer(composed, RunDirectory(path), 1, ranks_of(composed, rank))
    units = [unit for step in range(steps) for unit in trainer.units.of_shares(16 * step, 16, (rank,))]
    places = [trainer.units.place(start) + index for start, count in units for index in range(count)]
    read = trainer.data.take(0, 4)
    trainer.close(0)
    return places, read


def test_delays_are_those_of_the_seed():
    settings = config(*TINY, "imbalance=delay", "imbalance.delay_ms=320", "imbalance.compute_ms=10").imbalance
    ranks = [Imbalance(settings, rank, 4) for rank in range(4)]
    seconds = np.array([[rank.seconds(step) for rank in ranks] for step in range(1, 201)])
    assert ((seconds > 0.3).sum(axis=1) == 2).all()  # two random ranks in every step
    assert set(np.round(np.unique(seconds), 3)) == {0.01, 0.33}
    assert (seconds > 0.3).sum(axis=0).min() > 60  # and all come in turn
    lognormal = config(*TINY, "imbalance=lognormal", "imbalance.delay_ms=50", "imbalance.sigma=0.5").imbalance
    drawn = np.array([Imbalance(lognormal, 1, 4).seconds(step) for step in range(4000)])
    assert np.median(drawn) == pytest.approx(0.05, rel=0.05)
    assert np.log(drawn).std() == pytest.approx(0.5, rel=0.05)


@pytest.mark.slow
def test_variable_length_trains_on_a_part_of_each_sequence(home: Path, small_corpus: list[str]):
    overrides = ["imbalance=variable_length", "imbalance.min_share=0.25"]
    settings = config(*TINY, *overrides).imbalance
    lengths = [Imbalance(settings, 3, 4).length(step, 32, 0) for step in range(500)]
    assert min(lengths) == 8 and max(lengths) == 32 and np.mean(lengths) == pytest.approx(20, abs=1)
    run = train_here(config(*TINY, *small_corpus, *overrides, "sync=local_sgd"))
    assert column(run, "tokens")[-1] == 20480
    assert column(run, "train/loss")[-1] < column(run, "train/loss")[0] - 0.5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["sync=local_sgd", "parallel.strategy=fsdp", "parallel.shard=4", "parallel.replicate=1"],
            "Use parallel=ddp and a parallel.replicate of at least 2",
        ),
        (["sync.method=wagm"], r"sync.method=wagm: one of .*Did you mean wagma"),
        (["sync=local_sgd", "batch=norm_test", "batch.max_size=64"], "Use batch.estimator=worker"),
        (
            [
                "sync=wagma",
                "batch=norm_test",
                "batch.max_size=64",
                "batch.estimator=worker",
                "batch.interval=12",
            ],
            "Nearest batch.interval: 10",
        ),
        (["sync=local_sgd", "lr.batch_scaling=adascale"], "needs gradients compared in every step"),
        (
            ["sync=local_sgd", "branch.run=0123456789", "branch.tokens=1k"],
            "only one model can be branched off",
        ),
        (["sync=local_sgd", "batch=critical"], "measured"),
        (
            ["sync=local_sgd", "batch=inner_product", "batch.max_size=64", "batch.theta=1", "batch.nu=1"],
            "batch.direction=in_sample",
        ),
        (["sync=wagma", "parallel.strategy=fsdp", "parallel.shard=6", "parallel.replicate=1"], "at least 2"),
        (["sync=local_sgd", "batch.schedule=nix"], "batch.schedule=nix: one of"),
        (["sync=local_sgd", "sync.warm_steps=-1"], "must not be negative"),
        (["imbalance=delay", "imbalance.ranks=9"], "Nearest: 4"),
        (["imbalance=variable_length", "imbalance.min_share=1.5"], "at most 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_together_is_refused(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        config(*TINY, *overrides)
