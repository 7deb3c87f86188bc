"""The critical batch: the rule on given losses, and branches of a real run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline import critical
from pipeline.branch import not_continued
from pipeline.critical import Branch, averaged, standard_error, verdict
from pipeline.store import RunDirectory
from tests.distributed import column, train_here
from tests.support import ROOT, config

TINY = [
    *["data.sequence_length=64", "batch.size=8", "budget.tokens=51200", "lr.warmup_tokens=5k"],
    *["eval.sequences=16", "checkpoint.interval_tokens=10k", "checkpoint.keep=10", "launch.cpus_per_task=1"],
]


def branches(*losses: float, noise: float = 0.0) -> list[Branch]:
    """Of three stretches with this loss at the end; `noise`: what the second one differs by from step to step."""
    return [
        Branch(2**i, 8 * 2**i, 50, (loss, loss + (noise if i else 0.0), loss))
        for i, loss in enumerate(losses)
    ]


@pytest.mark.parametrize(
    ("losses", "factor", "too_large"),
    [
        ((3.0, 3.005, 3.009, 3.2), 4, 8),
        ((3.0, 2.9, 2.905, 3.0), 4, 8),  # no worse than any smaller one, not only than the first
        ((3.0, 3.2, 2.9), 1, 2),  # the rule is for all k' < k: what comes after a failure does not count
        ((3.0, 2.99, 2.98), 4, None),
    ],
)
def test_largest_batch_that_no_smaller_one_beats(losses, factor, too_large):
    """Merrill et al. 2025, section 3: L_k ≤ L_k' + 0.01 for all k' < k."""
    found = verdict(branches(*losses))
    assert (found.factor, found.next_factor) == (factor, too_large)


def test_a_branch_that_diverged_is_worse_than_any():
    fine = branches(3.0, 2.9, 2.8)
    broken = [fine[0], critical.dataclasses.replace(fine[1], losses=()), fine[2]]
    found = verdict(broken)
    assert (found.factor, found.next_factor) == (1, 2)


def test_noise_of_the_difference_widens_the_tolerance():
    assert verdict(branches(3.0, 3.05)).factor == 1
    assert verdict(branches(3.0, 3.05, noise=0.3)).factor == 2


def test_what_the_data_do_to_all_branches_alike_is_no_noise():
    hard = (3.0, 4.0, 2.0, 3.5)
    pair = [Branch(1, 8, 4, hard), Branch(2, 16, 4, tuple(loss + 0.02 for loss in hard))]
    assert critical.difference(pair[1], pair[0]) == (pytest.approx(0.02), pytest.approx(0.0))
    assert verdict(pair).next_factor == 2


def test_the_average_and_its_standard_error():
    rng = np.random.default_rng(0)
    trend = np.linspace(3.0, 2.9, 60)
    ends, errors = [], []
    for _ in range(2000):
        losses = trend + rng.normal(scale=0.1, size=60)
        ends.append(averaged(list(losses)))
        errors.append(standard_error(list(losses)))
    assert np.mean(errors) == pytest.approx(np.std(ends), rel=0.05)
    weights = [0.5**59] + [0.5 ** (60 - i) for i in range(1, 60)]
    assert averaged(list(trend)) == pytest.approx(float(np.dot(weights, trend)))


@pytest.mark.parametrize("batch", [1, 2, 3, 6])
def test_losses_of_stretches_are_those_of_their_sequences(batch: int):
    """Sequence i has the loss i, whatever the batch; stretches of 6 after the first 12, the last one cut off."""
    steps = range(12, 32, batch)
    rows = [
        {"sequences": min(first + batch, 32), "train/loss": np.mean(range(first, min(first + batch, 32)))}
        for first in steps
    ]
    expected = [np.mean(range(first, first + 6)) for first in (12, 18, 24)]
    assert critical.stretches(rows, 12, 6) == pytest.approx(expected)


def test_a_branch_with_the_same_batch_is_the_run_itself(home: Path, small_corpus: list[str]):
    """Bit for bit: weights, moments, place in the stream and rate; and √k more of it for k times the batch."""
    parent = train_here(config(*TINY, *small_corpus))
    plan = critical.plan_branches(parent, 20480, 10240, (1, 4))
    same = train_here(plan.branch(1))
    expected = [row for row in parent.rows() if 20480 < row["tokens"] <= 30720 and "train/loss" in row]
    found = [row for row in same.rows() if "train/loss" in row]
    for name in ("tokens", "train/loss", "lr", "grad/norm", "step"):
        assert [row[name] for row in found] == [row[name] for row in expected], name
    larger = train_here(plan.branch(4))
    assert set(column(larger, "batch/size")) == {32}
    rates = {row["tokens"]: row["lr"] for row in larger.rows() if "train/loss" in row}
    between = [row["lr"] for row in expected if row["tokens"] in (20480 + 1024, 20480 + 1536)]
    assert rates[20480 + 2048] == pytest.approx(2 * np.mean(between), rel=1e-3)


def command(home: Path, parent: RunDirectory, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.critical", parent.id, *arguments],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_runs_branches_and_reports(home: Path, small_corpus: list[str]):
    parent = train_here(config(*TINY, *small_corpus))

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        return command(home, parent, "--factors", "1,2,4", *arguments)

    shown = ask("--at", "20480", "--tokens", "10240", "--launcher", "preview")
    assert shown.returncode == 0, shown.stderr
    assert "3 points" in shown.stdout
    done = ask("--at", "20480", "--tokens", "10240")
    assert done.returncode == 0, done.stderr
    assert "critical batch: " in done.stdout
    again = ask("--at", "20480", "--tokens", "10240", "--json")
    report = json.loads(again.stdout)
    assert [branch["batch"] for branch in report["branches"]] == [8, 16, 32]
    runs = [RunDirectory(path) for path in (home / "runs").iterdir() if path.name != parent.id]
    losses = {column(run, "batch/size")[0]: column(run, "train/loss") for run in runs}
    for branch in report["branches"]:  # stretches of 32 sequences
        each = 32 // branch["batch"]
        expected = np.array(losses[branch["batch"]]).reshape(-1, each).mean(axis=1)
        assert branch["losses"] == pytest.approx(expected.tolist())
        assert branch["loss"] == pytest.approx(averaged(list(expected)))
    place = home / "reports" / f"critical-{parent.id}-20480"
    assert (place / "critical.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((place / "critical.json").read_text()) == report
    # What it suggests is a schedule that can be run.
    (line,) = (line for line in done.stdout.splitlines() if "batch=critical" in line)
    suggested = [word.strip("'") for word in line.split() if "=" in word]
    config(*TINY, *small_corpus, *suggested)


# Without momentum it is w ← w − lr (…+ w): a rate above 2 multiplies w in every step.
QUADRATIC = [
    *["model=logistic", "data=digits", "model.l2=1", "optim=sgd", "optim.momentum=0", "optim.clip=null"],
    *["optim.lr=0.9", "lr.warmup_tokens=0", "lr.min_ratio=1", "data.micro_batch=4", "batch.size=4"],
    *["budget.tokens=5000", "eval.sequences=16", "checkpoint.interval_tokens=1000", "checkpoint.keep=9"],
]


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [("adamw", "√k × the rate"), ("sgd", "k × the rate"), ("adagrad_norm", "the same rate")],
)
def test_the_report_says_what_became_of_the_rate(optimizer: str, rate: str):
    composed = config(*TINY, f"optim={optimizer}")
    plan = critical.Plan(RunDirectory.of(composed), composed, 20480, 8, 0.1, 10240, (1, 2))
    ended = branches(3.0, 3.0)
    assert f" with k × the batch and {rate}\n" in critical._text(plan, ended, verdict(ended), Path())


def test_a_run_on_labelled_samples_has_branches_too(home: Path):
    parent = train_here(config(*QUADRATIC, "budget.tokens=1200"))
    shown = command(
        home, parent, "--at", "1000", "--tokens", "100", "--factors", "1,2", "--launcher", "preview"
    )
    assert shown.returncode == 0, shown.stderr
    assert "2 points" in shown.stdout


def test_the_parents_sweep_is_not_that_of_the_branches(home: Path, small_corpus: list[str]):
    of_sweep = ["sweep.zip=[[seed,optim.lr]]", "sweep.exclude=['batch.size>8']"]
    parent = train_here(config(*TINY, *small_corpus, *of_sweep, "budget.tokens=20480"))
    asked = ["--at", "10240", "--tokens", "6144", "--factors", "1,2", "--launcher", "preview"]
    shown = command(home, parent, *asked)
    assert shown.returncode == 0, shown.stderr
    assert "2 points" in shown.stdout and "left out" not in shown.stdout


def test_a_branch_that_diverges_is_too_large(home: Path):
    """Its run fails, for good: asked again it is not run again."""
    parent = train_here(config(*QUADRATIC))
    for _ in range(2):
        asked = command(home, parent, "--at", "2000", "--tokens", "2400", "--factors", "1,8", "--json")
        assert asked.returncode == 0, asked.stderr
        report = json.loads(asked.stdout)
        assert (report["critical_batch"], report["too_large"]) == (4, 32)
        assert [branch["diverged"] for branch in report["branches"]] == [False, True]
    shown = command(home, parent, "--at", "2000", "--tokens", "2400", "--factors", "1,8")
    assert re.search(r"8 +32 +\d+ diverged +← too large", shown.stdout)
    attempts = [RunDirectory(path).newest_attempt() for path in (home / "runs").iterdir()]
    assert max(attempts) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((12345, None, (1, 2)), "has checkpoints to branch from at these tokens: 10240, 20480"),
        ((40448, 20480, (1, 2)), "has 10752 tokens left after 40448"),
        (
            (20480, 2048, (1, 2, 4)),
            "less than 3 steps of the largest batch (4 × 8 sequences × 64 = 2048 tokens)",
        ),
    ],
)
def test_refusals(arguments, message: str, home: Path, small_corpus: list[str], finished: RunDirectory):
    with pytest.raises(critical.ConfigError) as refused:
        critical.plan_branches(finished, *arguments)
    assert message in str(refused.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small_corpus: list[str]) -> RunDirectory:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRESCENDO_HOME", str(home))
        patch.setenv("WANDB_MODE", "disabled")
        return train_here(config(*TINY, *small_corpus))


def test_a_branch_without_its_parents_checkpoint(home: Path, small_corpus: list[str], finished: RunDirectory):
    plan = critical.plan_branches(finished, 20480, 10240, (1, 2))
    branch = plan.branch(1)
    lost = critical.dataclasses.replace(
        branch, branch=critical.dataclasses.replace(branch.branch, tokens=12800)
    )
    lost = critical.dataclasses.replace(
        lost, branch=critical.dataclasses.replace(lost.branch, run=str(finished.path))
    )
    with pytest.raises(
        critical.ConfigError, match=r"branch.tokens=12800: run .* has no checkpoint there; it has"
    ):
        train_here(lost)


def test_a_branch_keeps_the_stream_but_not_the_settings_of_its_parents_optimizer(
    home: Path, small_corpus: list[str], finished: RunDirectory
):
    plan = critical.plan_branches(finished, 20480, 10240, (1, 2))
    (home / "runs").mkdir()
    (home / "runs" / finished.id).symlink_to(finished.path)
    replace = critical.dataclasses.replace
    branch = plan.branch(1)
    branch = replace(branch, branch=replace(branch.branch, run=finished.id))
    longer = replace(branch, data=replace(branch.data, sequence_length=128))
    with pytest.raises(
        critical.ConfigError, match=r"cannot be continued with data.sequence_length=128 \(there 64"
    ):
        train_here(longer)
    drifting = replace(finished.config(), sync=replace(branch.sync, method="local_sgd"))
    assert not_continued(branch, drifting) == ["sync.method=allreduce (there local_sgd)"]
    same = column(train_here(branch), "train/loss")
    decayed = replace(branch, optim=replace(branch.optim, weight_decay=20.0))
    assert column(train_here(decayed), "train/loss")[-2] != pytest.approx(same[-2], rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["branch.run=abc"], "a branch needs both"),
        (["branch.tokens=1M"], "a branch needs both"),
        (["budget.stop_tokens=3M"], "beyond budget.tokens=2000000"),
    ],
)
def test_settings_of_a_branch(overrides: list[str], message: str):
    with pytest.raises(critical.ConfigError, match=message):
        config(*overrides)
