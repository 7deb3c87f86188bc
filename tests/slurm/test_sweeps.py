"""Sweeps on a real cluster, when all goes well and when single runs do not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipeline.store import RunDirectory
from tests.slurm.cluster import Cluster
from tests.slurm.sweeps import LONG, SHORT, Sweep, final_loss, states, steps, training
from tests.support import ROOT


def test_six_points_of_two_shapes(cluster: Cluster, sweep: Sweep) -> None:
    shapes = ["parallel=single,ddp", "seed=0,1,2"]
    told = sweep.submit(SHORT, *shapes, "launch.max_parallel=4")
    assert "6 new." in told and "1 × 1 rank" in told and "1 × 2 ranks" in told
    one, two = sweep.batches()
    assert [len(batch["runs"]) for batch in (one, two)] == [3, 3]
    assert {id_.partition("_")[0] for id_ in one["ids"]}.isdisjoint(
        id_.partition("_")[0] for id_ in two["ids"]
    )
    scripts = [next(sweep.home.glob(f"sweeps/s/slurm/{b['name']}/*.sh")).read_text() for b in (one, two)]
    assert ["--array=0-2%2" in script for script in scripts] == [True, True]  # 4 at a time, together
    assert ["--ntasks-per-node=1" in scripts[0], "--ntasks-per-node=2" in scripts[1]] == [True, True]

    again = sweep.submit(SHORT, *shapes)  # while they wait or run
    assert "submitted" not in again and len(sweep.jobs) == 3
    sweep.wait(cluster, reports=True)
    assert states(sweep.runs) == [("DONE", 1)] * 6
    jobs = [id_ for batch in (one, two) for id_ in batch["ids"]]
    assert {cluster.history()[job] for job in (*jobs, sweep.report_job())} == {"COMPLETED"}
    # The same numbers, whatever the shape; the data of a seed is that seed's.
    losses = {(run.config().seed, run.config().parallel.strategy): final_loss(run) for run in sweep.runs}
    for seed in range(3):
        assert losses[seed, "ddp"] == pytest.approx(losses[seed, "single"], rel=1e-4)
    report = json.loads((sweep.home / "reports/s/report.json").read_text())
    assert report and (sweep.home / "reports/s/report.html").exists()
    finished = sweep.submit(SHORT, *shapes)
    assert "6 done (skipped)." in finished and "compare: " in finished and len(sweep.jobs) == 3
    assert not cluster.queue()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_nodes_of_two_tasks(
    cluster: Cluster, sweep: Sweep, parallel: str, train_here: Callable[..., RunDirectory]
) -> None:
    axis = {"ddp": "replicate", "fsdp": "shard"}[parallel]
    mesh = [f"parallel={parallel}", f"parallel.{axis}=4", "data.micro_batch=2"]
    asked = [SHORT, *mesh, "batch=norm_test", "batch.max_size=32"]
    sweep.submit(*asked, "launch.gpus_per_node=2")
    sweep.wait(cluster)
    (run,) = sweep.runs
    environment = json.loads((run.logs / "attempt-1.environment.json").read_text())
    assert (environment["slurm"]["SLURM_JOB_NUM_NODES"], states([run])) == ("2", [("DONE", 1)])
    assert sorted(path.name for path in run.logs.glob("*.log")) == [
        f"attempt-1.rank-{r}.log" for r in range(4)
    ]

    alone = train_here(*asked)
    assert run.id == alone.id and [s[:2] for s in training(run)] == [s[:2] for s in training(alone)]
    assert final_loss(run) == pytest.approx(final_loss(alone), rel=1e-5)


def test_replicas_on_two_nodes(cluster: Cluster, sweep: Sweep) -> None:
    """They find rank 0's store across machines."""
    sweep.submit(SHORT, "parallel=ddp", "launch.gpus_per_node=1", "sync=wagma", "sync.period=8")
    sweep.wait(cluster)
    (run,) = sweep.runs
    environment = json.loads((run.logs / "attempt-1.environment.json").read_text())
    assert (environment["slurm"]["SLURM_JOB_NUM_NODES"], states([run])) == ("2", [("DONE", 1)])
    assert len([row for row in run.rows() if "sync/fresh" in row]) == 32


