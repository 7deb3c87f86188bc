"""The cap on a schedule's batches, `batch.max_size`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.batch._interface import round_up

if TYPE_CHECKING:
    from pipeline.config import Config


def first_batch(config: Config) -> int:
    """`batch.size` rounded up to a multiple."""
    return round_up(config.batch.size, config.batch_multiple)


def largest_below(config: Config) -> int:
    """The largest multiple that does not exceed the cap."""
    return (config.batch.max_size or first_batch(config)) // config.batch_multiple * config.batch_multiple


def largest_reached(config: Config, last: float) -> int:
    """Of a batch that grows until it asks for `last`, with or without a cap."""
    size = round_up(last, config.batch_multiple)
    return min(size, largest_below(config)) if config.batch.max_size else size


def cap_below_start(config: Config) -> list[str]:
    """Problems of a cap that the first batch is above already."""
    cap, first = config.batch.max_size, first_batch(config)
    if cap is None or cap >= first:
        return []
    return [
        f"batch.max_size={cap}: below the first batch, batch.size={config.batch.size} rounded up to a "
        f"multiple of {config.batch_multiple}. Nearest: {first}"
    ]
