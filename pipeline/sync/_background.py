"""Exchanges between ranks that go on without their main threads.

Every rank has one communication thread, which runs exchange 1, 2, 3, …, one per optimizer step, strictly in
order; it alone uses the process groups of the exchanges, so that collectives cannot cross.

An exchange begins on all ranks as soon as `quorum` of them have reached it, whoever they are: the main thread
that completes the quorum sets a key in a store, for which all communication threads wait. A rank whose main
thread is late takes part with what its buffer holds. Activation is global, not per group, for a reason: a
rank that reaches step t has passed all earlier ones, so the keys of 1 … t are set and every communication
thread gets to t by itself. With keys per group an early rank could meet a partner whose thread still waits
for an earlier exchange of another group, and would wait for a late main thread after all.

Ranks that compute the same form a cluster. Each cluster has a key of its own, an exchange begins when all
keys are set, and of each cluster only the rank that set the key puts its buffer into the sum. That is global
as well: all communication threads wait for all keys.

At steps where `waits` says so there is no key: each communication thread waits for its own main thread.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipeline.parallel._ranks import COLLECTIVE_TIMEOUT, Ranks

_CLOSE, _ABORT = "close", "abort"  # in a key, instead of a rank
_ABORT_TRIES, _ABORT_WAIT_S = 20, 0.1


class PeerLeft(RuntimeError):
    """Another rank gave up: that one knows why."""


@dataclass(frozen=True)
class Exchange:
    """What came of the exchange of one step."""

    total: torch.Tensor  # the sum over the members of the group, [n]
    members: int
    # The newest step of this rank that is in the sum. Below the exchange's own: it was late, or another of
    # its cluster contributed.
    contributed: int


def stores(ranks: Ranks) -> tuple[dist.TCPStore, dist.TCPStore]:
    """Two connections to a store of this run's own, which rank 0 has: one for the main thread, one to wait
    on. A connection on which a thread waits is locked until it has its answer."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    server = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if ranks.is_main else None
    port = ranks.from_main(server.port if server else 0)
    waiting = dist.TCPStore(host, port, is_master=False)
    waiting.set_timeout(COLLECTIVE_TIMEOUT)
    return server or dist.TCPStore(host, port, is_master=False), waiting


class Activation:
    """Keys in a store of this run's own, one per cluster of `cluster_size` ranks, which `quorum` of them set
    together: it holds the last of these."""

    def __init__(self, ranks: Ranks, quorum: int, cluster_size: int) -> None:
        self._quorum, self._rank = quorum, ranks.rank
        self._cluster, self._clusters = ranks.rank // cluster_size, ranks.world_size // cluster_size
        self._asking, self._waiting = stores(ranks)

    def ask(self, step: int) -> None:
        """This rank has reached a step that had not begun."""
        if self._quorum == 1 or self._asking.add(_count(step, self._cluster), 1) == self._quorum:
            self._set(_key(step, self._cluster), str(self._rank))

    def wait(self, step: int) -> list[int] | None:
        """Who set the keys, when the exchange is to begin; None when the run is to be closed."""
        while True:
            # Timed out: others may evaluate for long, and who is dead is not for this thread to find out.
            with contextlib.suppress(dist.DistStoreError):
                keys = [_key(step, cluster) for cluster in range(self._clusters)]
                words = [word.decode() for word in self._waiting.multi_get(keys)]
                if _ABORT in words:
                    raise PeerLeft(f"a peer gave up before the exchange of step {step}")
                return None if _CLOSE in words else [int(word) for word in words]

    def end(self, step: int, orderly: bool) -> None:
        """Wakes whoever waits for this step."""
        for cluster in range(self._clusters):
            self._set(_key(step, cluster), _CLOSE if orderly else _ABORT)

    def forget(self, steps: range) -> None:
        for step, cluster in itertools.product(steps, range(self._clusters)):
            self._waiting.delete_key(_key(step, cluster))
            if self._quorum > 1:
                self._waiting.delete_key(_count(step, cluster))

    def _set(self, key: str, word: str) -> None:
        self._asking.compare_set(key, "", word)  # the first word stands


def _key(step: int, cluster: int) -> str:
    return f"step/{step}/{cluster}"


def _count(step: int, cluster: int) -> str:
    return f"count/{step}/{cluster}"


