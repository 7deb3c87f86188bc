"""What can go wrong between a command and the cluster's queue."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.disk import fill, mounted
from tests.slurm.cluster import Cluster
from tests.slurm.sweeps import LONG, SHORT, SMALL, Sweep, states


def wrapper(directory: Path, program: str, script: str) -> str:
    """A PATH on which `program` is this script, with the real one as $REAL."""
    directory.mkdir()
    file = directory / program
    file.write_text(f"#!/bin/bash\nREAL={shutil.which(program)}\n{script}\n")
    file.chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("program", "moment"),
    [
        pytest.param("sbatch", '[[ "$*" == *test-only* ]] && exec $REAL "$@"; $REAL "$@"', id="sbatch"),
        pytest.param("scontrol", '[[ $1 == release ]] || exec $REAL "$@"', id="release"),
    ],
)
def test_killed_on_the_way(
    cluster: Cluster, sweep: Sweep, tmp_path_factory: pytest.TempPathFactory, program: str, moment: str
) -> None:
    """Right after sbatch has taken an array, and right before the release: the same command does the rest, and
    every run once."""
    path = wrapper(tmp_path_factory.mktemp("bin") / "bin", program, f"{moment}\nkill -9 $PPID")
    sweep.submit(SHORT, "seed=0,1,2", expect=-9, env=os.environ | {"PATH": path})
    assert set(cluster.queue().values()) == {"PENDING"}  # on hold: nothing runs that is not recorded
    assert ("held" in sweep.launchers("status", "s")) == (program == "scontrol")  # else no run knows its job
    told = sweep.submit(SHORT, "seed=0,1,2")
    assert "interrupted" in told
    sweep.wait(cluster, reports=True)
    assert states(sweep.runs) == [("DONE", 1)] * 3
    assert (sweep.home / "reports/s/report.html").exists()
    assert all(job["released"] for job in sweep.jobs)


def test_two_people_at_once(cluster: Cluster, sweep: Sweep) -> None:
    command = [
        *[sys.executable, "-m", "pipeline", "-m", *sweep.corpus, *SMALL, SHORT],
        *["seed=0,1,2,3", "hydra/launcher=slurm"],
    ]
    before = set(cluster.history())
    people = [subprocess.Popen(command, cwd=sweep.home, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [person.communicate(timeout=120)[0] for person in people]
    assert [person.returncode for person in people] == [0, 0], told
    sweep.wait(cluster)
    assert states(sweep.runs) == [("DONE", 1)] * 4
    assert len(sweep.batches()) == 1 and len(set(cluster.history()) - before) == 4 + 1


def test_arrays_are_split_where_the_cluster_limits_them(
    start_cluster: Callable[..., Cluster], sweep: Sweep
) -> None:
    cluster = start_cluster(max_array_size=3)
    sweep.submit(SHORT, "seed=range(5)", "launch.max_parallel=2")
    assert [len(batch["ids"]) for batch in sweep.batches()] == [3, 2]
    sweep.wait(cluster)
    assert states(sweep.runs) == [("DONE", 1)] * 5


def test_a_cluster_without_arrays(start_cluster: Callable[..., Cluster], sweep: Sweep) -> None:
    cluster = start_cluster(max_array_size=1)
    told = sweep.submit(SHORT, "seed=range(3)", "launch.max_parallel=2")
    assert "launch.max_parallel=2: cannot be kept" in told
    (batch,) = sweep.batches()
    assert len(set(batch["ids"])) == 3 and not any("_" in id_ for id_ in batch["ids"])
    sweep.wait(cluster)
    assert states(sweep.runs) == [("DONE", 1)] * 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launch.partition=maim"], "Partitions: high, main"),
        (["launch.device=auto", "parallel=ddp", "parallel.replicate=4"], "launch.device=cpu"),
        (["parallel=ddp", "parallel.replicate=6", "launch.gpus_per_node=2"], "for 3 × 2 ranks"),
        (['launch.sbatch=["nonsense=1"]'], "nonsense"),
    ],
)
def test_what_the_cluster_refuses_is_told_before_anything_is_written(
    cluster: Cluster, sweep: Sweep, overrides: list[str], message: str
) -> None:
    told = sweep.submit(SHORT, "batch.size=24", *overrides, expect=2)
    assert message in told and "Traceback" not in told
    assert not (sweep.home / "runs").exists() and not cluster.queue()


def test_expensive_sweeps_are_confirmed(cluster: Cluster, sweep: Sweep) -> None:
    """24 runs of 2 GPUs for 10 minutes: 8 GPU-hours."""
    costly = [SHORT, "seed=range(24)", "parallel=ddp", "launch.device=auto", "launch.confirm_gpu_hours=7"]
    told = sweep.submit(*costly, expect=3)
    assert "8 GPU-hours" in told and "launch.confirm_gpu_hours=8" in told
    assert not (sweep.home / "runs").exists() and not cluster.queue()


def test_a_full_disk(cluster: Cluster, small_corpus: list[str], small_disk: Path) -> None:
    sweep = Sweep(small_disk, small_corpus)
    fill(small_disk, leave=16384)
    told = sweep.submit(SHORT, "seed=range(8)", expect=2)
    assert "No space left on device" in told and "Traceback" not in told
    assert not cluster.queue()
    (small_disk / "ballast").unlink()
    sweep.submit(SHORT, "seed=range(2)")
    sweep.wait(cluster)
    assert ("DONE", 1) in states(sweep.runs) and not any(attempts > 1 for _, attempts in states(sweep.runs))


def test_a_home_that_cannot_be_written(
    cluster: Cluster, small_corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted(tmp_path / "disk", "1m") as disk:
        monkeypatch.setenv("CRESCENDO_HOME", str(disk))
        sweep = Sweep(disk, small_corpus)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        told = sweep.submit(SHORT, expect=2)
    assert "Read-only file system" in told and "Traceback" not in told


def test_without_a_cluster(sweep: Sweep, tmp_path_factory: pytest.TempPathFactory) -> None:
    """On a machine that has no SLURM."""
    told = sweep.submit(SHORT, expect=2, env=os.environ | {"PATH": "/nowhere"})
    assert "no sbatch" in told and "hydra/launcher=local" in told
    assert not (sweep.home / "runs").exists()


def test_a_run_directory_deleted_under_its_job(cluster: Cluster, sweep: Sweep) -> None:
    sweep.submit(*LONG, "seed=0,1")
    (batch,) = sweep.batches()
    victim = next(run for run in sweep.runs if run.id == batch["runs"][0][0])
    cluster.wait(lambda: victim.last_row() is not None, 60)
    shutil.rmtree(victim.path, ignore_errors=True)
    sweep.wait(cluster)
    assert cluster.history()[batch["ids"][0]] == "FAILED"
    assert "deleted under the run" in sweep.logs()
    assert sweep.states() == {"new": 1, "done": 1}
    assert "the sweep's command begins it again" in sweep.launchers("status", "s")
    sweep.submit(*LONG, "seed=0,1")
    sweep.wait(cluster)
    assert states(sweep.runs) == [("DONE", 1)] * 2
