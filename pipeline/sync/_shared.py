"""Weights that other ranks average with their own at any time, whatever the main thread of this one does.

They lie in the memory of the CPU and travel by gloo, also where the model is on a GPU: who talks to whom is
not known beforehand, and a kernel of nccl that waits for its partner would hold up the device.

A rank that asks sends its weights a and gets b, those here. Both then move by half the difference, this one
by (a − b)/2, the other by (b − a)/2. What the main threads did to their weights meanwhile stays: it is as if
they had done it after the averaging. So the mean is conserved, and no lock is held during communication.
"""

from __future__ import annotations

import contextlib
import threading

import torch
import torch.distributed as dist

from pipeline.parallel._ranks import COLLECTIVE_TIMEOUT, Ranks
from pipeline.sync._background import stores

_END = "end"


class Requests:
    """For every rank a list of who asked it, in the order in which they did. It is in a store because gloo
    cannot wait for a message and for the own main thread's wish to end at a time."""

    def __init__(self, ranks: Ranks) -> None:
        self._asking, self._waiting = stores(ranks)

    def put(self, rank: int, word: str) -> None:
        number = self._asking.add(f"requests/{rank}", 1)
        self._asking.set(_key(rank, number), word)

    def get(self, rank: int, number: int) -> str:
        """The request of this number, from 1; waits for it."""
        while True:
            # Timed out: others may compute or evaluate for long.
            with contextlib.suppress(dist.DistStoreError):
                word: bytes = self._waiting.get(_key(rank, number))
                self._waiting.delete_key(_key(rank, number))
                return word.decode()


def _key(rank: int, number: int) -> str:
    return f"request/{rank}/{number}"


class Shared:
    """This rank's shared weights [n], and the thread that answers who asks for them. `group`: of gloo, which
    nothing else on this rank uses."""

    def __init__(
        self, rank: int, weights: torch.Tensor, requests: Requests, group: dist.ProcessGroup
    ) -> None:
        self.weights = weights
        self._rank, self._requests, self._group = rank, requests, group
        self._changed = threading.Condition()  # guards everything below, and the weights
        self._answered = 0  # requests, since `start`
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # --- the main thread

    def move(self, change: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Adds `change`. A copy of the weights, and how many requests are answered in them."""
        with self._changed:
            self._check()
            self.weights.add_(change)
            return self.weights.clone(), self._answered

    def settled(self, answered: int) -> torch.Tensor:
        """A copy of the weights as soon as so many requests are answered."""
        limit_s = 2 * COLLECTIVE_TIMEOUT.total_seconds()
        with self._changed:
            if not self._changed.wait_for(lambda: self._error or self._answered >= answered, limit_s):
                raise TimeoutError(f"{self._answered} of {answered} requests answered after {limit_s:.0f} s")
            self._check()
            return self.weights.clone()

    def end(self, limit_s: float) -> None:
        """Ends the thread, after what it was asked before; waits for that no longer than `limit_s`."""
        if self._thread.is_alive():
            with contextlib.suppress(dist.DistError):  # without rank 0's store it ends by itself
                self._requests.put(self._rank, _END)
            self._thread.join(limit_s)

    def _check(self) -> None:
        if self._error:
            raise RuntimeError(f"answering other ranks failed: {self._error}") from self._error

    # --- the thread that answers

    def _run(self) -> None:
        try:
            number = 1
            while self._answer(number):
                number += 1
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _answer(self, number: int) -> bool:
        """Whether there was a request, and not the end."""
        word = self._requests.get(self._rank, number)
        if word == _END:
            return False
        asker = int(word)
        theirs = torch.empty_like(self.weights)
        dist.recv(theirs, asker, group=self._group)
        own = self._snapshot()
        dist.send(own, asker, group=self._group)
        self._settle(theirs.sub_(own).div_(2))
        return True

    def _snapshot(self) -> torch.Tensor:
        with self._changed:
            return self.weights.clone()

    def _settle(self, change: torch.Tensor) -> None:
        with self._changed:
            self.weights.add_(change)
            self._answered += 1
            self._changed.notify_all()
