"""The learning rate as a pure function of tokens, so that no batch schedule stretches or shortens it."""

from __future__ import annotations

import math

from pipeline.config import Config


def learning_rate(config: Config, *, step: int, tokens: int, batch: int, first_batch: int) -> float:
    """Of the optimizer step that is the `step`-th (from 1) and ends at `tokens`.

    warmup × decay × batch factor, on `optim.lr`. Evaluated at the end of the step, so that the first step
    is not lost to a rate of 0 and the last one ends the decay.
    """
    rate = config.optim.lr * _warmup(config, step, tokens) * _decay(config, tokens)
    return rate * batch_factor(config, batch / first_batch)


def batch_factor(config: Config, growth: float) -> float:
    """What a batch `growth` times the first one does to the rate: 1, √growth (Adam), growth (SGD)."""
    exponent = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[config.lr.batch_scaling]
    return growth**exponent


def _warmup(config: Config, step: int, tokens: int) -> float:
    if config.lr.warmup_steps is not None:
        return min(1.0, step / max(1, config.lr.warmup_steps))
    return min(1.0, tokens / max(1, config.lr.warmup_tokens or 0))


def _decay(config: Config, tokens: int) -> float:
    """1 at the end of the warmup, `lr.min_ratio` at the end of the budget."""
    lr, budget = config.lr, config.budget_tokens
    start = lr.warmup_tokens or 0
    if lr.schedule == "warmup_stable_decay":
        start = max(start, budget - round(lr.decay_fraction * budget))
    if tokens <= start:
        return 1.0
    progress = min(1.0, (tokens - start) / (budget - start))
    shape = 1 - progress if lr.schedule == "warmup_stable_decay" else (1 + math.cos(math.pi * progress)) / 2
    return lr.min_ratio + (1 - lr.min_ratio) * shape
