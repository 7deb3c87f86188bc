"""Uneven speed of ranks, made to measure: the same for every method, whatever the machine.

A delayed rank sleeps before the first forward pass of a step. Under `variable_length` ranks have more or less
to compute, as with sentences of natural length: each trains on the first tokens of its sequences, so many as
the step and its share of the batch decide.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from pipeline.config import ImbalanceConfig


class Imbalance:
    """Delays of one rank among `ranks`."""

    def __init__(self, config: ImbalanceConfig, rank: int, ranks: int) -> None:
        self.config, self.rank, self.ranks = config, rank, ranks

    def sleep(self, step: int, shares: int = 1) -> None:
        if (seconds := self.seconds(step, shares)) > 0:
            time.sleep(seconds)

    def length(self, step: int, sequence_length: int, share: int) -> int:
        """Tokens to train on of each sequence of a data-parallel share in this step, whoever computes it."""
        if self.config.kind != "variable_length":
            return sequence_length
        parts = self._random(step).uniform(self.config.min_share, 1, self.ranks)
        return max(1, round(float(parts[share]) * sequence_length))

    def seconds(self, step: int, shares: int = 1) -> float:
        """How long this rank sleeps in this step, if it computes so many shares of the batch."""
        late_s = 0.0
        if self.config.kind in ("delay", "lognormal"):
            late_s = float(self.delays_s(step)[self.rank])
        return shares * self.config.compute_ms / 1000 + late_s

    def delays_s(self, step: int) -> NDArray[np.float64]:
        """By which each rank is late in this step. They depend on the seed and the step alone."""
        config, random = self.config, self._random(step)
        parts = np.zeros(self.ranks)
        match config.kind:
            case "delay":
                parts[random.choice(self.ranks, config.ranks, replace=False)] = 1
            case "lognormal":
                parts = random.lognormal(0, config.sigma, self.ranks)
        return config.delay_ms / 1000 * parts

    def _random(self, step: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, step])
