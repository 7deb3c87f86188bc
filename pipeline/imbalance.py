"""Uneven speed of ranks, made to measure: the same for every method, whatever the machine.

A delayed rank sleeps before the first forward pass of a step. Under `variable_length` ranks have more or less
to compute, as with sentences of natural length: each trains on the first tokens of its sequences, so many as
the step and the rank decide.
"""

from __future__ import annotations

import time

import numpy as np

from pipeline.config import ImbalanceConfig


class Imbalance:
    """Delays of one rank among `ranks`."""

    def __init__(self, config: ImbalanceConfig, rank: int, ranks: int) -> None:
        self.config, self.rank, self.ranks = config, rank, ranks

    def sleep(self, step: int) -> None:
        if (seconds := self.seconds(step)) > 0:
            time.sleep(seconds)

    def length(self, step: int, sequence_length: int) -> int:
        """Tokens of each sequence that this rank trains on in this step."""
        if self.config.kind != "variable_length":
            return sequence_length
        shares = self._random(step).uniform(self.config.min_share, 1, self.ranks)
        return max(1, round(shares[self.rank] * sequence_length))

    def _random(self, step: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, step])

    def seconds(self, step: int) -> float:
        """By which this rank is late in this step. It depends on the seed, the step and the rank alone."""
        config = self.config
        compute_s, delay_s = config.compute_ms / 1000, config.delay_ms / 1000
        random = self._random(step)
        match config.kind:
            case "delay":
                late = random.choice(self.ranks, config.ranks, replace=False)
                return compute_s + delay_s * float(self.rank in late)
            case "lognormal":
                return compute_s + delay_s * float(random.lognormal(0, config.sigma, self.ranks)[self.rank])
        return compute_s
