"""Vectors that ranks send each other without blocking."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist

from pipeline.parallel._ranks import COLLECTIVE_TIMEOUT


class Messages:
    """One exchange at a time, in a process group of its own. All ranks make one, in one order.

    `unread`: how many earlier exchanges may be over for this rank before who is sent to has come to them.
    Under nccl sends and receives end together.
    """

    def __init__(self, backend: str | None = None, unread: int = 0) -> None:
        self.group = dist.new_group(backend=backend, timeout=COLLECTIVE_TIMEOUT)
        self._unread = unread
        self._sent: deque[tuple[torch.Tensor, list[dist.Work]]] = deque()  # the vector lives as long
        self._received: tuple[list[torch.Tensor], list[dist.Work]] = [], []

    def start(self, own: torch.Tensor, to: Sequence[int], sources: Sequence[int]) -> None:
        """Sends `own`, which must not change any more, and awaits a vector as long of every source."""
        vectors = [torch.empty_like(own) for _ in sources]
        sends = [dist.P2POp(dist.isend, own, rank, self.group) for rank in to]
        receives = [
            dist.P2POp(dist.irecv, vector, rank, self.group)
            for vector, rank in zip(vectors, sources, strict=True)
        ]
        works = dist.batch_isend_irecv([*receives, *sends])  # one each, or under nccl one for all
        self._received = vectors, works[: len(receives)]
        self._sent.append((own, works[len(receives) :]))

    def finish(self) -> list[torch.Tensor]:
        """What came, in the order of the sources; waits for these."""
        (vectors, works), self._received = self._received, ([], [])
        for work in works:
            work.wait()
        while len(self._sent) > self._unread:
            _, works = self._sent.popleft()
            for work in works:
                work.wait()
        return vectors
