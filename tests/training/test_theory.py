"""What the papers of the batch tests prove or claim, in real runs on problems whose answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.statistics import estimate
from pipeline import checkpoint
from pipeline.store import RunDirectory
from tests.distributed import column, train_here
from tests.support import config

pytest.importorskip("sklearn")

# Sampled gradients at a constant rate, tests as they are written: of this step's samples, without averages and guards.
PLAIN = [
    "optim=sgd", "optim.momentum=0", "optim.clip=null", "lr.warmup_tokens=0", "lr.min_ratio=1", "batch.ema=0",
    "batch.growth_cap=1e6", "batch.estimator=sample", "batch.direction=in_sample", "track.exact_gradient=true",
    "eval.sequences=16",
]  # fmt: skip


def trained(*overrides: str) -> RunDirectory:
    """A run by these settings."""
    return train_here(config(*PLAIN, *overrides))


def evaluated(run: RunDirectory, name: str) -> list[tuple[int, float, float]]:
    """(step, epochs, value) at evaluations."""
    return [(row["step"], row["epochs"], row[name]) for row in run.rows() if name in row]


# --- linear convergence ----------------------------------------------------------------------------------------

# 5,000 samples to train on; L ≤ 0.25 λmax + l2 ≈ 0.4 and μ ≥ l2 = 0.1.
RATE, FIRST = 2.0, 16
STRONGLY_CONVEX = [
    "model=logistic", "model.loss=binary", "model.l2=0.1", "data=synthetic_logistic", "data.samples=6250",
    f"optim.lr={RATE}", f"data.micro_batch={FIRST}",
]  # fmt: skip


@pytest.mark.slow
def test_a_growing_batch_converges_linearly_and_a_constant_one_does_not(home: Path):
    """F − F* falls by a factor in every step (Byrd et al. 2012, Bollapragada et al. 2018) under the norm test,
    until the batch is a third of all samples. With a constant batch it stops where noise and contraction
    balance: near the optimum, to first order in the rate α, at α tr Σ/(4 b), and at most 2/(2 − αL) times that."""
    factors, floors, falls = [], [], []
    for seed in range(3):
        adaptive = trained(*STRONGLY_CONVEX, "batch=norm_test", "batch.eta=0.9", f"batch.size={FIRST}",
                           "batch.max_size=4992", "budget.tokens=20k", "eval.interval_tokens=1", f"seed={seed}")  # fmt: skip
        sizes = np.array(column(adaptive, "batch/size"))
        gaps = np.array(column(adaptive, "exact/gap"))[: int((sizes < 1700).argmin())]
        assert sizes[0] == FIRST and len(gaps) >= 15
        slope = np.polyfit(np.arange(len(gaps)), np.log(gaps), 1)[0]
        factors.append(float(np.exp(slope)))

        constant = trained(*STRONGLY_CONVEX, "batch=constant", f"batch.size={FIRST}", "budget.tokens=8000",
                           "eval.interval_tokens=400", f"seed={seed}")  # fmt: skip
        late = np.array(column(constant, "exact/gap"))[4:]
        variance = column(constant, "exact/variance")[-1]
        floors.append(float(late.mean()) / (RATE * variance / (4 * FIRST)))
        falls.append(float(np.polyfit(np.arange(len(late)), np.log(late), 1)[0] * len(late)))
        assert gaps[-1] < late.mean() / 10
    factor = estimate(factors)
    assert factor and factor.high
    assert factor.high < 0.97
    floor, fall = estimate(floors), estimate(falls)
    assert floor and floor.low and floor.high and floor.low < 2 and floor.high > 1
    assert fall and fall.low is not None and fall.high is not None and fall.low < 0 < fall.high


# --- what a test costs -----------------------------------------------------------------------------------------

TUMOURS = [
    "model=logistic", "model.loss=binary", "model.l2=2.2e-3", "data=breast_cancer", "optim.lr=0.3",
    "data.micro_batch=4", "batch.size=4", "batch.max_size=452", "budget.tokens=4550", "eval.interval_tokens=91",
]  # fmt: skip
DIGITS = [
    "model=logistic", "model.l2=7e-4", "data=digits", "optim.lr=1", "data.micro_batch=8", "batch.size=8",
    "batch.max_size=1432", "budget.tokens=4314", "eval.interval_tokens=288",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("problem", [TUMOURS, DIGITS], ids=["breast_cancer", "digits"])
def test_the_inner_product_test_needs_fewer_gradients_than_the_norm_test(problem: list[str], home: Path):
    """Bollapragada et al. 2018, θ 0.9 for both and ν 5.84: to the gap that the norm test ends with."""
    for seed in range(3):
        norm = trained(*problem, "batch=norm_test", "batch.eta=0.9", f"seed={seed}")
        inner = trained(*problem, "batch=inner_product", "batch.theta=0.9", "batch.nu=5.84", f"seed={seed}")
        *_, (_, epochs, level) = evaluated(norm, "exact/gap")
        sooner = [at for _, at, gap in evaluated(inner, "exact/gap") if gap <= level]
        assert sooner and sooner[0] < epochs / 2


def test_the_norm_test_and_the_best_split_choose_the_same_batches(home: Path):
    """Espath et al. 2021: with θ² : ν² = σ∥² : σ⊥² in every step; and any other split of ε² asks for no less."""
    epsilon = 1.0
    short = [*DIGITS, "budget.tokens=3000", "eval.interval_tokens=null", "track.exact_gradient=false"]
    norm = trained(*short, "batch=norm_test", f"batch.eta={epsilon}")
    split = trained(*short, "batch=inner_product", "batch.theta=null", "batch.nu=null",
                    f"batch.epsilon={epsilon}")  # fmt: skip
    sizes = column(norm, "batch/size")
    assert column(split, "batch/size") == sizes and len(set(sizes)) > 5
    theirs = checkpoint.load_weights(split)
    assert all(torch.equal(weight, theirs[name]) for name, weight in checkpoint.load_weights(norm).items())

    demanded = np.array(column(norm, "test/statistic"))
    tested = np.array(sizes[: len(demanded)])
    along, across = np.array(column(split, "test/theta_eff")), np.array(column(split, "test/nu_eff"))
    whole = np.hypot(along, across)

    def asked(theta: np.ndarray | float, nu: np.ndarray | float) -> np.ndarray:
        """By both tests, of a batch that would just pass with θ_eff and ν_eff."""
        return tested * np.maximum((along / theta) ** 2, (across / nu) ** 2)

    np.testing.assert_allclose(asked(epsilon * along / whole, epsilon * across / whole), demanded, rtol=1e-6)
    for share in (0.01, 0.1, 0.5, 0.9):
        other = asked(epsilon * share**0.5, epsilon * (1 - share) ** 0.5)
        assert (other >= demanded * (1 - 1e-9)).all() and other.mean() > 1.01 * demanded.mean()


# --- adaptive rates --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_adagrad_norm_with_a_growing_batch_comes_nearer_to_stationarity(home: Path):
    """AdAdaGradNorm (Lau, Liu, Kolar 2024): at equal samples, than with the batch that it began with. On labels
    with noise: where the samples can be fitted, noise vanishes with the gradient, and many small steps do better."""
    problem = [*STRONGLY_CONVEX, "optim=adagrad_norm", "optim.lr=4", "batch.size=16", "budget.tokens=20k",
               "eval.interval_tokens=5k"]  # fmt: skip
    for seed in range(3):
        constant = trained(*problem, "batch=constant", f"seed={seed}")
        growing = ["batch=norm_test", "batch.eta=0.9", "batch.max_size=4992"]
        grown = trained(*problem, *growing, f"seed={seed}")
        its = {epochs: norm for _, epochs, norm in evaluated(constant, "exact/grad_norm")}
        last = max(its)
        ours = [(epochs, norm) for _, epochs, norm in evaluated(grown, "exact/grad_norm") if epochs <= last]
        assert ours[-1][1] < its[last] / 3 and ours[-1][0] > 3
