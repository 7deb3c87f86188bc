"""The training loop, from a frozen config to the last checkpoint. Read it from `train` down."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from pipeline import optim
from pipeline.batch import schedule_class
from pipeline.batch._interface import Decision, Redrawing, StepDone
from pipeline.checkpoint import Checkpointer, Progress
from pipeline.config import Config, ConfigError, LlamaConfig, to_tree
from pipeline.data import Prefetcher
from pipeline.exact import Exact
from pipeline.gradients.capture import Capture, capture_for
from pipeline.gradients.direction import Step
from pipeline.gradients.dtensor import local
from pipeline.gradients.norms import SquaredNorm
from pipeline.gradients.recent import Recent
from pipeline.gradients.statistics import GradientStatistics
from pipeline.imbalance import Imbalance
from pipeline.optim._average import Average
from pipeline.optim._batch_scaling import BatchScaling
from pipeline.optim._evaluation import Evaluating, Evaluation
from pipeline.optim._learning_rate import learning_rate
from pipeline.parallel import strategy_class
from pipeline.parallel._ranks import Ranks
from pipeline.problem import problem_of
from pipeline.store import MetricsWriter, Row, RunDirectory, report
from pipeline.sync import method_class
from pipeline.sync._agreement import Agreement, Report, Sketch, row_of
from pipeline.sync._replica import Replica
from pipeline.throughput import flops_per_token, peak_flops
from pipeline.track import Tracker

STATUS_INTERVAL_S = 0.5
STOP_INTERVAL_S = 1.0  # between looks whether the run is to stop


def not_continued(config: Config, parent: Config) -> list[str]:
    """What a branch must have in common with the run that it branches off: its stream and its moments."""
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


def _passes(interval: int | None, before: int, after: int) -> bool:
    """Whether a multiple of `interval` lies in (before, after]."""
    return interval is not None and after // interval > before // interval


class TrainingFailed(RuntimeError):
    """Training cannot go on; says at which step and why."""


def train(config: Config, run: RunDirectory, attempt: int, ranks: Ranks) -> bool:
    """Runs `config`, from the newest checkpoint if there is one, to the end of its budget or to a stop that
    somebody asks for. Whether it came to the end."""
    trainer = Trainer(config, run, attempt, ranks)
    exit_code = 1
    try:
        trainer.resume()
        while not (trainer.finished or trainer.stop_agreed):
            trainer.step()
            trainer.publish()
            if trainer.finished or trainer.crossed(config.eval.interval_tokens):
                trainer.evaluate()
            due = trainer.save_agreed or trainer.crossed(config.checkpoint.interval_tokens)
            if trainer.finished or trainer.stop_agreed or due:
                trainer.save()
        trainer.sync.close()
        exit_code = 0 if trainer.finished else 1
    finally:
        trainer.close(exit_code)
    return trainer.finished


class Trainer:
    def __init__(self, config: Config, run: RunDirectory, attempt: int, ranks: Ranks) -> None:
        self.config, self.run, self.attempt, self.ranks = config, run, attempt, ranks
        self.frozen = run.exists()
        self.device = ranks.device
        self.micro, self.length = config.data.micro_batch, config.data.sequence_length

        self.problem = problem_of(config, ranks)
        self.data = Prefetcher(self.problem.train)

        self.strategy = strategy_class(config.parallel.strategy)(config, ranks)
        self.model: nn.Module = self.strategy.apply(self.problem.model())
        self.optimizer = optim.build(self.model, config.optim)
        self.parameters = list(self.model.parameters())
        # DDP puts a prefix before names, which a checkpoint must not have.
        named = {name.removeprefix("module."): weight for name, weight in self.model.named_parameters()}
        self.average = Average(named, config) if config.optim.name == "swa" else None
        self.replica = Replica(self.model, ranks)
        self.sync = method_class(config.sync.method)(config, ranks, self.replica)
        # Of a replica the norm is its own; of one model each rank has a part of it.
        holders = 1 if self.sync.replicas else ranks.world_size
        self.squared_norm = SquaredNorm(self.parameters, holders, self.device)
        self.imbalance = Imbalance(config.imbalance, ranks.data_rank, ranks.data_ranks)

        self.schedule = schedule_class(config.batch.schedule)(config)
        self.batch_scaling = BatchScaling(config)
        self.recent: Recent | None = None
        if (steps := config.batch.averaged_steps) and "averaged_steps" in self.schedule.settings:
            self.recent = Recent(named, steps, config.batch.averaged_ratio, ranks)
        self.capture: Capture | None = None
        self.needs_always = self.batch_scaling.needs or optim.needs(config)  # not in tested steps alone
        if needs := self.schedule.needs or self.needs_always:
            self.capture = capture_for(needs, self.model, self.optimizer, ranks, self.problem.l2, self.recent)
        self.whole_step: Step | None = None  # which the schedule tests before it is taken
        if self.schedule.needs and self.schedule.needs.redraws:
            self.whole_step = Step(self.parameters, self.optimizer)
        state, first = self.schedule.start()
        self.progress = Progress(state, first, first.size)
        self.tokens_before = 0  # tokens seen before the step just done

        self.exact = Exact(config, self.problem, ranks) if config.track.exact_gradient else None

        self.metrics = MetricsWriter(run.metrics_file) if ranks.is_main else None
        self.tracker = Tracker(config, run, attempt) if ranks.is_main else None
        self.peak_flops = peak_flops(torch.cuda.get_device_name(self.device)) if self._on_gpu else None
        captured = {
            **(self.capture.saved if self.capture else {}),
            **(self.average.saved if self.average else {}),
            **(self.recent.saved if self.recent else {}),
        }
        model_settings = {f"model.{k}": v for k, v in to_tree(config.model).items() if k != "name"}
        self.checkpoints = Checkpointer(
            run,
            ranks,
            self.model,
            self.optimizer,
            captured,
            self.metrics,
            model_settings | ({"sync.replicas": ranks.data_ranks} if self.sync.replicas else {}),
            config.checkpoint.keep,
            self.sync if self.sync.replicas else None,
        )
        self.agreement = Agreement(ranks, self.sync.drift_steps) if self.sync.replicas else None
        self.sketch: Sketch | None = None
        if config.sync.consensus and self.sync.replicas:
            self.sketch = Sketch(sum(p.numel() for p in self.parameters), self.device)
        self.unreported: deque[Row] = deque()  # rows that wait for what other replicas say of their steps
        self.observed: dict[str, float] = {}  # in the step just done
        self.waited_s = 0.0  # for other replicas, since the last report
        self.stop_agreed = self.save_agreed = False  # by all ranks, in the step just done
        self.resumed_at = time.perf_counter()  # training time runs from here
        self.status_at = self.stop_looked_at = 0.0
        self.saved_at = time.monotonic()

    # --- where the run stands

    @property
    def tokens(self) -> int:
        return self.progress.sequences * self.length

    @property
    def finished(self) -> bool:
        return self.progress.sequences >= self.config.budget_sequences

    def crossed(self, interval_tokens: int | None) -> bool:
        """Whether the step just done passed a multiple of `interval_tokens`."""
        return _passes(interval_tokens, self.tokens_before, self.tokens)

    def evaluated_after(self, size: int) -> bool:
        """Whether an evaluation follows the step of this size that is being done."""
        last = self.progress.sequences + size >= self.config.budget_sequences
        return last or _passes(
            self.config.eval.interval_tokens, self.tokens, self.tokens + size * self.length
        )

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    # --- one optimizer step

    def step(self) -> None:
        progress, decision = self.progress, self.progress.next_batch
        number = progress.step + 1
        size = min(decision.size, self.config.budget_sequences - progress.sequences)
        tested = self.schedule.wants_statistics(progress.schedule, number, self.tokens)
        measured = self._capture_of(size) if tested or self.needs_always else None
        rate, factor = self._set_rate(number, size, decision)
        with self._waiting():
            self.sync.before_backward(number)
        share_of_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        if not self.sync.decided(number):
            self.imbalance.sleep(number, len(self.sync.shares))
            share_of_loss = self._backward(progress.sequences, size, measured)
        redraws = 0
        if self.sync.replicas:
            loss, statistics, squared_norm = self._own_gradient(share_of_loss, measured, number, rate)
        else:
            loss, statistics, squared_norm = self._summed_gradient(share_of_loss, measured)
            while tested and statistics and (larger := self._redrawn(size, statistics)):
                share_of_loss *= size / larger.size
                share_of_loss += self._backward(progress.sequences, larger.size, measured, known=size)
                decision, size, redraws = larger, larger.size, redraws + 1
                rate, factor = self._set_rate(number, size, decision)
                loss, statistics, squared_norm = self._summed_gradient(share_of_loss, measured)
        finite = math.isfinite(loss) and math.isfinite(squared_norm)
        if finite:
            progress.gradient_evaluations += size
            self._compare_exactly(size)
            rate = self._update(size, loss, squared_norm, statistics)
            with self._waiting():
                self.sync.after_step(number)

        self.tokens_before = self.tokens
        progress.step += 1
        progress.sequences += size
        if self.average and finite:
            self._average(self.average)
        self._decide(size, statistics, tested)
        # A replica that fails does not meet the others any more.
        reports = self._agree(loss, squared_norm) if self.agreement and finite else []
        now = time.perf_counter()
        seconds, self.resumed_at = now - self.resumed_at, now
        progress.time += seconds
        if self.sync.replicas:
            loss *= self.ranks.data_ranks  # of its share, until the others have told theirs
        if self.ranks.is_main:
            row = self._train_row(loss, squared_norm, rate, size, seconds, decision, statistics)
            row |= {"batch/redraws": redraws} if self.whole_step else {}
            self._log_trained({**row, "lr/batch_factor": factor}, reports)
        if not finite:
            raise TrainingFailed(
                f"step {progress.step}: training loss {loss}, squared gradient norm {squared_norm}; "
                f"lr {rate:.3g}, batch {size}. Usual causes: optim.lr={self.config.optim.lr} too high, "
                f"a warmup too short, or no clipping (optim.clip={self.config.optim.clip})"
            )

    def _capture_of(self, size: int) -> Capture | None:
        """What measures the step, unless it is the last one, which has nothing to decide."""
        last = self.progress.sequences + size >= self.config.budget_sequences
        return None if last else self.capture

    def _set_rate(self, number: int, size: int, decision: Decision) -> tuple[float, float]:
        """Gives the optimizer the learning rate of a step of this size; with what the batch does to it."""
        progress = self.progress
        factor = self.batch_scaling.factor(decision.size, progress.first_batch, progress.noise)
        rate = learning_rate(
            self.config,
            step=number,
            start=self.tokens,
            step_tokens=size * self.length,
            batch_factor=factor,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate, factor

    def _redrawn(self, size: int, statistics: GradientStatistics) -> Decision | None:
        """A larger batch of the step that is being done, where the schedule wants one before it is taken: by
        rank 0's arithmetic, as the batches between steps."""
        if not self.whole_step:
            return None
        left = self.config.budget_sequences - self.progress.sequences - size
        schedule = cast("Redrawing", self.schedule)
        decision = self.ranks.from_main(schedule.redraw(size, left, statistics))
        return decision if decision.size > size else None

    def _backward(self, first: int, size: int, capture: Capture | None, known: int = 0) -> torch.Tensor:
        """This rank's part of the mean loss per token of the sequences [first, first + size), without that of
        the first `known`.

        Leaves the gradient of that mean in `.grad`, which holds that of the `known` already; in a replica's
        that of its own shares.
        """
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        if known:
            torch._foreach_mul_(self._local_gradients(), known / size)
        else:
            self.optimizer.zero_grad(set_to_none=True)
        if capture:
            counts = [min(self.micro, size - start) for start in range(0, size, self.micro)]
            (capture.continue_step if known else capture.start_step)(counts)
        whole = not self.config.parallel.shard_gradients
        if capture and capture.whole is not None:
            whole = capture.whole
        units = list(self._units(first + known, size - known, self.sync.shares))
        for index, (start, count) in enumerate(units):
            unit = (start - first) // self.micro
            inputs, targets = self._training_samples(unit, start, count)
            following = units[index + 1] if index + 1 < len(units) else self._next_unit(first + size)
            self.data.request(self._place(following[0]), following[1])
            last = index + 1 == len(units)
            scale = self.ranks.loss_scale(count, of=size)
            with self.strategy.micro_batch(self.model, last=last, whole=whole), self.strategy.loss():
                unit_loss = self._loss(inputs, targets) / targets.numel()
                with capture.unit(unit) if capture else contextlib.nullcontext():
                    (unit_loss * scale).backward()
            loss += unit_loss.detach() * (count / size)
        self.strategy.complete_gradients(self.parameters)
        return loss

    def _training_samples(self, unit: int, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a micro-batch of the step that is being done."""
        length = self.imbalance.length(self.progress.step + 1, self.length, unit % self.ranks.data_ranks)
        # Also without a share: sharded parameters are gathered by all ranks together.
        inputs, targets = self._tensors(self.data.take(self._place(start), max(count, 1)))
        return (inputs, targets) if length == self.length else (inputs[:, :length], targets[:, :length])

    def _summed_gradient(
        self, loss: torch.Tensor, capture: Capture | None
    ) -> tuple[float, GradientStatistics | None, float]:
        """Of the one model: mean loss per token, statistics before clipping, and ‖g‖². All ranks meet."""
        if self.recent:
            self.recent.observe(self.progress.step, self.progress.unchanged + 1)
        # Ranks that share matrix products have the same loss.
        squared_norm = self.squared_norm(self._local_gradients())
        own = [loss.view(1) / self.ranks.tensor_ranks, squared_norm.view(1), self._requests()]
        if capture:
            own.append(capture.sums())
            if self.whole_step:
                own.append(self.squared_norm(self.whole_step.parts()).view(1))
        mean_loss, mean_sq_norm, stop, save, *sums = self.ranks.sum(torch.cat(own))
        self.stop_agreed, self.save_agreed = stop > 0, save > 0
        step_sq_norm = sums.pop() if capture and self.whole_step else None
        statistics = capture.statistics(sums, mean_sq_norm) if capture else None
        if statistics:
            averaged = self.recent.sq_norm if self.recent else None
            statistics = replace(statistics, step_sq_norm=step_sq_norm, averaged_sq_norm=averaged)
        return mean_loss, statistics, mean_sq_norm

    def _own_gradient(
        self, loss: torch.Tensor, capture: Capture | None, step: int, rate: float
    ) -> tuple[float, GradientStatistics | None, float]:
        """Of this replica: its part of the mean loss, unless another rank reports it, and ‖g‖² of what it
        will apply. Replicas meet only for statistics, which are of the gradients of their shares."""
        statistics = capture.statistics(self.ranks.sum(capture.sums()), None) if capture else None
        with self._waiting():
            self.sync.before_step(step, rate)
        own_loss = loss.item() if self.sync.loss_counts else 0.0
        return own_loss, statistics, self.squared_norm(self._local_gradients()).item()

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Around what a replica does for the others, and waits for."""
        began = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - began

    def _agree(self, loss: float, squared_norm: float) -> list[Report]:
        """Tells the other replicas of the step just done. What all of them have told meanwhile, whole up to
        this step where they are to meet."""
        assert self.agreement
        stop, save = self._requests().tolist()
        values = {"loss": loss, "squared_norm": squared_norm, "stop": stop, "save": save}
        self.observed = {"wait_s": self.waited_s, "wait_s_max": self.waited_s, **self.sync.observed()}
        values |= self.observed
        self.waited_s = 0.0
        if self.sketch:
            values |= self.sketch(self.replica.weights())
        self.save_agreed = False
        with self._waiting():  # of the next step
            reports = self.agreement.tell(values)
        self._hear(reports)
        interval = self.config.checkpoint.interval_tokens
        meet = self.finished or self.crossed(self.config.eval.interval_tokens) or self.crossed(interval)
        if meet or self.stop_agreed or self.save_agreed:
            late = self.agreement.wait()
            self.sync.settle()
            self._hear(late)
            reports += late
        return reports

    def _hear(self, reports: list[Report]) -> None:
        self.stop_agreed |= any(report["stop"].max() > 0 for report in reports)
        self.save_agreed |= any(report["save"].max() > 0 for report in reports)

    def _requests(self) -> torch.Tensor:
        """What the main rank asks of all, [stop, save], so that they agree on it in the sum of the step."""
        wanted = torch.zeros(2, dtype=torch.float64, device=self.device)
        wanted[0].fill_(self._stop_requested())
        wanted[1].fill_(self._save_due())
        return wanted

    def _stop_requested(self) -> bool:
        """Whether somebody asked for a stop, for rank 0 to tell the others; it looks now and then."""
        now = time.monotonic()
        if not self.ranks.is_main or now - self.stop_looked_at < STOP_INTERVAL_S:
            return False
        self.stop_looked_at = now
        return self.run.stop_requested() is not None

    def _save_due(self) -> bool:
        """Whether the last checkpoint is too long ago, for rank 0 to tell the others."""
        minutes = self.config.checkpoint.interval_minutes
        if not self.ranks.is_main or minutes is None:
            return False
        return time.monotonic() - self.saved_at > 60 * minutes

    def _local_gradients(self) -> list[torch.Tensor]:
        """What this rank holds of g."""
        return [local(p.grad) for p in self.parameters if p.grad is not None]

    def _units(self, first: int, size: int, shares: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(first sequence, sequences) of these shares' micro-batches: unit i of a step is always the same
        sequences, of share i mod data_ranks. At the end of the budget a unit may be short or empty."""
        ranks, micro = self.ranks.data_ranks, self.micro
        for round_start in range(0, size, ranks * micro):
            for share in shares:
                start = round_start + share * micro
                yield first + start, max(0, min(micro, size - start))

    def _place(self, start: int) -> int:
        """Where a unit that starts at sequence `start` lies in the stream that this rank reads."""
        if self.config.data.distribution == "shared":
            return start
        return start // self.config.batch_unit * self.micro  # the other ranks' units are in other streams

    def _next_unit(self, first: int) -> tuple[int, int]:
        """This rank's first micro-batch of a step that starts at `first`, whatever its batch will be."""
        return first + self.sync.shares[0] * self.micro, self.micro

    def _tensors(self, read: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.problem.tensors(read, self.device)

    def _loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Summed over targets."""
        with self.strategy.autocast():
            return self.problem.loss(self.model, inputs, targets)

    def _update(
        self, size: int, loss: float, squared_norm: float, statistics: GradientStatistics | None
    ) -> float:
        """Clips, and steps. The learning rate of the step, which may be the optimizer's own."""
        squared_norm = self._clip(squared_norm)
        if isinstance(self.optimizer, Evaluating):
            variance = statistics.variance if statistics else math.nan
            self.optimizer.step(
                Evaluation(
                    size,
                    loss,
                    squared_norm,
                    None if math.isnan(variance) else variance,
                    lambda: self._loss_again(size),
                    lambda: self._gradient_again(size),
                    self.progress.sequences,
                    self._average_replicas,
                )
            )
        else:
            self.optimizer.step()
        used: float = self.optimizer.param_groups[0]["lr"]
        return used

    def _average(self, average: Average) -> None:
        """Takes the iterate of the step just done into the mean, and goes on from that when it is time to."""
        progress, before = self.progress, self.tokens_before
        progress.averaged = average.observe(before, self.tokens, progress.averaged)
        if progress.averaged and average.restarts(before, self.tokens):
            average.go_on_from_mean()
            self._forget()
            progress.averaged = 0

    @torch.no_grad()
    def _forget(self) -> None:
        """Sets the optimizer's state to that of a new one. What that makes in its first step begins as 0; it
        is kept, since a checkpoint is read into a state that has it."""
        new = optim.build(self.model, self.config.optim).state
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                if name in new[parameter]:
                    value.copy_(new[parameter][name])
                else:
                    value.zero_()

    def _clip(self, squared_norm: float) -> float:
        """‖g‖² of `.grad` after clipping."""
        norm, clip = math.sqrt(squared_norm), self.config.optim.clip
        if clip is None or norm <= clip:
            return squared_norm
        torch._foreach_mul_(self._local_gradients(), clip / norm)
        return clip**2

    @torch.no_grad()
    def _loss_again(self, size: int) -> float:
        """The step's mean loss per token at the weights as they are now."""
        first = self.progress.sequences
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for start, count in self._units(first, size, self.sync.shares):
            inputs, targets = self._training_samples((start - first) // self.micro, start, count)
            with self.strategy.loss():
                loss += self._loss(inputs, targets) / targets.numel() * (count / size)
        self.strategy.release(self.model)
        self.progress.loss_evaluations += size
        return self.ranks.sum(loss.view(1) / self.ranks.tensor_ranks)[0]

    @torch.enable_grad()
    def _gradient_again(self, size: int) -> float:
        """Leaves the gradient at the weights as they are now in `.grad`, clipped, and returns its ‖g‖²."""
        self._backward(self.progress.sequences, size, None)
        (squared_norm,) = self.ranks.sum(self.squared_norm(self._local_gradients()).view(1))
        self.progress.gradient_evaluations += size
        return self._clip(squared_norm)

    def _average_replicas(self) -> None:
        if self.sync.replicas:
            with self._waiting():
                self.replica.set_weights(self.replica.averaged(self.replica.weights()))

    def _compare_exactly(self, size: int) -> None:
        """The gradient, before clipping, with that over all samples, unless each replica has its own."""
        if self.exact and not self.sync.replicas and self.evaluated_after(size):
            began = time.perf_counter()
            self.exact.compare(self.parameters, [p.grad for p in self.parameters if p.grad is not None])
            self.resumed_at += time.perf_counter() - began

    def _decide(self, size: int, statistics: GradientStatistics | None, tested: bool) -> None:
        """The next batch, and what the learning rate will make of it. Without statistics both follow from the
        tokens alone, the same on every rank; with them rank 0's arithmetic counts, lest ranks disagree on how
        many micro-batches come next."""
        progress = self.progress
        done = StepDone(progress.step, self.tokens, progress.sequences, size)
        decided = self.schedule.decide(progress.schedule, done, statistics if tested else None)
        noise = progress.noise
        if statistics is not None:
            noise = self.batch_scaling.observe(noise, statistics, size, progress.first_batch)
            *decided, noise = self.ranks.from_main((*decided, noise))
        progress.schedule, progress.next_batch = decided
        progress.unchanged = progress.unchanged + 1 if progress.next_batch.size == size else 0
        progress.noise = noise

    # --- evaluation, checkpoints, the record

    @torch.no_grad()
    def evaluate(self) -> None:
        """Means over the targets of the first `eval.sequences` held-out sequences; of replicas, those of
        their mean. Beside them, as `…_averaged`, those of the mean of iterates, where there is one."""
        with self.replica.replaced_by_mean() if self.sync.replicas else contextlib.nullcontext():
            evaluated = self._evaluated()
            exact = self.exact.evaluate(self.parameters) if self.exact else {}
        beside = {}
        if self.average and self.progress.averaged:
            with self.average.in_place():
                beside = {f"{name}_averaged": value for name, value in self._evaluated().items()}
        if self.ranks.is_main:
            self._log({**self._clock(), **evaluated, **beside, **exact})
        if not math.isfinite(evaluated["val/loss"]):
            raise TrainingFailed(f"step {self.progress.step}: validation loss {evaluated['val/loss']}")
        self.resumed_at = time.perf_counter()

    def _evaluated(self) -> dict[str, float]:
        """By metric."""
        held_out = self.problem.held_out
        total = min(self.config.eval.sequences, held_out.sequences_per_epoch)
        sums = torch.zeros(self.problem.sums, dtype=torch.float64, device=self.device)
        for start, count in self._units(0, total, (self.ranks.data_rank,)):
            with self.strategy.loss(), self.strategy.autocast():
                # Also without a share: sharded parameters are gathered by all ranks together.
                batch = self._tensors(held_out.read(start, max(count, 1)))
                unit_sums = self.problem.evaluate(self.model, *batch)
            sums += unit_sums if count else 0
        self.strategy.release(self.model)
        totals = torch.tensor(self.ranks.sum(sums / self.ranks.tensor_ranks), dtype=torch.float64)
        return self.problem.metrics(totals, total * self.length)

    @torch.no_grad()
    def save(self) -> None:
        (squared_norm,) = self.ranks.sum(self.squared_norm([local(p) for p in self.parameters]).view(1))
        if not math.isfinite(squared_norm):
            raise TrainingFailed(f"step {self.progress.step}: the parameters are not finite; not saved")
        self.checkpoints.save(self.progress, wait=self.finished or self.stop_agreed)
        if self.stop_agreed and not self.finished and self.ranks.is_main:
            seen = f"{self.tokens} {self.config.unit}"
            report(f"stopped at step {self.progress.step}, {seen}, with a checkpoint")
        self.resumed_at, self.saved_at = time.perf_counter(), time.monotonic()

    def publish(self) -> None:
        """Gives a checkpoint that has been written meanwhile its name."""
        if self.checkpoints.poll():
            self.resumed_at = time.perf_counter()

    def resume(self) -> None:
        """Goes on from the newest checkpoint, or starts at the beginning, or where it branches off."""
        saved = self.checkpoints.restore()
        if self.metrics:
            first = None if self.config.branch.run else 1
            self.metrics.go_on_after(saved.step if saved else 0, first, self.config.eval.interval_tokens)
        if saved:
            self.progress = saved
            if self.ranks.is_main:
                report(f"resumed at step {self.progress.step}, {self.tokens} {self.config.unit}")
        elif self.config.branch.run:
            self._branch(RunDirectory.find(self.config.branch.run))
        self.sync.start(self.progress.step)
        self.stop_agreed = self.ranks.from_main(self.run.stop_requested() is not None)
        self.resumed_at, self.saved_at = time.perf_counter(), time.monotonic()

    def _branch(self, parent: RunDirectory) -> None:
        """Takes weights, moments and the place in the stream from another run. What lr.batch_scaling makes of
        the batch is relative to the batch there."""
        if differences := not_continued(self.config, parent.config()):
            raise ConfigError(f"branch.run={parent.id}: cannot be continued with {'; '.join(differences)}")
        saved = self.checkpoints.branch(self.config.branch.tokens, parent)
        self.progress.step, self.progress.sequences = saved.step, saved.sequences
        self.progress.gradient_evaluations = saved.gradient_evaluations
        self.progress.loss_evaluations = saved.loss_evaluations
        self.progress.first_batch = saved.next_batch.size
        here = StepDone(saved.step, self.tokens, saved.sequences, 0)
        decided = self.schedule.decide(self.progress.schedule, here, None)
        self.progress.schedule, self.progress.next_batch = decided
        if self.ranks.is_main:
            report(f"branched off {parent.id} at step {saved.step}, {self.tokens} {self.config.unit}")

    def _clock(self) -> Row:
        progress = self.progress
        return {
            "step": progress.step,
            "tokens": self.tokens,
            "sequences": progress.sequences,
            **self._epochs(),
            "time": progress.time,
            "wall": time.time(),
            "attempt": self.attempt,
        }

    def _epochs(self) -> Row:
        """Full gradient evaluations: per-sample gradients over samples to train on."""
        samples = self.problem.samples
        return {"epochs": self.progress.gradient_evaluations / samples} if samples else {}

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
            "gradient_evaluations": self.progress.gradient_evaluations,
            "grad/norm": math.sqrt(squared_norm) if squared_norm >= 0 else math.nan,
            "throughput/tokens_per_s": size * self.length / seconds,
        }
        if self.progress.loss_evaluations:
            row["loss_evaluations"] = self.progress.loss_evaluations
        if self.peak_flops and isinstance(self.config.model, LlamaConfig):
            flops = row["throughput/tokens_per_s"] * flops_per_token(self.config.model, self.length)
            row["throughput/mfu"] = flops / (self.peak_flops * self.ranks.world_size)
        if self._on_gpu:
            row["memory/peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        if statistics is not None:
            row["stat/mean_sq_norm"] = statistics.mean_sq_norm
            row["stat/variance"] = statistics.variance
            row["stat/noise_scale"] = statistics.noise_scale
            if statistics.step_sq_norm is not None:
                row["stat/step_sq_norm"] = statistics.step_sq_norm
            if statistics.averaged_sq_norm is not None:
                row["stat/averaged_sq_norm"] = statistics.averaged_sq_norm
            row |= self.progress.next_batch.log
        return row

    def _log_trained(self, row: Row, reports: list[Report]) -> None:
        """The row of a step; of replicas only when all have told what they know of that step."""
        if not self.sync.replicas:
            self._log(row)
            return
        self.unreported.append(row)
        for heard in reports:
            norm = math.sqrt(heard["squared_norm"].mean())
            told = {"train/loss": float(heard["loss"].sum()), "grad/norm": norm}
            self._log({**self.unreported.popleft(), **told, **row_of(heard, list(self.observed))})

    def _log(self, row: Row) -> None:
        assert self.metrics and self.tracker
        self.metrics.write(row)
        self.tracker.log(row)
        now = time.monotonic()
        if now - self.status_at > STATUS_INTERVAL_S or self.finished:
            self.status_at = now
            if self.frozen and not self.run.exists():
                raise TrainingFailed(
                    f"step {row['step']}: {self.run.path} was deleted under the run; what it trained since "
                    f"is lost. The sweep's command begins it again"
                )
            with contextlib.suppress(OSError):  # a full disk; the next row tells
                self.run.update_status(step=row["step"], tokens_seen=row["tokens"])

    def close(self, exit_code: int) -> None:
        self.sync.abort()
        self.data.close()
        self.checkpoints.close()
        if self.tracker and self.metrics:
            with contextlib.suppress(OSError):  # of a failure, as far as this rank knows it
                for row in self.unreported:
                    self.metrics.write(row)
            self.tracker.finish(exit_code, preempted=self.run.stop_requested() == "PREEMPTED")
            with contextlib.suppress(OSError):  # rows no checkpoint covers: the next attempt does them again
                self.metrics.close()
