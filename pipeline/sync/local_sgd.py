"""Local SGD: replicas train alone and average their models every `sync.period` steps (Stich 2019, arXiv
1805.09767). With `sync.warm_steps` they average gradients in so many first steps: post-local SGD (Lin et
al. 2020, arXiv 1808.07217)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.sync import _interface

if TYPE_CHECKING:
    from pipeline.config import Config


class Method(_interface.Method):
    settings = frozenset(["period", "warm_steps"])
    tests_batches = True

    @staticmethod
    def check(config: Config) -> list[str]:
        return _interface.check_period(config)

    def before_step(self, step: int, rate: float) -> None:
        if step <= self.config.warm_steps:
            self.replica.set_gradient(self.replica.averaged(self.replica.gradient()))

    def after_step(self, step: int) -> None:
        if step > self.config.warm_steps and step % self.config.period == 0:
            self.replica.set_weights(self.replica.averaged(self.replica.weights()))
