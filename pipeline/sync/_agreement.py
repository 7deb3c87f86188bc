"""What replicas tell each other without waiting for each other.

Where replicas run ahead of one another no step may end with a collective. So reports of several steps travel
together, in the background, and are read when as many more steps are done: by then the others have usually
sent theirs. They are read after the same step on every rank, so what follows from them is agreed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pipeline.gradients.exchange import all_gather
from pipeline.parallel._ranks import COLLECTIVE_TIMEOUT, Ranks
from pipeline.store import Row

SKETCH_COLUMNS = 512
ROWS = 2**11  # of the weights that are worked on at a time

Report = dict[str, NDArray[np.float64]]  # of one step: by name, a value of every rank


class Agreement:
    """Exchanges a few numbers of every step, every `interval` steps. All ranks call `tell` in every step and
    `wait` after the same steps."""

    def __init__(self, ranks: Ranks, interval: int) -> None:
        self._ranks, self._interval = ranks, interval
        # A group of its own, on the CPU: no other collective may come between.
        self._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        self._names: list[str] = []
        self._own: list[list[float]] = []  # not sent yet
        self._sent: tuple[dist.Work, torch.Tensor] | None = None

    def tell(self, values: Mapping[str, float]) -> list[Report]:
        """At the end of an interval: the reports of the one before."""
        self._names = list(values)
        self._own.append(list(values.values()))
        if len(self._own) < self._interval:
            return []
        arrived = self._receive()
        self._send()
        return arrived

    def wait(self) -> list[Report]:
        """All outstanding reports. Every rank has then come as far as this one."""
        arrived = self._receive()
        if self._own:
            self._send()
        return arrived + self._receive()

    def _send(self) -> None:
        own = torch.tensor(self._own, dtype=torch.float64)  # [steps, values]
        self._own = []
        everyone = torch.empty(self._ranks.world_size * len(own), own.shape[1], dtype=torch.float64)
        work = all_gather(everyone, own, group=self._group, async_op=True)
        assert work is not None
        self._sent = work, everyone

    def _receive(self) -> list[Report]:
        if self._sent is None:
            return []
        (work, everyone), self._sent = self._sent, None
        work.wait()
        of_ranks = everyone.view(self._ranks.world_size, -1, len(self._names))
        of_steps = of_ranks.permute(1, 2, 0).numpy()  # [steps, values, ranks]
        return [dict(zip(self._names, of_step, strict=True)) for of_step in of_steps]


class Sketch:
    """Distances between the replicas' weights, from a few numbers of each.

    Weights get random signs and are summed into SKETCH_COLUMNS columns. The squared distance of two sketches
    is that of the weights on average over the signs, with a standard error of at most √(2/columns) = 6 %
    (Alon, Matias, Szegedy 1996, for one column).
    """

    def __init__(self, size: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self._padding = -size % SKETCH_COLUMNS
        signs = torch.randint(0, 2, (size + self._padding,), generator=generator, dtype=torch.int8)
        self._signs = signs.mul_(2).sub_(1).to(device)

    def __call__(self, weights: torch.Tensor) -> dict[str, float]:
        """Of weights [n]: values to be told."""
        padded = torch.nn.functional.pad(weights, (0, self._padding)).view(-1, SKETCH_COLUMNS)
        signs = self._signs.view(-1, SKETCH_COLUMNS)
        columns = torch.zeros(SKETCH_COLUMNS, dtype=torch.float64, device=weights.device)
        for start in range(0, len(padded), ROWS):
            part = slice(start, start + ROWS)
            # In float64: distances are far smaller than the weights.
            columns += (padded[part].double() * signs[part]).sum(0)
        return {f"sketch/{index}": value for index, value in enumerate(columns.tolist())}


def consensus_distance(report: Report) -> float:
    """mean_r ‖W_r − W̄‖² / ‖W̄‖² over ranks, estimated from their sketches."""
    sketches = np.stack([values for name, values in report.items() if name.startswith("sketch/")])
    mean = sketches.mean(axis=1, keepdims=True)
    distance = np.square(sketches - mean).sum(axis=0).mean()
    return float(distance / np.square(mean).sum())


def row_of(report: Report, observed: Sequence[str]) -> Row:
    """What the record shows of what the ranks observed: the mean, of names in `max` the largest."""
    row: Row = {}
    for name in observed:
        values = report[name]
        row[f"sync/{name}"] = float(values.max() if name.endswith("max") else values.mean())
    if "sketch/0" in report:
        row["sync/consensus"] = consensus_distance(report)
    return row
