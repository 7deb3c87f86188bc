"""Where the rows of a run are read from: its own record, or the files that wandb's client left beside it.

Whatever the source, the rows are those of metrics.jsonl, each step from the latest attempt at it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from analysis.wandb_files import read_run
from pipeline.config import ConfigError, nearest
from pipeline.store import Row, RunDirectory, supersede

# Columns of the record that the analysis reads; a column that a row lacks is null.
COLUMNS = (
    "step",
    "tokens",
    "time",
    "sequences",
    "train/loss",
    "val/loss",
    "attempt",
    "batch/size",
    "batch/requested",
    "batch/accumulation",
    "stat/noise_scale",
)


@dataclass(frozen=True)
class Log:
    """What a source holds of one run."""

    rows: list[Row] = field(default_factory=list)
    every: int = 1  # one training step in so many was to be in it
    damage: list[str] = field(default_factory=list)  # a line for each file of which something is lost

    @property
    def trained(self) -> list[int]:
        """The training steps in it."""
        return [row["step"] for row in self.rows if "batch/size" in row]

    @property
    def steps(self) -> int:
        """How many training steps there were, from the first in it to its last row."""
        return int(self.rows[-1]["step"]) - self.trained[0] + 1 if self.trained else 0


@dataclass(frozen=True)
class Source:
    """`files`: what it reads, within a run directory. `cautions`: what a reader must know of all its logs;
    raises ConfigError when they hold nothing at all."""

    name: str
    files: str
    read: Callable[[RunDirectory], Log]
    cautions: Callable[[Sequence[Log]], list[str]]


def source(name: str) -> Source:
    """Raises ConfigError with the nearest name when there is none of this name."""
    if name in SOURCES:
        return SOURCES[name]
    hint = nearest(name, list(SOURCES))
    raise ConfigError(
        f"--source {name}: no such source." + (f" Did you mean {hint}?" if hint else ""),
        f"Sources: {', '.join(SOURCES)}",
    )


# --- wandb's files ---------------------------------------------------------------------------------------

# One folder for each attempt; where wandb failed to start it holds no such file.
WANDB_FILES = "wandb/*run-*/run-*.wandb"


def _read_wandb(run: RunDirectory) -> Log:
    files = [read_run(path, COLUMNS) for path in sorted(run.path.glob(WANDB_FILES))]
    rows = sorted((row for file in files for row in file.rows), key=lambda row: row["attempt"])
    every = max((file.config.get("track.every", 1) for file in files), default=1)
    return Log(supersede(rows), every, [file.warning for file in files if file.warning])


def _wandb_cautions(logs: Sequence[Log]) -> list[str]:
    if not any(log.rows for log in logs):
        raise ConfigError(
            f"--source wandb-offline: no run of this sweep has rows in runs/*/{WANDB_FILES}; track=disabled "
            f"writes none. The record has them in any case: --source record"
        )
    notes = []
    if partial := [log for log in logs if len(log.trained) < log.steps]:
        held, steps = sum(len(log.trained) for log in partial), sum(log.steps for log in partial)
        every = max(log.every for log in partial)
        why = f"one in {every}: track.every={every}" if every > 1 else "the others never reached them"
        notes.append(
            f"The wandb files hold {held:,} of {steps:,} training steps ({why}), on which training losses, "
            f"batch sizes and curves rest; --source record has every step."
        )
    if damage := [line for log in logs for line in log.damage]:
        more = f" and {len(damage) - 3} more" if len(damage) > 3 else ""
        notes.append(f"Damaged wandb files, read as far as possible: {'; '.join(damage[:3])}{more}.")
    return notes


SOURCES = {
    found.name: found
    for found in (
        Source("record", "metrics.jsonl", lambda run: Log(run.rows()), lambda logs: []),
        Source("wandb-offline", WANDB_FILES, _read_wandb, _wandb_cautions),
    )
}
