"""A run that starts from a checkpoint of another one."""

from __future__ import annotations

from pipeline import optim
from pipeline.batch import BatchSchedule
from pipeline.batch._interface import StepDone
from pipeline.checkpoint import Checkpointer, Progress
from pipeline.config import Config, ConfigError
from pipeline.store import RunDirectory


def not_continued(config: Config, parent: Config) -> list[str]:
    """What a branch must have in common with the run that it branches off, its stream and its moments, and
    has not: as a user reads it."""
    return [
        f"{key}={here} (there {there})"
        for key, here, there in (
            ("data.sequence_length", config.data.sequence_length, parent.data.sequence_length),
            ("data.seed", config.data.seed, parent.data.seed),
            ("data.fingerprint", config.data.fingerprint, parent.data.fingerprint),
            ("data.distribution", config.data.distribution, parent.data.distribution),
            ("optim.name", config.optim.name, parent.optim.name),
            ("optim.base", optim.stepping(config.optim), optim.stepping(parent.optim)),
            ("sync.method", config.sync.method, parent.sync.method),
        )
        if here != there and None not in (here, there)
    ]


def branch_off(
    config: Config,
    parent: RunDirectory,
    checkpoints: Checkpointer,
    schedule: BatchSchedule,
    progress: Progress,
) -> None:
    """Takes weights, moments and the place in the stream from another run, into the model and the optimizer
    that `checkpoints` are of and into `progress`, of a run that has not begun. What lr.batch_scaling makes of
    the batch is relative to the batch there. Raises ConfigError."""
    if differences := not_continued(config, parent.config()):
        raise ConfigError(f"branch.run={parent.id}: cannot be continued with {'; '.join(differences)}")
    saved = checkpoints.branch(config.branch.tokens, parent)
    progress.step, progress.sequences = saved.step, saved.sequences
    progress.gradient_evaluations = saved.gradient_evaluations
    progress.loss_evaluations = saved.loss_evaluations
    progress.first_batch = saved.next_batch.size
    here = StepDone(saved.step, saved.sequences * config.data.sequence_length, saved.sequences, 0)
    progress.schedule, progress.next_batch = schedule.decide(progress.schedule, here, None)
