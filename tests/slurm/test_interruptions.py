"""Whatever a cluster does to a running job: it goes on, and ends with the numbers of a run that nothing befell."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.store import RunDirectory
from tests.slurm.cluster import Cluster
from tests.slurm.sweeps import LONG, WORK, Sweep, final_loss, states, steps, training

EARLY = "checkpoint.interval_tokens=5k"


def begin(cluster: Cluster, sweep: Sweep, *overrides: str) -> tuple[RunDirectory, str]:
    """A run that has done some steps and saved a checkpoint, and its job."""
    sweep.submit(*LONG, EARLY, *overrides)
    (run,) = sweep.runs
    (batch,) = sweep.batches()
    cluster.wait(lambda: len(run.complete_checkpoints()) > 0, 60)
    return run, batch["ids"][0]


def assert_as_if_nothing_had_happened(run: RunDirectory, uninterrupted: RunDirectory) -> None:
    assert training(run) == training(uninterrupted)
    assert final_loss(run) == final_loss(uninterrupted)


def resumed_at(run: RunDirectory, attempt: int) -> int:
    """The step from which an attempt went on."""
    log = (run.logs / f"attempt-{attempt}.rank-0.log").read_text()
    (line,) = (line for line in log.splitlines() if line.startswith("resumed at step"))
    return int(line.split()[3].rstrip(","))


def preempt(cluster: Cluster, job: str) -> None:
    """All of the cluster for another job, for a moment."""
    everything = ["--partition=high", "--exclusive", "--nodes=2", "--ntasks-per-node=1"]
    cluster.run("sbatch", "--output=/dev/null", *everything, "--wrap", "srun sleep 1")


def command_of(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


def state_of(run: RunDirectory) -> str:
    status = run.status()
    assert status
    return status.state


@pytest.mark.parametrize(
    "interrupt",
    [
        pytest.param(lambda cluster, job: cluster.run("scancel", "--signal=USR2", job), id="warning"),
        pytest.param(lambda cluster, job: cluster.run("scontrol", "requeue", job), id="scontrol-requeue"),
        pytest.param(preempt, id="preemption"),
    ],
)
def test_stopped_and_queued_again(
    cluster: Cluster,
    sweep: Sweep,
    uninterrupted: RunDirectory,
    interrupt: Callable[[Cluster, str], object],
) -> None:
    run, job = begin(cluster, sweep)
    interrupt(cluster, job)
    cluster.wait(lambda: state_of(run) == "PREEMPTED", 60)
    stopped_at = steps(run)
    sweep.wait(cluster, 150)
    assert states([run]) == [("DONE", 2)] and cluster.history()[job] == "COMPLETED"
    assert resumed_at(run, 2) == stopped_at  # nothing was done twice
    assert_as_if_nothing_had_happened(run, uninterrupted)


def test_preempted_with_a_warning(
    start_cluster: Callable[..., Cluster], sweep: Sweep, uninterrupted: RunDirectory
) -> None:
    """As on clusters with SlurmctldParameters=preempt_send_user_signal."""
    cluster = start_cluster(preempt_send_user_signal=True)
    run, job = begin(cluster, sweep)
    preempt(cluster, job)
    sweep.wait(cluster, 150)
    assert states([run]) == [("DONE", 2)] and cluster.history()[job] == "COMPLETED"
    assert_as_if_nothing_had_happened(run, uninterrupted)


def test_all_ranks_stop_together(
    cluster: Cluster, sweep: Sweep, train_here: Callable[..., RunDirectory]
) -> None:
    run, job = begin(cluster, sweep, "parallel=ddp", "launch.gpus_per_node=1")
    cluster.run("scancel", "--signal=USR2", job)
    sweep.wait(cluster, 150)
    assert states([run]) == [("DONE", 2)]
    assert_as_if_nothing_had_happened(run, train_here(WORK, "parallel=ddp"))
    for rank in range(2):
        assert "Traceback" not in (run.logs / f"attempt-1.rank-{rank}.log").read_text()


def test_the_death_of_a_node(cluster: Cluster, sweep: Sweep, uninterrupted: RunDirectory) -> None:
    """Nobody could save anything: the run goes on from its last checkpoint."""
    run, job = begin(cluster, sweep)
    node = cluster.run("squeue", "-h", "-j", job, "-o", "%N").strip()
    cluster.kill_node(node)
    try:
        sweep.wait(cluster, 150)
    finally:
        cluster.revive_node(node)
    assert states([run]) == [("DONE", 2)] and resumed_at(run, 2) > 0
    assert_as_if_nothing_had_happened(run, uninterrupted)


def test_killed_without_a_word(
    start_cluster: Callable[..., Cluster], sweep: Sweep, uninterrupted: RunDirectory
) -> None:
    """SLURM's accounting tells how the job ended; resumed, the run does."""
    cluster = start_cluster(accounting=True)
    run, job = begin(cluster, sweep)
    for process in Path("/proc").glob("[0-9]*"):  # as a machine does that has no memory left
        if f"submitit.core._submit\0{sweep.home}" in command_of(process):
            os.kill(int(process.name), signal.SIGKILL)
    sweep.wait(cluster)
    (lost,) = sweep.status()["runs"]
    assert (lost["state"], lost["run"]) == ("lost", run.id)
    ended = f"job {job} ended: FAILED"  # soon: accounting takes its time
    cluster.wait(lambda: ended in sweep.launchers("status", "s", expect=1), 30)
    assert "1 lost." in sweep.launchers("resume", "s")
    sweep.wait(cluster)
    assert states([run]) == [("DONE", 2)]
    assert_as_if_nothing_had_happened(run, uninterrupted)


@pytest.mark.slow
def test_time_limits(cluster: Cluster, sweep: Sweep, train_here: Callable[..., RunDirectory]) -> None:
    """True ones, of two minutes. One run goes on behind it; one, whose single step would take minutes, fails
    with the remedy instead of starting again for ever.

    SLURM looks at limits every 30 s, so that the warning comes 60 to 90 s after the start: never before a run
    on a busy machine has done its first step.
    """
    longer = ["budget.tokens=64k", "checkpoint.interval_tokens=1k"]
    alone = train_here(*longer)
    # 250 steps, which take 100 s at least, or 5 minutes each.
    sweep.submit(*longer, "imbalance.compute_ms=400,300000", "launch.minutes=2", "launch.warning_s=30")
    sweep.wait(cluster, 400)
    run, stuck = sorted(sweep.runs, key=lambda run: run.config().imbalance.compute_ms)
    ((state, attempts),) = states([run])
    assert state == "DONE" and attempts > 1
    assert_as_if_nothing_had_happened(run, alone)
    status = stuck.status()
    assert status and (status.state, status.attempt) == ("FAILED", 1)
    assert status.error and "launch.minutes=4" in status.error
