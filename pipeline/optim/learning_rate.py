"""The learning rate as a pure function of tokens, so that no batch schedule stretches or shortens it."""

from __future__ import annotations

import math

from pipeline.config import Config


def learning_rate(config: Config, *, step: int, tokens: float, batch: int, first_batch: int) -> float:
    """Of the `step`-th optimizer step (from 1), whose middle lies at `tokens`.

    warmup × decay × batch factor, on `optim.lr`. Taken at the middle of the step's tokens, it is the mean
    over them to second order: large steps do not run ahead of the schedule or behind it, and neither the
    first step nor the last is lost to a rate of 0.
    """
    rate = config.optim.lr * _warmup(config, step, tokens) * _decay(config, tokens)
    return rate * batch_factor(config, batch / first_batch)


def batch_factor(config: Config, growth: float) -> float:
    """What a batch `growth` times the first one does to the rate: 1, √growth (Adam), growth (SGD)."""
    exponent = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[config.lr.batch_scaling]
    return growth**exponent


def _warmup(config: Config, step: int, tokens: float) -> float:
    if config.lr.warmup_steps is not None:
        return min(1.0, (step - 0.5) / max(1, config.lr.warmup_steps))
    return min(1.0, tokens / max(1, config.lr.warmup_tokens or 0))


def _decay(config: Config, tokens: float) -> float:
    """From 1 at the end of a warmup in tokens (or at the start, when it is in steps) to `lr.min_ratio` at the
    end of the budget."""
    lr, budget = config.lr, config.budget_tokens
    start = lr.warmup_tokens or 0
    if lr.schedule == "warmup_stable_decay":
        start = max(start, budget - round(lr.decay_fraction * budget))
    if tokens <= start:
        return 1.0
    progress = min(1.0, (tokens - start) / (budget - start))
    shape = 1 - progress if lr.schedule == "warmup_stable_decay" else (1 + math.cos(math.pi * progress)) / 2
    return lr.min_ratio + (1 - lr.min_ratio) * shape
