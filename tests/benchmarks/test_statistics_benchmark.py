"""What the benchmark of statistics counts and compares, on a model that takes no time."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.statistics import Footprint, footprint, step_times
from tests.distributed import gloo_ranks, ranks_of
from tests.gradients.support import SMALL
from tests.support import config

TINY = ["data.sequence_length=32", *SMALL]


def test_every_variant_takes_its_steps(home: Path, small_corpus: list[str]):
    overrides = [*TINY, *small_corpus]
    (seconds,) = step_times(ranks_of(config(*overrides)), "single", overrides, 8, (4,)).values()
    assert {len(steps) for steps in seconds.values()} == {4}
    assert {"plain", "norm", "products with momentum", "vmap on a copy"} <= seconds.keys()


def ddp_footprint(rank: int, overrides: list[str]) -> Footprint:
    return footprint(ranks_of(config(*overrides), rank), overrides, 2, "plain")


def test_ddp_sends_the_gradient_once_a_step(home: Path, small_corpus: list[str]):
    """A ring of two ranks passes on as many bytes as are reduced; the loss and ‖g‖² of all add a few."""
    overrides = [*TINY, *small_corpus, "parallel=ddp"]
    sent = gloo_ranks(2, ddp_footprint, overrides)[0].sent_mib
    gradient = config(*overrides).model.parameters * 4 / 2**20
    assert sent == pytest.approx(gradient, abs=1e-3)
