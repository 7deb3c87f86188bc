"""The record of a run: the rows of metrics.jsonl, mirrored by the tracker, and its status."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from pipeline.batch._interface import Decision
from pipeline.checkpoint import Progress
from pipeline.config import Config, LlamaConfig
from pipeline.gradients.statistics import GradientStatistics
from pipeline.problem import Problem
from pipeline.store import MetricsWriter, Row, RunDirectory
from pipeline.throughput import peak_flops
from pipeline.track import Tracker

STATUS_INTERVAL_S = 0.5


class TrainingFailed(RuntimeError):
    """Training cannot go on; says at which step and why."""


class Diverged(TrainingFailed):
    """A loss, a gradient or the weights are no finite numbers. `Status.diverged` knows it by its name."""


@dataclass(frozen=True)
class StepTaken:
    """What an optimizer step was."""

    size: int  # sequences
    requested: Decision
    redraws: int | None  # larger batches asked for before it was taken; None: the schedule never asks
    rate: float
    batch_factor: float  # what the batch did to the rate
    loss: float  # mean per target
    squared_norm: float  # ‖g‖² before clipping
    statistics: GradientStatistics | None
    seconds: float


class Record:
    """Rank 0 writes it."""

    def __init__(
        self, config: Config, run: RunDirectory, attempt: int, problem: Problem, device: torch.device
    ) -> None:
        self._config, self._run, self._attempt, self._device = config, run, attempt, device
        self._samples = problem.samples
        self._frozen = run.exists()
        on_gpu = device.type == "cuda"
        self._peak_flops = peak_flops(torch.cuda.get_device_name(device)) if on_gpu else None
        self._status_at = 0.0
        self.metrics = MetricsWriter(run.metrics_file)
        self._tracker = Tracker(config, run, attempt)

    def go_on_after(self, progress: Progress) -> None:
        """Raises ConfigError when rows up to there are lost: no attempt will write them again."""
        first = None if self._config.branch.run else 1  # a branch has its parent's steps behind it
        tokens = self._config.eval.interval_tokens
        self.metrics.go_on_after(progress.step, progress.time, first, tokens)

    def trained(self, progress: Progress, step: StepTaken) -> Row:
        """The row of the step just taken, after which the run stands at `progress`."""
        config = self._config
        tokens_per_s = step.size * config.data.sequence_length / step.seconds
        row = {
            **self._clock(progress),
            "train/loss": step.loss,
            "lr": step.rate,
            "lr/batch_factor": step.batch_factor,
            "batch/size": step.size,
            "batch/requested": step.requested.requested,
            "batch/accumulation": -(-step.size // config.batch_unit),
            "batch/reason": step.requested.reason,
            "gradient_evaluations": progress.gradient_evaluations,
            "grad/norm": math.sqrt(step.squared_norm) if step.squared_norm >= 0 else math.nan,
            "throughput/tokens_per_s": tokens_per_s,
        }
        if step.redraws is not None:
            row["batch/redraws"] = step.redraws
        if progress.loss_evaluations:
            row["loss_evaluations"] = progress.loss_evaluations
        if self._peak_flops and isinstance(config.model, LlamaConfig):
            flops = tokens_per_s * config.model.flops_per_token(config.data.sequence_length)
            row["throughput/mfu"] = flops / (self._peak_flops * config.parallel.world_size)
        if self._device.type == "cuda":
            row["memory/peak_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        if statistics := step.statistics:
            row["stat/mean_sq_norm"] = statistics.mean_sq_norm
            row["stat/variance"] = statistics.variance
            row["stat/noise_scale"] = statistics.noise_scale
            if statistics.step_sq_norm is not None:
                row["stat/step_sq_norm"] = statistics.step_sq_norm
            if statistics.averaged_sq_norm is not None:
                row["stat/averaged_sq_norm"] = statistics.averaged_sq_norm
            row |= progress.next_batch.log
        return row

    def evaluated(self, progress: Progress, metrics: Row) -> Row:
        """The row of an evaluation at `progress`."""
        return {**self._clock(progress), **metrics}

    def _clock(self, progress: Progress) -> Row:
        # Full gradient evaluations: per-sample gradients over samples to train on.
        epochs = {"epochs": progress.gradient_evaluations / self._samples} if self._samples else {}
        return {
            "step": progress.step,
            "tokens": progress.sequences * self._config.data.sequence_length,
            "sequences": progress.sequences,
            **epochs,
            "time": progress.time,
            "wall": time.time(),
            "attempt": self._attempt,
        }

    def write(self, row: Row) -> None:
        """Raises TrainingFailed when somebody has deleted the run."""
        self.metrics.write(row)
        self._tracker.log(row)
        now = time.monotonic()
        if now - self._status_at > STATUS_INTERVAL_S or row["sequences"] >= self._config.budget_sequences:
            self._status_at = now
            if self._frozen and not self._run.exists():
                raise TrainingFailed(
                    f"step {row['step']}: {self._run.path} was deleted under the run; what it trained since "
                    f"is lost. The sweep's command begins it again"
                )
            with contextlib.suppress(OSError):  # a full disk; the next row tells
                self._run.update_status(step=row["step"], tokens_seen=row["tokens"])

    def close(self, exit_code: int, left: Iterable[Row]) -> None:
        """`left`: rows that still waited for something when the run ended."""
        with contextlib.suppress(OSError):  # of a failure, as far as this rank knows it
            for row in left:
                self.metrics.write(row)
        self._tracker.finish(exit_code, preempted=self._run.stop_requested() == "PREEMPTED")
        with contextlib.suppress(OSError):  # rows no checkpoint covers: the next attempt does them again
            self.metrics.close()
