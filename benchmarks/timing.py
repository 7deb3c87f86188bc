"""Step times of variants that take turns, and ratios of them."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import torch

Seconds = dict[str, list[tuple[float, float]]]  # of each step of each variant: wall, processor


def in_turns(variants: dict[str, Callable[[], None]], rounds: int, warm_up: int = 2) -> Seconds:
    """One step of each variant a round, in random order; `warm_up` rounds before that are left out."""
    seconds: Seconds = {name: [] for name in variants}
    order, names = random.Random(0), list(variants)  # the same order on all ranks
    for turn in range(rounds + warm_up):
        order.shuffle(names)
        for name in names:
            wall, processor = time.perf_counter(), time.process_time()
            variants[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warm_up:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return seconds


def ratio(above: list[tuple[float, float]], below: list[tuple[float, float]]) -> dict[str, float]:
    """Of the times within a round: the median, with its quartiles, and that of processor time. And of the
    fastest steps, which other work on the machine disturbs least."""
    pairs = list(zip(above, below, strict=True))
    q1, median, q3 = statistics.quantiles([a[0] / b[0] for a, b in pairs], n=4)
    return {
        "ratio": median,
        "q1": q1,
        "q3": q3,
        "processor": statistics.median(a[1] / b[1] for a, b in pairs),
        "fastest": min(above)[0] / min(below)[0],
    }
