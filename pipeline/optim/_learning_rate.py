"""The learning rate as a pure function of tokens, so that no batch schedule stretches or shortens it."""

from __future__ import annotations

import math

from pipeline.config import Config


def learning_rate(
    config: Config, *, step: int, start: int, step_tokens: int, batch_factor: float = 1.0
) -> float:
    """Of the `step`-th optimizer step (from 1), which begins after `start` tokens.

    warmup × decay × what the batch does to it, on `optim.lr`. Taken at the middle of the step's tokens, it is
    the mean over them to second order: large steps do not run ahead of the schedule or behind it, and neither
    the first step nor the last is lost to a rate of 0. A decay in cuts is taken at the start, where a batch
    that grows with them is.
    """
    middle = start + step_tokens / 2
    if config.lr.cut_factor is None:
        decay = _smooth_decay(config, middle)
    else:
        decay = config.lr.cut_factor ** -cuts(config, start)
    return config.optim.lr * _warmup(config, step, middle) * decay * batch_factor


def cuts(config: Config, tokens: float) -> int:
    """How often a decay in steps of `lr.cut_factor` has cut the rate after so many tokens."""
    assert config.lr.cut_factor
    # A decay to 0 has no last cut; what is below this moves no weight.
    decay = max(_smooth_decay(config, tokens), 1e-9)
    # Rounding must not cost a cut that the decay has just reached.
    return math.floor(-math.log(decay) / math.log(config.lr.cut_factor) + 1e-9)


def _warmup(config: Config, step: int, tokens: float) -> float:
    lr = config.lr
    done, planned = (tokens, lr.warmup_tokens) if lr.warmup_steps is None else (step - 0.5, lr.warmup_steps)
    return min(1.0, done / planned) if planned else 1.0


def _smooth_decay(config: Config, tokens: float) -> float:
    """From 1 at the end of a warmup in tokens (or at the start, when it is in steps) to `lr.min_ratio` at the
    end of the budget."""
    lr, budget = config.lr, config.planned_tokens
    start = lr.warmup_tokens or 0
    if lr.schedule == "warmup_stable_decay":
        start = max(start, budget - round(lr.decay_fraction * budget))
    if tokens <= start:
        return 1.0
    progress = min(1.0, (tokens - start) / (budget - start))
    shape = 1 - progress if lr.schedule == "warmup_stable_decay" else (1 + math.cos(math.pi * progress)) / 2
    return lr.min_ratio + (1 - lr.min_ratio) * shape
