"""Batch schedules: pure controllers (state, step done, statistics) -> (state, decision).

Each schedule is one file with a class `Schedule` (see `_interface.BatchSchedule`), here or in a user's own
directory (`_own`). Nothing here imports torch: the command line checks configs and previews batch plans with
the same code that trains.
"""

from __future__ import annotations

import sys

from pipeline import registry
from pipeline.batch import _own
from pipeline.batch._adaptive import GUARDS, Adaptive, noise_to_signal
from pipeline.batch._caps import cap_below_start, first_batch, largest_below, largest_reached
from pipeline.batch._interface import BatchPlan, BatchSchedule, Planned, StepDone, plan, round_up

__all__ = [
    "GUARDS",
    "Adaptive",
    "BatchPlan",
    "BatchSchedule",
    "Planned",
    "StepDone",
    "cap_below_start",
    "first_batch",
    "largest_below",
    "largest_reached",
    "names",
    "noise_to_signal",
    "plan",
    "round_up",
    "schedule_class",
    "settings_read",
]


def names() -> list[str]:
    """What `batch.schedule` may be."""
    return [*registry.names(sys.modules[__name__]), *_own.versions()]


def schedule_class(name: str) -> type[BatchSchedule]:
    module = _own.load(name) if _own.is_own(name) else registry.load(sys.modules[__name__], name)
    schedule: type[BatchSchedule] = module.Schedule
    return schedule


def settings_read(name: str) -> frozenset[str]:
    """Of the batch group, those that tell one run with this schedule from another."""
    return _own.SETTINGS if _own.is_own(name) else schedule_class(name).settings
