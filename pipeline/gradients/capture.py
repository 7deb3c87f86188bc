"""Which way to see gradients a schedule's needs call for."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from pipeline.batch._interface import Needs
from pipeline.gradients.direction import Direction, InSample, Momentum, Previous, Step
from pipeline.gradients.leaves import by_name
from pipeline.gradients.microbatch import MicrobatchCapture
from pipeline.gradients.recent import Recent
from pipeline.gradients.sample import SampleCapture
from pipeline.gradients.statistics import GradientStatistics
from pipeline.gradients.worker import WorkerCapture
from pipeline.parallel._ranks import Ranks


class Capture(Protocol):
    """Sees the gradients of the units of one optimizer step; see the files for what a unit is."""

    @property
    def saved(self) -> Mapping[str, torch.Tensor]:
        """What a checkpoint must hold of it."""
        ...

    @property
    def whole(self) -> bool | None:
        """Whether ranks must keep their gradients whole until the step's last micro-batch, or must not."""
        ...

    def start_step(self, counts: Sequence[int]) -> None:
        """`counts`: sequences of each micro-batch of the step, over all ranks."""
        ...

    def continue_step(self, counts: Sequence[int]) -> None:
        """The step goes on after its sums were taken, with more micro-batches: `counts` of all of them. What
        was seen stays; the sums that follow are of the whole step."""
        ...

    def unit(self, index: int) -> contextlib.AbstractContextManager[None]:
        """Around the backward pass of micro-batch `index` of the step, of its share of the mean loss."""
        ...

    def sums(self) -> torch.Tensor:
        """This rank's part of what `statistics` needs, float64 [sums]; to be summed over all ranks. Called
        when `.grad` is complete and before it is clipped."""
        ...

    def statistics(self, sums: Sequence[float], mean_sq_norm: float | None) -> GradientStatistics:
        """Of the step whose `sums` over all ranks these are. `mean_sq_norm`: ‖g‖²; None where ranks are
        replicas, whose workers tell it by their products."""
        ...


def capture_for(
    needs: Needs,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    l2: float = 0.0,
    recent: Recent | None = None,
) -> Capture:
    """To be called by all ranks, after the model is distributed and has its weights. The loss of every sample
    includes `l2`/2 ‖w‖². `recent`: gradients whose mean may stand for that of a step."""
    if needs.units == "worker":
        return WorkerCapture(model, ranks, needs.coordinates)
    parameters = by_name(model)
    direction: Direction | None = None
    if needs.direction == "momentum":
        direction = Momentum(list(parameters.values()), optimizer)
    elif needs.direction == "previous":
        direction = Previous(parameters)
    elif needs.direction == "in_sample":
        direction = InSample(list(parameters.values()), recent)
    elif needs.direction == "step":
        direction = Step(list(parameters.values()), optimizer)
    if needs.units == "sample":
        return SampleCapture(model, ranks, l2, direction, needs.coordinates, needs.redraws)
    return MicrobatchCapture(model, ranks, needs.measured_units, direction)
