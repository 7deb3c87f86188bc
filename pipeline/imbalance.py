"""Uneven speed of ranks, made to measure: the same for every method, whatever the machine.

A delayed rank sleeps before the first forward pass of a step. Under `variable_length` ranks have more or less
to compute, as with sentences of natural length: each trains on the first tokens of its sequences, so many as
the step and its share of the batch decide.
"""

from __future__ import annotations

import time

import numpy as np

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
        shares = self._random(step).uniform(self.config.min_share, 1, self.ranks)
        return max(1, round(shares[share] * sequence_length))

    def _random(self, step: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, step])

    def seconds(self, step: int, shares: int = 1) -> float:
        """By which this rank is late in this step, where it computes so many shares of the batch. It depends
        on them, the seed, the step and the rank alone."""
        config = self.config
        compute_s, delay_s = shares * config.compute_ms / 1000, config.delay_ms / 1000
        random = self._random(step)
        match config.kind:
            case "delay":
                late = random.choice(self.ranks, config.ranks, replace=False)
                return compute_s + delay_s * float(self.rank in late)
            case "lognormal":
                return compute_s + delay_s * float(random.lognormal(0, config.sigma, self.ranks)[self.rank])
        return compute_s
