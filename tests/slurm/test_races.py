"""Requests that meet: cancelled while it is preempted, submitted again with other resources, packed and parted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.store import RunDirectory
from tests.slurm.cluster import Cluster
from tests.slurm.sweeps import LONG, LONGER, SHORT, WORK, Sweep, final_loss, states, steps, training
from tests.slurm.test_submission import wrapper


def under_way(cluster: Cluster, run: RunDirectory) -> None:
    cluster.wait(lambda: steps(run) > 5, 60)


def warn(cluster: Cluster, run: RunDirectory, job: str) -> None:
    """The warning before a time limit has arrived: the run is about to stop and to be queued again."""
    cluster.run("scancel", "--signal=USR2", job)
    cluster.wait(lambda: run.stop_requested() == "PREEMPTED" or states([run])[0][0] == "PREEMPTED")


def test_a_run_cancelled_by_scancel_while_it_is_preempted_stays_so(cluster: Cluster, sweep: Sweep) -> None:
    sweep.submit(*LONG)
    ((job,), (run,)) = sweep.batches()[0]["ids"], sweep.runs
    under_way(cluster, run)
    warn(cluster, run, job)
    cluster.run("scancel", job)
    sweep.wait(cluster)
    assert len(states([run])) == 1 and states([run])[0][1] == 1
    assert sweep.states() in ({"cancelled": 1}, {"preempted": 1})  # the latter: it had been written already


def test_a_run_cancelled_by_command_while_it_is_preempted_stays_so(cluster: Cluster, sweep: Sweep) -> None:
    sweep.submit(*LONG)
    ((job,), (run,)) = sweep.batches()[0]["ids"], sweep.runs
    under_way(cluster, run)
    warn(cluster, run, job)
    told = json.loads(sweep.launchers("cancel", "s", "--yes", "--json"))
    assert told["cancelled"] == [run.id]
    sweep.wait(cluster)
    assert sweep.states() == {"cancelled": 1} and states([run])[0][1] == 1


def test_what_is_queued_keeps_its_config(cluster: Cluster, sweep: Sweep) -> None:
    """The command again, with other resources and one more point: the job of the first has the old ones."""
    with cluster.out_of_service():
        sweep.submit(SHORT, "seed=0")
        sweep.submit(SHORT, "seed=0,1", "launch.minutes=20")
    sweep.wait(cluster)
    assert states(sweep.runs) == [("DONE", 1)] * 2
    assert sorted((run.config().seed, run.config().launch.minutes) for run in sweep.runs) == [
        (0, 10),
        (1, 20),
    ]


def test_a_users_filters_hide_no_job(cluster: Cluster, sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster.out_of_service(), monkeypatch.context() as patch:
        patch.setenv("SQUEUE_STATES", "RUNNING")
        sweep.submit(SHORT)
        assert "1 queued (skipped)." in sweep.submit(SHORT) and len(sweep.batches()) == 1
    sweep.wait(cluster)
    assert states(sweep.runs) == [("DONE", 1)]


def submit_and_die(sweep: Sweep, folder: Path) -> None:
    """Killed when the ids of the jobs are recorded and the jobs are to be released."""
    die = '[[ $1 == release ]] || exec $REAL "$@"\nkill -9 $PPID'
    path = wrapper(folder / "bin", "scontrol", die)
    sweep.submit(SHORT, expect=-9, env=os.environ | {"PATH": path})


def test_an_interrupted_submission_that_was_cancelled_begins_again(
    cluster: Cluster, sweep: Sweep, tmp_path: Path
) -> None:
    submit_and_die(sweep, tmp_path)
    sweep.launchers("cancel", "s", "--yes")
    assert not cluster.queue()  # the report neither
    sweep.submit(SHORT)
    sweep.wait(cluster)
    assert states(sweep.runs) == [("DONE", 1)]


def test_another_sweep_settles_an_interrupted_one_and_a_done_run_stays_done(
    cluster: Cluster, sweep: Sweep, tmp_path: Path
) -> None:
    """When no run was told of its job yet: another sweep has the same run."""
    submit_and_die(sweep, tmp_path)
    (run,) = sweep.runs
    run.update_status(job=None)
    with cluster.out_of_service():  # lest it runs by the time it is looked at
        told = sweep.submit(SHORT, "sweep.name=other")
    assert "A submission of s was interrupted" in told and "1 queued (skipped)." in told
    sweep.wait(cluster)
    assert states([run]) == [("DONE", 1)]


def test_what_was_cancelled_after_an_interrupted_submission_stays_so(
    cluster: Cluster, sweep: Sweep, tmp_path: Path
) -> None:
    """When the run was not told of its job yet: the next submission, of whatever sweep, finds the job."""
    submit_and_die(sweep, tmp_path)
    (run,) = sweep.runs
    run.update_status(job=None)
    sweep.launchers("cancel", "s", "--yes")
    sweep.submit(SHORT, "seed=1", "sweep.name=other")
    sweep.wait(cluster)
    assert states([run]) == [("CANCELLED", 0)]
    sweep.launchers("resume", "s")
    sweep.wait(cluster)
    assert states([run]) == [("DONE", 1)]


def test_packed_runs_are_preempted_together_and_cancelled_apart(
    cluster: Cluster, sweep: Sweep, train_here: Callable[..., RunDirectory]
) -> None:
    """Of three in one job one is cancelled, one fails; the third goes on when the job comes back."""
    sweep.submit(*LONGER, "seed=0,1", "launch.pack=3", "optim.lr=3e-3,1e30", "optim.clip=null", "sweep.exclude=['seed=1 optim.lr=1e30']")  # fmt: skip
    (batch,) = sweep.batches()
    (job,) = batch["ids"]
    runs = {(run.config().seed, run.config().optim.lr > 1): run for run in sweep.runs}
    kept, cancelled, failed = runs[0, False], runs[1, False], runs[0, True]
    for run in (kept, cancelled):
        under_way(cluster, run)
    cluster.wait(lambda: states([failed])[0][0] == "FAILED", 60)
    told = json.loads(sweep.launchers("cancel", "s", "--only", "seed=1", "--yes", "--json"))
    assert told["cancelled"] == [cancelled.id]
    assert sweep.states() == {"running": 1, "cancelled": 1, "failed": 1}
    cluster.run("scancel", "--signal=USR2", job)
    sweep.wait(cluster, 150)
    assert states([kept, cancelled, failed]) == [("DONE", 2), ("CANCELLED", 1), ("FAILED", 1)]
    alone = train_here(WORK, "optim.clip=null")
    assert (training(kept), final_loss(kept)) == (training(alone), final_loss(alone))


def test_one_of_packed_runs_that_wait_is_cancelled_alone(cluster: Cluster, sweep: Sweep) -> None:
    with cluster.out_of_service():
        sweep.submit(SHORT, "seed=0,1,2", "launch.pack=3")
        deleted = next(run for run in sweep.runs if run.config().seed == 2)
        shutil.rmtree(deleted.path)
        sweep.launchers("cancel", "s", "--only", "seed=0", "--yes")
        assert sweep.states() == {"cancelled": 1, "queued": 1, "new": 1}
    sweep.wait(cluster)
    assert sweep.states() == {"cancelled": 1, "done": 1, "new": 1}
    told = sweep.launchers("resume", "s")  # the deleted one is told of, the other goes on
    assert "was deleted begins again with" in told
    sweep.wait(cluster)
    assert sweep.states() == {"done": 2, "new": 1}


def test_one_of_packed_runs_goes_on_in_a_job_of_its_own(cluster: Cluster, sweep: Sweep) -> None:
    """Resumed while the job that it was cancelled in still runs the other."""
    sweep.submit(*LONG, "seed=0,1", "launch.pack=2")
    for run in sweep.runs:
        under_way(cluster, run)
    sweep.launchers("cancel", "s", "--only", "seed=1", "--yes")
    sweep.launchers("resume", "s", "--only", "seed=1")
    sweep.wait(cluster)
    assert sorted(states(sweep.runs)) == [("DONE", 1), ("DONE", 2)]


def test_a_dead_task_does_not_hold_a_packed_job(cluster: Cluster, sweep: Sweep) -> None:
    sweep.submit(*LONG, "seed=0,1", "launch.pack=2")
    for run in sweep.runs:
        under_way(cluster, run)
    tasks = [p for p in Path("/proc").glob("[0-9]*") if _is_task(p, "1", sweep.home)]
    assert len(tasks) == 1
    os.kill(int(tasks[0].name), 9)
    sweep.wait(cluster, 90)
    assert sorted(sweep.states()) == ["done", "lost"]


def _is_task(process: Path, number: str, home: Path) -> bool:
    """Of the jobs of this home: another test's cluster may be on the same machine."""
    try:
        submitit = b"submitit.core._submit" in (process / "cmdline").read_bytes()
        variables = (process / "environ").read_bytes().split(b"\0")
        wanted = {f"SLURM_PROCID={number}".encode(), f"CRESCENDO_HOME={home}".encode()}
        return submitit and wanted <= set(variables)
    except OSError:
        return False
