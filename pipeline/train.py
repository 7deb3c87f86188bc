"""The training loop, from a frozen config to the last checkpoint. Read it from `train` down."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from pipeline import optim
from pipeline.batch import schedule_class
from pipeline.batch._interface import Decision, Redrawing, StepDone
from pipeline.branch import branch_off
from pipeline.checkpoint import Checkpointer, Progress
from pipeline.config import Config, to_tree
from pipeline.data import Prefetcher
from pipeline.evaluation import evaluated
from pipeline.exact import Exact
from pipeline.gradients.capture import Capture, capture_for
from pipeline.gradients.direction import Step
from pipeline.gradients.dtensor import local
from pipeline.gradients.leaves import by_name
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
from pipeline.record import Diverged, Record, StepTaken
from pipeline.stopping import Wishes
from pipeline.store import RunDirectory, report
from pipeline.sync import method_class
from pipeline.sync._agreement import Report
from pipeline.sync._replica import Replica
from pipeline.sync._reports import Reports
from pipeline.units import Units


def _passes(interval: int | None, before: int, after: int) -> bool:
    """Whether a multiple of `interval` lies in (before, after]."""
    return interval is not None and after // interval > before // interval


def train(config: Config, run: RunDirectory, attempt: int, ranks: Ranks) -> bool:
    """Runs `config`, from the newest checkpoint if there is one, to the end of its budget or to a stop that
    somebody asks for. Whether it came to the end."""
    trainer = Trainer(config, run, attempt, ranks)
    exit_code = 1
    try:
        trainer.resume()
        while not (trainer.finished or trainer.wishes.stop):
            trainer.step()
            trainer.publish()
            if trainer.finished or trainer.crossed(config.eval.interval_tokens):
                trainer.evaluate()
            due = trainer.wishes.save or trainer.crossed(config.checkpoint.interval_tokens)
            if trainer.finished or trainer.wishes.stop or due:
                trainer.save()
        trainer.sync.close()
        exit_code = 0 if trainer.finished else 1
    finally:
        trainer.close(exit_code)
    return trainer.finished


class Trainer:
    """The state of a run on this rank, and what a step, an evaluation and a checkpoint do with it."""

    def __init__(self, config: Config, run: RunDirectory, attempt: int, ranks: Ranks) -> None:
        self.config, self.run, self.attempt, self.ranks = config, run, attempt, ranks
        self.device = ranks.device
        self.micro, self.length = config.data.micro_batch, config.data.sequence_length

        self.problem = problem_of(config, ranks)
        self.data = Prefetcher(self.problem.train)
        self.units = Units(config)

        self.strategy = strategy_class(config.parallel.strategy)(config, ranks)
        self.model: nn.Module = self.strategy.apply(self.problem.model())
        self.optimizer = optim.build(self.model, config.optim)
        self.parameters = list(self.model.parameters())
        named = by_name(self.model)
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

        self.record = Record(config, run, attempt, self.problem, self.device) if ranks.is_main else None
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
            self.record.metrics if self.record else None,
            model_settings | ({"sync.replicas": ranks.data_ranks} if self.sync.replicas else {}),
            config.checkpoint.keep,
            self.sync if self.sync.replicas else None,
        )
        self.reports = Reports(config, ranks, self.replica, self.sync) if self.sync.replicas else None
        self.wishes = Wishes(config, run, ranks)
        self.resumed_at = time.perf_counter()  # training time runs from here

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
        reports = self._exchange_reports(self.reports, loss, squared_norm) if self.reports and finite else []
        now = time.perf_counter()
        seconds, self.resumed_at = now - self.resumed_at, now
        progress.time += seconds
        if self.sync.replicas:
            loss *= self.ranks.data_ranks  # of its share, until the others have told theirs
        if self.record:
            asked = redraws if self.whole_step else None
            taken = StepTaken(size, decision, asked, rate, factor, loss, squared_norm, statistics, seconds)
            row = self.record.trained(progress, taken)
            for told in self.reports.completed(row, reports) if self.reports else [row]:
                self.record.write(told)
        if not finite:
            raise Diverged(
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
        units = list(self.units.of_shares(first + known, size - known, self.sync.shares))
        next_step = self.units.first_of_share(first + size, self.sync.shares[0])
        for index, (start, count) in enumerate(units):
            unit = (start - first) // self.micro
            inputs, targets = self._training_samples(unit, start, count)
            last = index + 1 == len(units)
            following = next_step if last else units[index + 1]
            self.data.request(self.units.place(following[0]), following[1])
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
        inputs, targets = self._tensors(self.data.take(self.units.place(start), max(count, 1)))
        return (inputs, targets) if length == self.length else (inputs[:, :length], targets[:, :length])

    def _summed_gradient(
        self, loss: torch.Tensor, capture: Capture | None
    ) -> tuple[float, GradientStatistics | None, float]:
        """Of the one model: mean loss per token, statistics before clipping, and ‖g‖². All ranks meet."""
        if self.recent:
            self.recent.observe(self.progress.step, self.progress.unchanged + 1)
        # Ranks that share matrix products have the same loss.
        squared_norm = self.squared_norm(self._local_gradients())
        own = [loss.view(1) / self.ranks.tensor_ranks, squared_norm.view(1), self.wishes.asked()]
        if capture:
            own.append(capture.sums())
            if self.whole_step:
                own.append(self.squared_norm(self.whole_step.parts()).view(1))
        mean_loss, mean_sq_norm, stop, save, *sums = self.ranks.sum(torch.cat(own))
        self.wishes.hear(stop, save)
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

    def _waiting(self) -> contextlib.AbstractContextManager[None]:
        """Around what a replica does for the others, and waits for."""
        return self.reports.waiting() if self.reports else contextlib.nullcontext()

    def _exchange_reports(self, reports: Reports, loss: float, squared_norm: float) -> list[Report]:
        """Replicas meet where an evaluation or a checkpoint follows."""
        intervals = self.config.eval.interval_tokens, self.config.checkpoint.interval_tokens
        meet = self.finished or any(self.crossed(interval) for interval in intervals)
        return reports.exchange(loss, squared_norm, self.wishes, meet)

    def _local_gradients(self) -> list[torch.Tensor]:
        """What this rank holds of g."""
        return [local(p.grad) for p in self.parameters if p.grad is not None]

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
            average.go_on_from_mean(self.optimizer, new=optim.build(self.model, self.config.optim))
            progress.averaged = 0

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
        for start, count in self.units.of_shares(first, size, self.sync.shares):
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
        state, batch = self.schedule.decide(progress.schedule, done, statistics if tested else None)
        noise = progress.noise
        if statistics is not None:
            noise = self.batch_scaling.observe(noise, statistics, size, progress.first_batch)
            state, batch, noise = self.ranks.from_main((state, batch, noise))
        progress.schedule, progress.next_batch = state, batch
        progress.unchanged = progress.unchanged + 1 if progress.next_batch.size == size else 0
        progress.noise = noise

    # --- evaluation, checkpoints, the record

    @torch.no_grad()
    def evaluate(self) -> None:
        """Means over the targets of the first `eval.sequences` held-out sequences; of replicas, those of
        their mean. Beside them, as `…_averaged`, those of the mean of iterates, where there is one."""
        with self.replica.replaced_by_mean() if self.sync.replicas else contextlib.nullcontext():
            metrics = self._evaluated()
            exact = self.exact.evaluate(self.parameters) if self.exact else {}
        beside = {}
        if self.average and self.progress.averaged:
            with self.average.in_place():
                beside = {f"{name}_averaged": value for name, value in self._evaluated().items()}
        if self.record:
            self.record.write(self.record.evaluated(self.progress, {**metrics, **beside, **exact}))
        if not math.isfinite(metrics["val/loss"]):
            raise Diverged(f"step {self.progress.step}: validation loss {metrics['val/loss']}")
        self.resumed_at = time.perf_counter()

    def _evaluated(self) -> dict[str, float]:
        return evaluated(self.config, self.problem, self.model, self.strategy, self.units, self.ranks)

    @torch.no_grad()
    def save(self) -> None:
        (squared_norm,) = self.ranks.sum(self.squared_norm([local(p) for p in self.parameters]).view(1))
        if not math.isfinite(squared_norm):
            raise Diverged(f"step {self.progress.step}: the parameters are not finite; not saved")
        self.checkpoints.save(self.progress, wait=self.finished or self.wishes.stop)
        if self.wishes.stop and not self.finished and self.ranks.is_main:
            seen = f"{self.tokens} {self.config.unit}"
            report(f"stopped at step {self.progress.step}, {seen}, with a checkpoint")
        self.wishes.saved()
        self.resumed_at = time.perf_counter()

    def publish(self) -> None:
        """Gives a checkpoint that has been written meanwhile its name."""
        if self.checkpoints.poll():
            self.resumed_at = time.perf_counter()

    def resume(self) -> None:
        """Goes on from the newest checkpoint, or starts at the beginning, or where it branches off."""
        saved = self.checkpoints.restore()
        if self.record:
            self.record.go_on_after(saved or self.progress)
        if saved:
            self.progress = saved
            if self.ranks.is_main:
                report(f"resumed at step {self.progress.step}, {self.tokens} {self.config.unit}")
        elif self.config.branch.run:
            parent = RunDirectory.find(self.config.branch.run)
            branch_off(self.config, parent, self.checkpoints, self.schedule, self.progress)
            if self.ranks.is_main:
                at = f"step {self.progress.step}, {self.tokens} {self.config.unit}"
                report(f"branched off {parent.id} at {at}")
        self.sync.start(self.progress.step)
        self.wishes.look_together()
        self.resumed_at = time.perf_counter()

    def close(self, exit_code: int) -> None:
        self.sync.abort()
        self.data.close()
        self.checkpoints.close()
        if self.record:
            self.record.close(exit_code, self.reports.incomplete() if self.reports else [])
