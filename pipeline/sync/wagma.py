"""WAGMA-SGD: wait-avoiding group model averaging (Li et al. 2021, arXiv 2005.00124, Algorithms 1 and 2).

After its optimizer step t a replica averages its model W'_t with those of a group of S replicas. The groups
change with t as the phases of a butterfly, so that an update reaches all P replicas in log_S P steps. Nobody
waits: the first replica to get there starts the exchange for all, and one that is late takes part with the
model that it sent last. On arrival it corrects for that:

    W_{t+1} = Σ/S              if W'_t is in the sum Σ,
    W_{t+1} = (Σ + W'_t)/(S+1)   if an older model of it is.

Every τ = `sync.period` steps all replicas wait for each other and average: no contribution is older than τ.
The paper numbers steps from 0, t = step − 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.sync import _interface

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from pipeline.config import Config
    from pipeline.parallel._ranks import Ranks
    from pipeline.sync._replica import Replica


class Method(_interface.Exchanging):
    settings = frozenset(["period", "group_size", "grace_ms"])
    tests_batches = True

    @staticmethod
    def check(config: Config) -> list[str]:
        ranks, size = config.parallel.replicate, group_size(config)
        problems = _interface.check_period(config)
        if not (is_power_of_two(ranks) and is_power_of_two(size) and 2 <= size <= ranks):
            near_ranks = nearest_power_of_two(ranks)
            near_size = min(max(2, nearest_power_of_two(size)), near_ranks)
            given = config.sync.group_size or "null"
            problems.append(
                f"sync.group_size={given} parallel.replicate={ranks}: sync=wagma needs powers of two, and "
                f"2 <= group_size <= replicate. Nearest: sync.group_size={near_size} "
                f"parallel.replicate={near_ranks}"
            )
        return problems

    def __init__(self, config: Config, ranks: Ranks, replica: Replica) -> None:
        from pipeline.sync._background import Background

        super().__init__(config, ranks, replica)
        self.size = group_size(config)
        self._groups = self._butterfly()
        self.background = Background(
            ranks,
            replica.weights(),
            self.ends_period,
            group_of=self._group_of,
            grace_s=self.config.grace_ms / 1000,
        )

    def after_step(self, step: int) -> None:
        own = self.replica.weights()
        self.background.contribute(step, own)
        done = self.background.result(step)
        total, members = done.total, done.members
        if done.contributed < step:
            total.add_(own)
            members += 1
        self.replica.set_weights(total.div_(members))
        self.staleness = step - done.contributed

    def observed(self) -> Mapping[str, float]:
        return self.lateness()

    def state(self) -> Mapping[str, torch.Tensor]:
        return {"sent": self.background.buffer}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self.background.buffer = state["sent"]

    def _butterfly(self) -> list[dist.ProcessGroup]:
        """This rank's group at t = 0, 1, …; they repeat. All ranks create all groups, in one order."""
        import torch.distributed as dist

        from pipeline.parallel._ranks import COLLECTIVE_TIMEOUT

        created: dict[tuple[int, ...], dist.ProcessGroup] = {}
        mine = []
        ranks = self.ranks.world_size
        for t in range(ranks.bit_length() - 1):
            for members in grouping(t, ranks, self.size):
                if members not in created:
                    created[members] = dist.new_group(list(members), timeout=COLLECTIVE_TIMEOUT)
                if self.ranks.rank in members:
                    mine.append(created[members])
        return mine

    def _group_of(self, step: int) -> dist.ProcessGroup:
        return self._groups[(step - 1) % len(self._groups)]


def grouping(t: int, ranks: int, size: int) -> list[tuple[int, ...]]:
    """The groups of step t (from 0), Algorithm 1: of ranks that agree in all bits but the log₂ S that this
    step's phases exchange, which follow those of the step before."""
    phases, rounds = ranks.bit_length() - 1, size.bit_length() - 1
    first = t * rounds % phases
    mask = sum(1 << (first + r) % phases for r in range(rounds))
    groups: dict[int, list[int]] = {}
    for rank in range(ranks):
        groups.setdefault(rank & ~mask, []).append(rank)
    return [tuple(members) for members in groups.values()]


def group_size(config: Config) -> int:
    """S; unless it is set the power of two next to √P, as in the paper, where P is one."""
    return config.sync.group_size or 1 << max(1, config.parallel.replicate.bit_length() // 2)


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def nearest_power_of_two(number: int) -> int:
    """To a number of at least 1; of two as near the smaller."""
    below = 1 << max(0, number.bit_length() - 1)
    return below if number - below <= 2 * below - number else 2 * below
