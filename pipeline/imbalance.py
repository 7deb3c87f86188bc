"""Uneven speed of ranks, made to measure: the same delays for every method, whatever the machine.

A rank sleeps before the first forward pass of a step, so that even a rank that nobody waits for computes as
late as a slow machine would.
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

    def seconds(self, step: int) -> float:
        """By which this rank is late in this step. It depends on the seed, the step and the rank alone."""
        config = self.config
        compute_s, delay_s = config.compute_ms / 1000, config.delay_ms / 1000
        random = np.random.default_rng([config.seed, step])
        match config.kind:
            case "delay":
                late = random.choice(self.ranks, config.ranks, replace=False)
                return compute_s + delay_s * float(self.rank in late)
            case "lognormal":
                return compute_s + delay_s * float(random.lognormal(0, config.sigma, self.ranks)[self.rank])
        return compute_s