def test_a_run_that_fails_harms_no_other(cluster: Cluster, sweep: Sweep) -> None:
    sweep.submit(SHORT, "optim.lr=3e-3,1e30", "optim.clip=null", "parallel=ddp")
    sweep.wait(cluster, reports=True)
    (batch,) = sweep.batches()
    failed = next(run for run in sweep.runs if run.config().optim.lr > 1)
    jobs = {run: job for (run,), job in zip(batch["runs"], batch["ids"], strict=True)}
    assert {job: state for job, state in cluster.history().items() if job in batch["ids"]} == {
        jobs[run.id]: "FAILED" if run is failed or run.id == failed.id else "COMPLETED" for run in sweep.runs
    }
    assert cluster.history()[sweep.report_job()] == "COMPLETED"
    assert (sweep.home / "reports/s/report.html").exists()
    assert sweep.states() == {"failed": 1, "done": 1}
    logs = sweep.launchers("logs", "s")
    assert failed.id in logs and "Diverged" in logs and "Traceback" in logs
    assert "resume: " in sweep.launchers("status", "s", expect=1)


def test_one_point_cancelled_by_scancel(cluster: Cluster, sweep: Sweep) -> None:
    sweep.submit(*LONG, "seed=0,1")
    (batch,) = sweep.batches()
    run = next(run for run in sweep.runs if run.id == batch["runs"][0][0])
    cluster.wait(lambda: steps(run) > 5, 60)
    cluster.run("scancel", batch["ids"][0])
    sweep.wait(cluster)
    assert sweep.states() == {"cancelled": 1, "done": 1}
    status = run.status()
    assert status and status.error and "with a checkpoint" in status.error
    assert run.complete_checkpoints()
    sweep.launchers("resume", "s")
    sweep.wait(cluster)
    assert sorted(states(sweep.runs)) == [("DONE", 1), ("DONE", 2)]
    assert any("resumed at step" in log.read_text() for log in run.logs.glob("attempt-2.*.log"))


def test_what_is_edited_after_the_submission_changes_nothing(
    cluster: Cluster, sweep: Sweep, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Neither a config nor the code: the job runs from the sweep's copy."""
    code = tmp_path_factory.mktemp("code")
    for package in ("conf", "pipeline", "launchers", "analysis", "hydra_plugins"):
        shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    with cluster.out_of_service():  # the job waits
        sweep.submit(SHORT, env=os.environ | {"PYTHONPATH": str(code)})
        (run,) = sweep.runs
        frozen = run.config_file.read_text()
        (code / "conf/model/tiny.yaml").write_text("name: other\n")
        (code / "pipeline/train.py").write_text("raise SystemExit('edited')\n")
    sweep.wait(cluster)
    assert states([run]) == [("DONE", 1)] and run.config_file.read_text() == frozen
    snapshot = json.loads((run.logs / "attempt-1.environment.json").read_text())["code"]
    assert Path(snapshot["directory"]).parent == sweep.home / "sweeps/s/code"
    assert yaml.safe_load(frozen)["model"]["name"] == "tiny"


def test_runs_that_share_a_job(cluster: Cluster, sweep: Sweep) -> None:
    """Three to a job; then two of two ranks each, of which one fails."""
    sweep.submit(SHORT, "seed=0,1,2,3", "optim.lr=3e-3", "launch.pack=3")
    (batch,) = sweep.batches()
    assert [len(runs) for runs in batch["runs"]] == [3, 1]
    sweep.wait(cluster)
    assert states(sweep.runs) == [("DONE", 1)] * 4
    sweep.submit(SHORT, "optim.lr=1e30,2e-3", "optim.clip=null", "launch.pack=2", "parallel=ddp")
    sweep.wait(cluster)
    assert sorted(states(sweep.runs)) == [("DONE", 1)] * 5 + [("FAILED", 1)]
