"""DaSGD: local SGD whose averaging is hidden behind further steps (Zhou et al. 2020, arXiv 2006.00441).

After every step t that is a multiple of `sync.period` the averaging of all replicas' w(t) begins in the
background. Replicas go on meanwhile, and d = `sync.delay_steps` steps later each takes the mean in place of
its own w(t) and keeps what it has learnt since:

    w(t+d) ← w̄(t) + (w(t+d) − w(t)).

This form is chosen for what it keeps, not read in the paper: the mean over the replicas is what it was
before, so no step of any replica is lost, and d = 0 is local SGD to the bit. A weighted mean
ξ w(t+d) + (1−ξ) w̄(t) would undo the share 1−ξ of the d steps. An average still on its way at the end of a run
is dropped: it would not change the mean, which is what is evaluated and exported.
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


class Method(_interface.Method):
    settings = frozenset(["period", "delay_steps"])

    @staticmethod
    def check(config: Config) -> list[str]:
        period, delay_steps = config.sync.period, config.sync.delay_steps
        nearest = min(max(0, delay_steps), period - 1)
        if delay_steps == nearest:
            return []
        return [
            f"sync.delay_steps={delay_steps}: an average arrives before the next one sets out, "
            f"0 <= delay_steps < sync.period={period}. Nearest sync.delay_steps: {nearest}"
        ]

    def __init__(self, config: Config, ranks: Ranks, replica: Replica) -> None:
        import torch.distributed as dist

        from pipeline.parallel._ranks import COLLECTIVE_TIMEOUT

        super().__init__(config, ranks, replica)
        # A group of its own: other collectives pass while one of it is on its way.
        self._group = dist.new_group(timeout=COLLECTIVE_TIMEOUT)
        self._sent = replica.weights()  # w(t) of the last averaging
        self._mean = self._sent.clone()  # w̄(t), when it has arrived
        self._work: dist.Work | None = None  # while it has not

    def after_step(self, step: int) -> None:
        since = step % self.config.period
        if since == 0:
            self._send()
        if since == self.config.delay_steps and step >= self.config.period:
            self._receive()
            progress = self.replica.weights().sub_(self._sent)
            self.replica.set_weights(progress.add_(self._mean))

    def state(self) -> Mapping[str, torch.Tensor]:
        self._receive()  # all ranks have sent theirs
        return {"sent": self._sent, "mean": self._mean}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self._sent, self._mean = state["sent"], state["mean"]

    def close(self) -> None:
        self._receive()

    def _send(self) -> None:
        import torch.distributed as dist

        self._sent = self.replica.weights()
        self._mean = self._sent.clone()
        self._work = dist.all_reduce(self._mean, group=self._group, async_op=True)

    def _receive(self) -> None:
        if self._work:
            self._work.wait()
            self._work = None
            self._mean.div_(self.ranks.world_size)
