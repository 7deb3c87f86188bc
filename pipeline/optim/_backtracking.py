"""Backtracking as a torch optimizer; apart from backtracking.py, which must not import torch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.optim._evaluation import Evaluating, Evaluation

GROWTH = 1.5  # of L, at each trial that fails
# Losses are sums in float32, whose rounding hides a decrease below this share of the loss.
ROUNDING = 1e-6
MOST_TRIALS = 60  # of one step; L is 10¹⁰ times as large then, and the step is none


class Backtracking(Evaluating):
    """x ← x − g/L with the first L of L₀, 1.5 L₀, … for which F_S(x − g/L) ≤ F_S(x) − ‖g‖²/(2L), on the
    step's own samples S. That is the descent lemma, and any L above the Lipschitz constant of ∇F_S passes.

    Each step begins with L₀ = L/ζ, ζ = max(1, 2/a), where a = tr Σ/(|S| ‖g‖²) + 1 grows with the noise of g:
    L may halve in a step without noise and stays where noise is as large as the gradient. Every step but the
    last is measured for that: as the batch tests measure it where there are some, else from single samples
    where a rank can see them, else from micro-batches, so that L under fsdp is not that under ddp. Where it
    cannot be told, as from one micro-batch, it counts as 0, and the test on S alone bounds the step.
    (The rule for L₀ and the factor 1.5 are quoted from memory: of the paper only the abstract was at hand.)
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        for parameter in self.parameters():  # a copy each, as a state that every mesh can read
            self.state[parameter]["lipschitz"] = torch.tensor(1 / lr)

    @torch.no_grad()
    def step(self, closure: Evaluation | None = None) -> None:
        assert closure
        weights, gradients = self.weights(), self.gradients()
        constants = [self.state[parameter]["lipschitz"] for parameter in self.parameters()]
        before = [weight.clone() for weight in weights]
        torch._foreach_div_(constants, shrinkage(closure))
        for _ in range(MOST_TRIALS):
            rate = 1 / constants[0].item()
            torch._foreach_copy_(weights, before)
            torch._foreach_add_(weights, gradients, alpha=-rate)
            bound = closure.loss - rate / 2 * closure.squared_norm
            if closure.loss_again() <= bound + ROUNDING * abs(closure.loss):
                break
            torch._foreach_mul_(constants, GROWTH)
        for group in self.param_groups:
            group["lr"] = rate


def shrinkage(evaluation: Evaluation) -> float:
    """ζ, from 1 (noise, or no gradient, with which any L passes) to 2 (no noise seen). An unbiased variance
    may come out negative."""
    signal = evaluation.samples * evaluation.squared_norm
    if signal == 0:
        return 1.0
    noise = max(evaluation.variance or 0.0, 0.0)
    return max(1.0, 2 / (noise / signal + 1))
