"""The page on SLURM, typed on a real cluster."""

from __future__ import annotations

from pathlib import Path

from pipeline.store import RunDirectory
from tests.docs.pages import run, shell
from tests.slurm.cluster import Cluster
from tests.slurm.sweeps import states


def test_every_command_of_the_page_works(cluster: Cluster, tmp_path: Path) -> None:
    printed = run(shell("docs/slurm.md"), tmp_path, 300, WANDB_MODE="disabled")
    cluster.wait(lambda: not cluster.queue(), 120)
    runs = [RunDirectory(path) for path in sorted((tmp_path / "runs").iterdir())]
    assert states(runs) == [("DONE", 1)] * 2, printed
    assert (tmp_path / "reports/trial/report.html").exists()