class Background:
    """The communication thread of this rank. The main thread calls `contribute` and `result` in every step.

    `start`: what the buffer [n] holds before the first step. `adds`: a contribution is added to what was not
    sent yet, and the buffer is empty after an exchange; otherwise it replaces it, and the buffer keeps it.
    `waits(step)`: whether the main threads are waited for; then, and without a `group_of(step)`, which names
    this rank's group, all ranks exchange. `grace_s`: how long an exchange waits for the own main thread when
    that is only one step behind. `cluster_size`: so many consecutive ranks compute the same, one of them
    contributes; None: every rank does.
    """

    def __init__(
        self,
        ranks: Ranks,
        start: torch.Tensor,
        waits: Callable[[int], bool],
        *,
        group_of: Callable[[int], dist.ProcessGroup] | None = None,
        adds: bool = False,
        quorum: int = 1,
        grace_s: float = 0.0,
        cluster_size: int | None = None,
    ) -> None:
        self._ranks, self._group_of, self._waits = ranks, group_of, waits
        self._everyone = dist.new_group(timeout=COLLECTIVE_TIMEOUT)
        self._adds, self._grace_s = adds, grace_s
        self.buffer = start
        self._activation = Activation(ranks, quorum, cluster_size or ranks.world_size)
        self._all_contribute = cluster_size is None
        self._first_ranks = list(range(0, ranks.world_size, cluster_size or ranks.world_size))
        self._changed = threading.Condition()  # guards everything below, and the buffer
        self._arrived = self._started = self._done = 0  # newest step of: the main thread, this thread
        self._results: dict[int, Exchange] = {}  # those that the main thread has not fetched
        self._error: BaseException | None = None
        self._closing = False
        self._forgotten = 0  # the newest step whose key is deleted
        self._thread = threading.Thread(target=self._run, name="exchanges", daemon=True)

    def start(self, step: int) -> None:
        """After `step` steps were done, by an earlier attempt or none."""
        self._arrived = self._started = self._done = self._forgotten = step
        self._thread.start()

    # --- the main thread

    @torch.no_grad()
    def contribute(self, step: int, own: torch.Tensor) -> None:
        """Puts `own` [n] into the buffer and asks for the exchange, unless that has begun without it."""
        if own.is_cuda:
            torch.cuda.current_stream().synchronize()  # the other thread's stream reads it
        with self._changed:
            begun = self._started >= step
            self.buffer.add_(own) if self._adds else self.buffer.copy_(own)
            if own.is_cuda:
                torch.cuda.current_stream().synchronize()
            self._arrived = step
            self._changed.notify_all()
        if not begun and not self._waits(step):
            self._activation.ask(step)

    def begun(self, step: int) -> bool:
        """Whether the exchange of this step has begun: where this rank has not contributed, without it."""
        with self._changed:
            return self._started >= step

    def result(self, step: int) -> Exchange:
        """Waits for the exchange of this step. Raises RuntimeError when it failed."""
        with self._changed:
            # Collectives have a timeout of their own; this one bounds a thread that died without a word.
            limit_s = 2 * COLLECTIVE_TIMEOUT.total_seconds()
            if not self._changed.wait_for(lambda: self._error or self._done >= step, limit_s):
                raise TimeoutError(f"the exchange of step {step} is not done after {limit_s:.0f} s")
            if self._done < step:
                raise RuntimeError(f"the exchange of step {step} failed: {self._error}") from self._error
            exchange = self._results.pop(step)
        if exchange.total.is_cuda:
            exchange.total.record_stream(torch.cuda.current_stream())
        return exchange

    def close(self) -> None:
        """All ranks have fetched the result of their last step, which is the same on all."""
        self._end(orderly=True)
        self._thread.join(COLLECTIVE_TIMEOUT.total_seconds())
        dist.barrier()  # rank 0 has the store, and must not leave before the others

    def abort(self) -> None:
        """Ends the thread wherever it is. The others learn of it, at once where they wait for an exchange."""
        for _ in range(_ABORT_TRIES):  # it may be one exchange further each time
            if not self._thread.is_alive():
                return
            with contextlib.suppress(dist.DistError):  # without rank 0's store it ends by itself
                self._end(orderly=False)
            self._thread.join(_ABORT_WAIT_S)

    def _end(self, orderly: bool) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            following = self._done + 1
        self._activation.end(following, orderly)

    # --- the communication thread

    def _run(self) -> None:
        stream: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self.buffer.is_cuda:
            torch.cuda.set_device(self.buffer.device)
            stream = torch.cuda.stream(torch.cuda.Stream(priority=-1))
        try:
            step = self._done + 1
            with stream, torch.no_grad():
                while self._exchange(step):
                    step += 1
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _exchange(self, step: int) -> bool:
        """Whether it took place; if not, the run is over."""
        waits = self._waits(step)
        firsts = self._first_ranks if waits else self._activation.wait(step)
        if firsts is None:
            return False
        with self._changed:
            if waits:
                self._changed.wait_for(lambda: self._arrived >= step or self._closing)
                if self._arrived < step:
                    return False
            elif self._grace_s and self._arrived == step - 1:
                self._changed.wait_for(lambda: self._arrived >= step or self._closing, self._grace_s)
            # Fresh or late is settled here, together with the copy: a main thread arrives before or after.
            self._started = step
            if self._all_contribute or self._ranks.rank in firsts:
                total, contributed = self.buffer.clone(), self._arrived
            else:
                total, contributed = torch.zeros_like(self.buffer), 0
            if self._adds:
                self.buffer.zero_()
            if total.is_cuda:
                torch.cuda.current_stream().synchronize()
        group = self._everyone if waits or self._group_of is None else self._group_of(step)
        dist.all_reduce(total, group=group)
        if total.is_cuda:
            torch.cuda.current_stream().synchronize()
        if waits and self._ranks.is_main:  # nobody asks any more for what came before
            self._activation.forget(range(self._forgotten + 1, step))
            self._forgotten = step
        with self._changed:
            self._results[step] = Exchange(total, group.size(), contributed)
            self._done = step
            self._changed.notify_all()
        return True
