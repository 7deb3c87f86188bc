from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.store import RunDirectory
from tests.slurm.cluster import Cluster, foreign, missing
from tests.slurm.sweeps import WORK, Sweep


def _needs(packages: str) -> None:
    """Skips the test where these packages are missing, unless SLURM is what is to be tested."""
    if packages:
        reason = f"SLURM is not installed: apt install {packages}"
        if os.environ.get("CRESCENDO_REQUIRE_SLURM") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


def _enter(cluster: Cluster, patch: pytest.MonkeyPatch) -> None:
    """Makes this the cluster that SLURM's commands mean."""
    for name in foreign(os.environ):
        patch.delenv(name)
    for name, value in cluster.environment.items():
        patch.setenv(name, value)


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    """A cluster of two nodes for all tests of this package, without accounting."""
    _needs(missing())
    with Cluster() as cluster, pytest.MonkeyPatch.context() as patch:
        _enter(cluster, patch)
        yield cluster


@pytest.fixture(autouse=True)
def empty_queue(cluster: Cluster) -> Iterator[None]:
    """No test meets the jobs of another."""
    yield
    cluster.clear()


@pytest.fixture
def start_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Cluster]]:
    """Starts another cluster with other options (those of `Cluster`) in the place of `cluster`, for one test."""
    with contextlib.ExitStack() as clusters:

        def start(**options: Any) -> Cluster:
            _needs(missing(accounting=options.get("accounting", False)))
            cluster = clusters.enter_context(Cluster(**options))
            _enter(cluster, monkeypatch)
            return cluster

        yield start


@pytest.fixture
def sweep(home: Path, small_corpus: list[str], cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    spaced = home / "a home"  # every script and command must stand the space
    spaced.mkdir()
    monkeypatch.setenv("CRESCENDO_HOME", str(spaced))
    return Sweep(spaced, small_corpus)


@pytest.fixture(scope="session")
def train_here(
    tmp_path_factory: pytest.TempPathFactory, small_corpus: list[str]
) -> Callable[..., RunDirectory]:
    """Trains a run on this machine in one go, in a home of its own."""

    def train(*overrides: str) -> RunDirectory:
        home = tmp_path_factory.mktemp("here")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CRESCENDO_HOME", str(home))
            patch.setenv("WANDB_MODE", "disabled")
            sweep = Sweep(home, small_corpus)
            sweep.pipeline(*overrides, timeout_s=400)
        (run,) = sweep.runs
        return run

    return train


@pytest.fixture(scope="session")
def uninterrupted(train_here: Callable[..., RunDirectory]) -> RunDirectory:
    """The run of `LONG`, without its waits."""
    return train_here(WORK)
