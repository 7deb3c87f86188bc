"""The training loop, from a frozen config to the last checkpoint. Read it from `train` down."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import pipeline.parallel as strategies
from pipeline import checkpoint
from pipeline.batch import schedule_class
from pipeline.batch._interface import Decision, StepDone
from pipeline.checkpoint import Progress
from pipeline.config import Config, ConfigError
from pipeline.data import Prefetcher, Stream, prepare
from pipeline.gradients.capture import Capture, capture_for
from pipeline.gradients.norms import SquaredNorm
from pipeline.gradients.statistics import GradientStatistics
from pipeline.model.init import initialise
from pipeline.model.llama import Llama, loss_sum, prepare_blocks
from pipeline.optim import adamw
from pipeline.optim.learning_rate import learning_rate
from pipeline.parallel._ranks import Ranks
from pipeline.store import MetricsWriter, Row, RunDirectory, home
from pipeline.throughput import flops_per_token, peak_flops
from pipeline.track import Tracker

STATUS_INTERVAL_S = 0.5


class TrainingFailed(RuntimeError):
    """Training cannot go on; says at which step and why."""


def train(config: Config, run: RunDirectory, attempt: int, ranks: Ranks) -> None:
    """Runs `config` to the end of its budget, from the newest checkpoint if there is one."""
    trainer = Trainer(config, run, attempt, ranks)
    exit_code = 1
    try:
        trainer.resume()
        while not trainer.finished:
            trainer.step()
            if trainer.finished or trainer.crossed(config.eval.interval_tokens):
                trainer.evaluate()
            if trainer.finished or trainer.crossed(config.checkpoint.interval_tokens):
                trainer.save()
        exit_code = 0
    finally:
        trainer.close(exit_code)


def build_model(config: Config, device: torch.device) -> Llama:
    """Weights that depend on (seed, parameter name) only, so every strategy starts equal."""
    with torch.device("meta"):
        model = Llama(config.model)
    initialise(model, config.seed, device)
    return prepare_blocks(model, config.parallel)


class Trainer:
    def __init__(self, config: Config, run: RunDirectory, attempt: int, ranks: Ranks) -> None:
        self.config, self.run, self.attempt, self.ranks = config, run, attempt, ranks
        self.device = ranks.device
        self.micro, self.length = config.data.micro_batch, config.data.sequence_length

        corpus = prepare(config.data, home() / "corpora", report=print)
        if corpus.vocab_size > config.model.vocab:
            raise ConfigError(
                f"model.vocab={config.model.vocab}: the tokenizer has {corpus.vocab_size} tokens. "
                f"Nearest model.vocab: {-(-corpus.vocab_size // 16) * 16}"
            )
        self.data = Prefetcher(Stream(corpus.train, self.length, config.data.seed))
        # A fixed order, so that every run is evaluated on the same held-out sequences.
        self.held_out = Stream(corpus.validation, self.length, seed=0)

        strategy = strategies.load(config.parallel.strategy)
        self.without_sync = strategy.without_sync
        self.model: nn.Module = strategy.apply(build_model(config, self.device), ranks, config.parallel)
        self.optimizer = adamw.build(self.model, config.optim)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.squared_norm = SquaredNorm([p.shape for p in self.parameters], self.device)

        self.schedule = schedule_class(config.batch.schedule)(config)
        self.capture: Capture | None = None
        if self.schedule.measures:
            self.capture = capture_for(config.batch.estimator, self.model, self.device)
        state, first = self.schedule.start()
        self.progress = Progress(state, first, first.size)
        self.tokens_before = 0  # tokens seen before the step just done

        self.metrics = MetricsWriter(run.metrics_file) if ranks.is_main else None
        self.tracker = Tracker(config, run, attempt) if ranks.is_main else None
        self.peak_flops = peak_flops(torch.cuda.get_device_name(self.device)) if self._on_gpu else None
        self.resumed_at = time.perf_counter()  # training time runs from here
        self.status_at = 0.0

    # --- where the run stands

    @property
    def tokens(self) -> int:
        return self.progress.sequences * self.length

    @property
    def finished(self) -> bool:
        return self.progress.sequences >= self.config.budget_sequences

    def crossed(self, interval_tokens: int | None) -> bool:
        """Whether the step just done passed a multiple of `interval_tokens`."""
        return interval_tokens is not None and (
            self.tokens // interval_tokens > self.tokens_before // interval_tokens
        )

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    # --- one optimizer step

    def step(self) -> None:
        progress, decision = self.progress, self.progress.next_batch
        size = min(decision.size, self.config.budget_sequences - progress.sequences)
        measured = self._measured(size)
        loss, statistics, squared_norm = self._gradient(progress.sequences, size, measured)
        rate = learning_rate(
            self.config,
            step=progress.step + 1,
            tokens=self.tokens + size * self.length / 2,
            batch=decision.size,
            first_batch=progress.first_batch,
        )
        finite = math.isfinite(loss) and math.isfinite(squared_norm)
        if finite:
            self._update(math.sqrt(squared_norm), rate)

        self.tokens_before = self.tokens
        progress.step += 1
        progress.sequences += size
        self._decide(size, statistics)
        now = time.perf_counter()
        seconds, self.resumed_at = now - self.resumed_at, now
        progress.time += seconds
        if self.ranks.is_main:
            self._log(self._train_row(loss, squared_norm, rate, size, seconds, decision, statistics))
        if not finite:
            raise TrainingFailed(
                f"step {progress.step}: training loss {loss}, squared gradient norm {squared_norm}; "
                f"lr {rate:.3g}, batch {size}. Usual causes: optim.lr={self.config.optim.lr} too high, "
                f"a warmup too short, or no clipping (optim.clip={self.config.optim.clip})"
            )

    def _measured(self, size: int) -> Capture | None:
        """The capture if this step is to be measured. The last one is not: it has nothing to decide."""
        last = self.progress.sequences + size >= self.config.budget_sequences
        wanted = self.schedule.wants_statistics(self.progress.schedule, self.progress.step + 1)
        return self.capture if wanted and not last else None

    def _gradient(
        self, first: int, size: int, capture: Capture | None
    ) -> tuple[float, GradientStatistics | None, float]:
        """Mean loss per token of the sequences [first, first + size), their statistics, and ‖g‖².

        Leaves the gradient of the mean loss in `.grad`. Statistics are of that gradient before clipping.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        if capture:
            capture.start_step()
        units = list(self._my_units(first, size))
        for index, (start, count) in enumerate(units):
            inputs, targets = self._on_device(self.data.take(start, max(count, 1)))
            following = units[index + 1] if index + 1 < len(units) else self._next_unit(first + size)
            self.data.request(*following)
            last = index + 1 == len(units)
            # The strategy averages over ranks: scaled so that the result is the mean over the whole batch.
            scale = count * self.ranks.data_ranks / size
            with contextlib.ExitStack() as stack:
                if not last:
                    stack.enter_context(self.without_sync(self.model))
                unit_loss = self._loss(inputs, targets) / inputs.numel()
                if capture:
                    stack.enter_context(capture.unit(count, scale))
                (unit_loss * scale).backward()
            loss += unit_loss.detach() * (count / size)

        squared = self.squared_norm([p.grad for p in self.parameters]) / self.ranks.world_size
        own = [loss.view(1), squared.view(1), *([capture.sums()] if capture else [])]
        mean_loss, mean_sq_norm, *sums = self.ranks.sum(torch.cat(own))
        statistics = None
        if sums:
            statistics = GradientStatistics(
                units=round(sums[2]),
                sequences=size,
                sum_weighted_sq_norm=sums[0],
                sum_sq_norm=sums[1],
                mean_sq_norm=mean_sq_norm,
            )
        return mean_loss, statistics, mean_sq_norm

    def _my_units(self, first: int, size: int) -> Iterator[tuple[int, int]]:
        """(first sequence, sequences) of this rank's micro-batches: unit i of a step is always the same
        sequences, on rank i mod data_ranks. At the end of the budget a unit may be short or empty."""
        ranks, micro = self.ranks.data_ranks, self.micro
        for round_start in range(0, size, ranks * micro):
            start = round_start + self.ranks.data_rank * micro
            yield first + start, max(0, min(micro, size - start))

    def _next_unit(self, first: int) -> tuple[int, int]:
        """This rank's first micro-batch of a step that starts at `first`, whatever its batch will be."""
        return first + self.ranks.data_rank * self.micro, self.micro

    def _on_device(self, sequences: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, each [B, T], of sequences [B, T + 1]."""
        tokens = torch.from_numpy(sequences).to(self.device, non_blocking=True)
        return tokens[:, :-1], tokens[:, 1:]

    def _loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Summed over tokens."""
        if self.config.parallel.precision == "float32":
            return loss_sum(self.model(inputs), targets)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            return loss_sum(self.model(inputs), targets)

    def _update(self, norm: float, rate: float) -> None:
        clip = self.config.optim.clip
        if clip is not None and norm > clip:
            total = torch.tensor(norm, device=self.device)
            nn.utils.clip_grads_with_norm_(self.parameters, clip, total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def _decide(self, size: int, statistics: GradientStatistics | None) -> None:
        """The next batch. Without statistics it follows from the tokens alone, the same on every rank; with
        them rank 0's arithmetic counts, lest ranks disagree on how many micro-batches come next."""
        progress = self.progress
        done = StepDone(progress.step, self.tokens, progress.sequences, size)
        decided = self.schedule.decide(progress.schedule, done, statistics)
        if statistics is not None:
            decided = self.ranks.from_main(decided)
        progress.schedule, progress.next_batch = decided

    # --- evaluation, checkpoints, the record

    @torch.no_grad()
    def evaluate(self) -> None:
        """Mean loss per token of the first `eval.sequences` held-out sequences."""
        total = min(self.config.eval.sequences, self.held_out.sequences_per_epoch)
        loss = torch.zeros(1, dtype=torch.float64, device=self.device)
        for start, count in self._my_units(0, total):
            if count:
                loss += self._loss(*self._on_device(self.held_out.read(start, count)))
        (total_loss,) = self.ranks.sum(loss)
        if self.ranks.is_main:
            self._log({**self._clock(), "val/loss": total_loss / (total * self.length)})
        if not math.isfinite(total_loss):
            raise TrainingFailed(f"step {self.progress.step}: validation loss {total_loss}")
        self.resumed_at = time.perf_counter()

    @torch.no_grad()
    def save(self) -> None:
        if not math.isfinite(self.squared_norm(self.parameters).item()):
            raise TrainingFailed(f"step {self.progress.step}: the parameters are not finite; not saved")
        checkpoint.save(self.run, self.ranks, self.model, self.optimizer, self.progress)
        self.resumed_at = time.perf_counter()

    def resume(self) -> None:
        """Goes on from the newest checkpoint, or starts at the beginning."""
        if saved := checkpoint.complete(self.run):
            self.progress = checkpoint.restore(saved[-1], self.model, self.optimizer)
            if self.ranks.is_main:
                print(f"resumed at step {self.progress.step}, {self.tokens} tokens", flush=True)
        self.resumed_at = time.perf_counter()

    def _clock(self) -> Row:
        progress = self.progress
        return {
            "step": progress.step,
            "tokens": self.tokens,
            "sequences": progress.sequences,
            "time": progress.time,
            "wall": time.time(),
            "attempt": self.attempt,
        }

    def _train_row(
        self,
        loss: float,
        squared_norm: float,
        rate: float,
        size: int,
        seconds: float,
        decision: Decision,
        statistics: GradientStatistics | None,
    ) -> Row:
        row = {
            **self._clock(),
            "train/loss": loss,
            "lr": rate,
            "batch/size": size,
            "batch/requested": decision.requested,
            "batch/accumulation": -(-size // (self.ranks.data_ranks * self.micro)),
            "batch/reason": decision.reason,
            "grad/norm": math.sqrt(squared_norm) if squared_norm >= 0 else math.nan,
            "throughput/tokens_per_s": size * self.length / seconds,
        }
        if self.peak_flops:
            flops = row["throughput/tokens_per_s"] * flops_per_token(self.config.model, self.length)
            row["throughput/mfu"] = flops / (self.peak_flops * self.ranks.world_size)
        if self._on_gpu:
            row["memory/peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        if statistics is not None:
            row["stat/mean_sq_norm"] = statistics.mean_sq_norm
            row["stat/variance"] = statistics.variance
            row["stat/noise_scale"] = statistics.noise_scale
            row |= self.progress.next_batch.log
        return row

    def _log(self, row: Row) -> None:
        assert self.metrics and self.tracker
        self.metrics.write(row)
        self.tracker.log(row)
        now = time.monotonic()
        if now - self.status_at > STATUS_INTERVAL_S or self.finished:
            self.status_at = now
            self.run.update_status(step=row["step"], tokens_seen=row["tokens"])

    def close(self, exit_code: int) -> None:
        self.data.close()
        if self.tracker and self.metrics:
            self.tracker.finish(exit_code)
            self.metrics.close()
