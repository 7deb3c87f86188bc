"""Adaptive periodic parameter averaging: local SGD whose period follows the variance of the replicas (Jiang
and Agrawal 2020, arXiv 2007.06134).

At a synchronisation k, before it averages the P models, their variance is

    S_k = 1/P Σ_i ‖w̄ − w_i‖²,

which the paper wants in proportion to the learning rate γ_k. In the first `sync.sample_steps` steps the
period p stays `sync.period` and the mean of S_k/γ_k gives the factor C₂. From then on

    p ← p + 1 if S_k < 0.7 γ_k C₂,    p ← p − 1 (at least 1) if S_k > 1.3 γ_k C₂.

S_k is a sum over all ranks, the same bits on each, so all take the same p.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.sync import _interface

if TYPE_CHECKING:
    import torch

    from pipeline.config import Config
    from pipeline.parallel._ranks import Ranks
    from pipeline.sync._replica import Replica


class Method(_interface.Method):
    settings = frozenset(["period", "sample_steps"])

    @staticmethod
    def check(config: Config) -> list[str]:
        period, sample_steps = config.sync.period, config.sync.sample_steps
        if sample_steps >= period:
            return []
        return [
            f"sync.sample_steps={sample_steps}: ends before the first synchronisation, after "
            f"sync.period={period} steps. Nearest sync.sample_steps: {period}"
        ]

    def __init__(self, config: Config, ranks: Ranks, replica: Replica) -> None:
        super().__init__(config, ranks, replica)
        self._period = self._next = self.config.period  # steps; the step of the next synchronisation
        self._factor, self._samples = 0.0, 0  # C₂, and the synchronisations that it is the mean of
        self._variance = 0.0  # S of the last synchronisation
        self._rate = 0.0

    def before_step(self, step: int, rate: float) -> None:
        self._rate = rate

    def after_step(self, step: int) -> None:
        if step < self._next:
            return
        own = self.replica.weights()
        mean = self.replica.averaged(own.clone())
        self.replica.set_weights(mean)
        distance = own.sub_(mean).double().square().sum()
        self._variance = self.replica.averaged(distance).item()
        if step <= self.config.sample_steps:
            self._samples += 1
            self._factor += (self._variance / self._rate - self._factor) / self._samples
        else:
            self._period = adapted(self._period, self._variance, self._rate * self._factor)
        self._next = step + self._period

    def observed(self) -> Mapping[str, float]:
        return {"period": self._period, "variance": self._variance}

    def state(self) -> Mapping[str, torch.Tensor]:
        import torch

        numbers = [self._period, self._next, self._factor, self._samples, self._variance]
        return {"adaptive": torch.tensor(numbers, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        period, following, self._factor, samples, self._variance = state["adaptive"].tolist()
        self._period, self._next, self._samples = int(period), int(following), int(samples)


def adapted(period: int, variance: float, wanted: float) -> int:
    """The next period, of replicas whose variance was to be `wanted`."""
    if variance < 0.7 * wanted:
        return period + 1
    if variance > 1.3 * wanted:
        return max(1, period - 1)
    return period
