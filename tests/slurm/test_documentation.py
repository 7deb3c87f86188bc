"""The page on SLURM, typed on a real cluster; and what the page on own schedules says of jobs."""

from __future__ import annotations

from pathlib import Path

from pipeline.store import RunDirectory
from tests.batch.test_own import POWER
from tests.docs.pages import run, shell
from tests.slurm.cluster import Cluster
from tests.slurm.sweeps import SHORT, Sweep, states, training


def test_every_command_of_the_page_works(cluster: Cluster, tmp_path: Path) -> None:
    printed = run(shell("docs/slurm.md"), tmp_path, 300, WANDB_MODE="disabled")
    cluster.wait(lambda: not cluster.queue(), 120)
    runs = [RunDirectory(path) for path in sorted((tmp_path / "runs").iterdir())]
    assert states(runs) == [("DONE", 1)] * 2, printed
    assert (tmp_path / "reports/trial/report.html").exists()


def test_a_schedule_of_ones_own_goes_with_the_job(
    cluster: Cluster, sweep: Sweep, own_schedules: Path
) -> None:
    """As it was at the submission, whatever becomes of the file and of the directory."""
    file = own_schedules / "power.py"
    file.write_text(POWER)
    with cluster.out_of_service():  # the job waits
        sweep.submit(SHORT, "batch=power", "batch.max_size=32", "batch.own.power=2")
        (run,) = sweep.runs
        planned = run.config().batch_plan().sizes
        file.unlink()
        own_schedules.rmdir()
    sweep.wait(cluster)
    assert states([run]) == [("DONE", 1)]
    assert [size for _, size, _ in training(run)] == planned
    assert planned and max(planned) == 32
