"""Batch schedules: pure controllers (state, step done, statistics) -> (state, decision).

Each schedule is one file with a class `Schedule` (see `_interface.BatchSchedule`). Nothing here imports
torch: the command line checks configs and previews batch plans with the same code that trains.
"""

from __future__ import annotations

import sys

from pipeline import registry
from pipeline.batch._interface import BatchPlan, BatchSchedule, plan

__all__ = ["BatchPlan", "BatchSchedule", "names", "plan", "schedule_class"]


def names() -> list[str]:
    """What `batch.schedule` may be."""
    return registry.names(sys.modules[__name__])


def schedule_class(name: str) -> type[BatchSchedule]:
    schedule: type[BatchSchedule] = registry.load(sys.modules[__name__], name).Schedule
    return schedule
