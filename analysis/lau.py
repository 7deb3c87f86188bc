"""The layout of Lau et al. 2024 (arXiv 2412.21124), Tables 1 to 3: one block for each model; in it first the
adaptive schedules by their parameter, then the constant batches by their size, then the stages.

Losses are means over the seeds at the end of the runs; there they are the best ones of a single run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from analysis.summary import Schedule
from pipeline.config import Config
from pipeline.identity import identity_fields

# The parameter of an adaptive schedule, as its paper writes it.
_PARAMETERS = {"eta": "η", "theta": "θ", "c": "c"}


@dataclass(frozen=True)
class LauRow:
    """One schedule, under the name that the paper gives it."""

    name: str
    schedule: Schedule

    @property
    def hours(self) -> float | None:
        seconds = self.schedule.mean("seconds")
        return None if seconds is None else seconds / 3600


@dataclass(frozen=True)
class Block:
    """The schedules of one model."""

    model: str
    rows: list[LauRow]


def blocks(schedules: Sequence[Schedule]) -> list[Block]:
    """Of the schedules with a finished run. Without a config a schedule has its label for a name and comes
    last."""
    by_model: dict[str, list[tuple[tuple[int, str, float], LauRow]]] = {}
    for schedule in schedules:
        if not schedule.finished:
            continue
        config = next((run.config for run in schedule.runs if run.config), None)
        place, name = _described(config, schedule.label)
        model = config.model.name if config else "other"
        by_model.setdefault(model, []).append((place, LauRow(name, schedule)))
    found = []
    for model, placed in by_model.items():
        found.append(Block(model, _distinct([row for _, row in sorted(placed, key=lambda item: item[0])])))
    return found


def _distinct(rows: list[LauRow]) -> list[LauRow]:
    """With the label beside a name that comes twice, as where the learning rate varies as well."""
    names = Counter(row.name for row in rows)
    return [
        LauRow(f"{row.name} ({row.schedule.label})", row.schedule) if names[row.name] > 1 else row
        for row in rows
    ]


def _described(config: Config | None, label: str) -> tuple[tuple[int, str, float], str]:
    """Where it stands in its block, and its name there."""
    if config is None:
        return (4, "", 0.0), label
    batch: dict[str, Any] = identity_fields(config)["batch"]
    kind = config.batch.schedule
    for key, symbol in _PARAMETERS.items():
        if batch.get(key) is not None:
            return (0, kind, float(batch[key])), f"{kind}, {symbol} = {batch[key]:g}"
    if kind == "constant":
        return (1, "", float(config.batch.size)), f"constant {config.batch.size:,}"
    if kind == "stages":
        sizes = "-".join(map(str, batch["sizes"]))
        shares = "-".join(f"{100 * share:g}" for share in batch["fractions"])
        return (2, "", 0.0), f"{kind} {sizes} for {shares}%"
    return (3, kind, 0.0), label
