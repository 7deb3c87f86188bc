"""What every synchronisation method is.

Under `allreduce` the parallel strategy averages gradients and all ranks hold one model. Under every other
method each data-parallel rank is a replica: it computes the gradient of its own share of the batch and steps
its own weights, and only the method brings replicas together. One optimizer step of a replica:

    before_backward → forward and backward passes → before_step → clipping, optimizer → after_step

The passes are left out where the method has `decided` without this rank what the step applies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pipeline.batch import schedule_class

if TYPE_CHECKING:
    import torch

    from pipeline.config import Config
    from pipeline.parallel._ranks import Ranks
    from pipeline.sync._background import Background
    from pipeline.sync._replica import Replica

DEFAULT_DRIFT_STEPS, MOST_DRIFT_STEPS = 10, 50


class Method:
    """One way for replicas to agree. A subclass overrides what it does; steps are counted from 1."""

    settings: ClassVar[frozenset[str]] = frozenset()  # the sync.* settings that can change its result
    replicas: ClassVar[bool] = True  # False: the strategy averages gradients, there is one model
    tests_batches: ClassVar[bool] = False  # gradients can be compared, in the steps that `check` allows

    def __init__(self, config: Config, ranks: Ranks, replica: Replica) -> None:
        self.config, self.ranks, self.replica = config.sync, ranks, replica

    @staticmethod
    def check(config: Config) -> list[str]:
        """Problems of a config with this method, for the user; empty when it can run."""
        return []

    @property
    def drift_steps(self) -> int:
        """How many steps ranks do between two reports to each other. A rank is at most twice as many steps
        ahead of another, and a wish to stop takes as long to be heard."""
        return min(self.config.period, MOST_DRIFT_STEPS) if "period" in self.settings else DEFAULT_DRIFT_STEPS

    @property
    def shares(self) -> Sequence[int]:
        """The data-parallel shares of every batch whose gradients this rank computes, and sums."""
        return (self.ranks.data_rank,)

    def start(self, step: int) -> None:
        """Before the first step of an attempt, which is `step` + 1; replicas have their weights."""

    def before_backward(self, step: int) -> None:
        """Replicas hold the weights at which the gradient will be computed."""

    def decided(self, step: int) -> bool:
        """After `before_backward`: whether what this step applies is known without this rank's gradient,
        which is then not computed."""
        return False

    def before_step(self, step: int, rate: float) -> None:
        """`.grad` holds the gradient of this replica's share; may be replaced by what is to be applied at the
        learning rate `rate`."""

    @property
    def loss_counts(self) -> bool:
        """After `before_step`: whether the loss of this rank's shares counts, as that of each share must once
        over all ranks."""
        return True

    def after_step(self, step: int) -> None:
        """The optimizer has moved this replica's weights."""

    def settle(self) -> None:
        """All ranks have done the same steps, and the mean of their weights is looked at next: what is still
        on its way to this rank's is to arrive."""

    def observed(self) -> Mapping[str, float]:
        """What this rank saw in the step just done, by name; the same names in every step. The record shows
        the mean over ranks under `sync/<name>`, and the largest where the name ends in `max`."""
        return {}

    def state(self) -> Mapping[str, torch.Tensor]:
        """What a checkpoint between two steps must hold of this rank, besides weights and moments. Called
        when all ranks have done the same steps."""
        return {}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes back, before `start`, what `state` returned."""

    def close(self) -> None:
        """All ranks have done their last step, the same on all."""

    def abort(self) -> None:
        """This rank gives up, or is closed already: no thread of it may be left."""


class Exchanging(Method):
    """A method whose exchanges go on in a thread, but for the last one of every `sync.period` steps, in which
    all ranks wait for each other."""

    background: Background
    staleness = 0  # steps that this rank's contribution to the last exchange was old

    def start(self, step: int) -> None:
        self.background.start(step)

    def lateness(self) -> Mapping[str, float]:
        return {"fresh": float(self.staleness == 0), "staleness_max": float(self.staleness)}

    def ends_period(self, step: int) -> bool:
        return step % self.config.period == 0

    def close(self) -> None:
        self.background.close()

    def abort(self) -> None:
        self.background.abort()


def check_period(config: Config) -> list[str]:
    """That a batch test falls on a synchronisation: it compares the last gradients before replicas meet, as
    Lau et al. 2024 (arXiv 2406.13936) do for local SGD."""
    interval, period = config.batch.interval, config.sync.period
    if not schedule_class(config.batch.schedule)(config).needs or interval % period == 0:
        return []
    nearest = max(1, round(interval / period)) * period
    return [
        f"batch.interval={interval}: sync={config.sync.method} compares gradients when replicas meet, every "
        f"sync.period={period} steps. Nearest batch.interval: {nearest}"
    ]
