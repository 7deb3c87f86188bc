"""What the other tests of this package rely on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

# Says where it runs, in a file named after the job and its restarts.
ENDLESS = """
echo $SLURMD_NODENAME > $SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
while :; do sleep 1; done
"""
STUBBORN = "trap '' TERM" + ENDLESS


def submit(cluster: Cluster, directory: Path, script: str, *options: str) -> str:
    """The id of a job that runs this shell script in `directory`."""
    return cluster.run(
        "sbatch", "--parsable", f"--chdir={directory}", "--output=%A_%a.log", *options, "--wrap", script
    ).strip()


def test_two_idle_nodes_and_an_empty_queue(cluster: Cluster) -> None:
    assert cluster.states() == {"127.0.0.1": "idle", "127.0.0.2": "idle"}
    assert cluster.queue() == {}


def test_an_array_runs(cluster: Cluster, tmp_path: Path) -> None:
    array = submit(cluster, tmp_path, "echo $SLURM_ARRAY_TASK_ID > $SLURM_ARRAY_TASK_ID", "--array=0-2")
    elements = [f"{array}_{index}" for index in range(3)]
    cluster.wait(lambda: [cluster.history()[element] for element in elements] == ["COMPLETED"] * 3)
    assert [(tmp_path / str(index)).read_text() for index in range(3)] == ["0\n", "1\n", "2\n"]


def test_tasks_on_one_node_get_different_gpus(cluster: Cluster) -> None:
    one = ["--nodelist=127.0.0.1", "bash", "-c", "echo $CUDA_VISIBLE_DEVICES"]
    assert cluster.run("srun", "--gpus-per-node=2", *one) == "0,1\n"
    assert sorted(cluster.run("srun", "--ntasks=2", "--gpus-per-task=1", *one).split()) == ["0", "1"]


def test_sacct_answers_an_error_without_accounting(cluster: Cluster) -> None:
    with pytest.raises(RuntimeError, match="accounting storage is disabled"):
        cluster.run("sacct")


def test_jobs_restart_after_a_requeue_and_after_the_death_of_their_node(
    cluster: Cluster, tmp_path: Path
) -> None:
    requeued = submit(cluster, tmp_path, ENDLESS, "--nodelist=127.0.0.1")
    widowed = submit(cluster, tmp_path, STUBBORN, "--nodelist=127.0.0.2")
    cluster.wait(lambda: len(list(tmp_path.glob("*-0"))) == 2)
    cluster.run("scontrol", "requeue", requeued)
    cluster.kill_node("127.0.0.2")
    assert cluster.states()["127.0.0.2"] == "down"
    assert cluster.queue()[widowed] == "PENDING"
    cluster.revive_node("127.0.0.2")
    cluster.wait(lambda: len(list(tmp_path.glob("*-1"))) == 2)
    assert cluster.queue() == {requeued: "RUNNING", widowed: "RUNNING"}


def test_a_drained_node_takes_no_job_until_it_is_resumed(cluster: Cluster) -> None:
    cluster.drain("127.0.0.1")
    assert cluster.run("srun", "printenv", "SLURMD_NODENAME") == "127.0.0.2\n"
    cluster.resume("127.0.0.1")
    assert "127.0.0.1" in cluster.run("srun", "--nodes=2", "printenv", "SLURMD_NODENAME")


def test_jobs_that_ignore_sigterm_are_cleared_at_once(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, STUBBORN, "--array=0-20")
    cluster.wait(lambda: list(tmp_path.glob("*-0")))
    started = time.monotonic()
    cluster.clear()
    assert time.monotonic() - started < 5
    assert cluster.queue() == {}
    assert cluster.history()[f"{job}_0"] == "CANCELLED"


def test_jobs_in_high_preempt_those_in_main(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "sleep 100", "--nodes=2", "--exclusive")
    cluster.wait(lambda: cluster.queue()[job] == "RUNNING")
    assert cluster.run("srun", "--partition=high", "echo", "first") == "first\n"
    assert cluster.queue() == {job: "PENDING"}


def test_stopping_leaves_nothing(start_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    cluster = start_cluster(nodes=1, gpus=0)
    job = submit(cluster, tmp_path, f"srun bash -c '(trap \"\" TERM; sleep 1000) & {STUBBORN}'")
    cluster.wait((tmp_path / f"{job}-0").exists)
    assert len(processes_of(cluster)) > 6
    cluster.daemons["slurmctld"].kill()
    cluster.stop()
    assert processes_of(cluster) == []
    assert not cluster.directory.exists()


def test_a_cluster_that_cannot_start_says_why(start_cluster: Callable[..., Cluster]) -> None:
    with pytest.raises(RuntimeError, match="MaxArraySize"):
        start_cluster(max_array_size=-1)


def test_accounting_knows_accounts(start_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    cluster = start_cluster(accounting=True)
    job = submit(cluster, tmp_path, "true", "--account=lab")
    cluster.wait(lambda: "COMPLETED" in cluster.run("sacct", "-n", "-X", "-j", job, "-o", "state"))
    with pytest.raises(RuntimeError, match="Invalid account"):
        submit(cluster, tmp_path, "true", "--account=nobody")


def processes_of(cluster: Cluster) -> list[str]:
    """The names of the processes that anything shows to be this cluster's."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            texts = [
                os.readlink(process / "cwd"),
                *((process / n).read_text() for n in ("cmdline", "environ")),
            ]
            if any(str(cluster.directory) in text for text in texts):
                found.append((process / "comm").read_text())
        except OSError:
            continue
    return found
