"""What an optimizer may ask of the step that it takes, beyond `.grad`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pipeline.gradients.dtensor import local
from pipeline.optim._uncompiled import Uncompiled


@dataclass
class Evaluation:
    """The loss and the gradient of the step's own samples, over all ranks, in the units of the step: means
    per target, of the same targets. All ranks call the same."""

    samples: int  # sequences of the step
    loss: float  # at the weights at which the step begins
    squared_norm: float  # ‖g‖² of what `.grad` holds, hence after clipping
    variance: float | None  # tr Σ of one sequence's gradient, where the step was measured
    loss_again: Callable[[], float]  # at the weights as they are now
    gradient_again: Callable[[], float]  # the same; leaves it in `.grad`, clipped, and returns its ‖g‖²
    first: int  # sequences before the step
    average_replicas: Callable[[], None]  # gives replicas the mean of their weights; nothing to one model


class Evaluating(Uncompiled):
    """An optimizer whose step is given an Evaluation, in the place where torch has a closure. A step without
    one, at rate 0 with gradients of 0, is torch's way to make the state that a checkpoint is read into."""

    def step(self, closure: Evaluation | None = None) -> None:
        raise NotImplementedError

    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def weights(self) -> list[Tensor]:
        """What this rank holds of them."""
        return [local(parameter.detach()) for parameter in self.parameters()]

    def gradients(self) -> list[Tensor]:
        """What this rank holds of g."""
        return [local(parameter.grad) for parameter in self.parameters() if parameter.grad is not None]
