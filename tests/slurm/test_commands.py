"""python -m launchers on a real cluster."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.slurm.cluster import Cluster
from tests.slurm.sweeps import LONG, LONGER, SHORT, Sweep, states, steps


def test_cancel_and_resume(cluster: Cluster, sweep: Sweep) -> None:
    """What waits ends at once, what runs with a checkpoint; resumed, each run does the rest."""
    sweep.submit(*LONGER, "seed=0,1,2", "launch.max_parallel=1")
    (batch,) = sweep.batches()
    order = [run for (run,) in batch["runs"]]
    first = next(run for run in sweep.runs if run.id == order[0])
    cluster.wait(lambda: steps(first) > 5, 60)
    assert "add --yes" in sweep.launchers("cancel", "s", expect=2)
    told = json.loads(sweep.launchers("cancel", "s", "--pending", "--yes", "--json"))
    assert sorted(told["cancelled"]) == sorted(order[1:])
    assert sweep.states() == {"running": 1, "cancelled": 2}
    told = json.loads(sweep.launchers("cancel", "s", "--yes", "--json"))
    assert told == {"cancelled": order[:1], "still_running": []}
    assert sweep.states() == {"cancelled": 3} and len(first.complete_checkpoints()) == 1
    stopped_at = steps(first)
    sweep.wait(cluster)

    sweep.launchers("resume", "s", "--only", "seed=0", "launch.minutes=20")
    sweep.wait(cluster)
    assert states([first]) == [("DONE", 2)] and first.config().launch.minutes == 20
    assert f"resumed at step {stopped_at}," in (first.logs / "attempt-2.rank-0.log").read_text()
    assert sweep.states() == {"cancelled": 2, "done": 1}
    (again,) = sweep.batches()[1:]
    assert again["runs"] == [order[:1]] and ", 20 min" in again["shape"]


def test_cancel_now(cluster: Cluster, sweep: Sweep) -> None:
    sweep.submit(*LONG, "seed=0,1")
    cluster.wait(lambda: "running" in sweep.states(), 60)
    sweep.launchers("cancel", "s", "--now", "--yes")
    assert sweep.states() == {"cancelled": 2}
    sweep.wait(cluster)


def test_watch_and_logs_end_with_the_runs(cluster: Cluster, sweep: Sweep) -> None:
    sweep.submit(SHORT, "seed=0,1")
    watching = subprocess.Popen(
        [sys.executable, "-m", "launchers", "watch", "s", "--json"],
        cwd=sweep.home,
        stdout=subprocess.PIPE,
        text=True,
    )
    output, _ = watching.communicate(timeout=120)
    looks = [json.loads(line) for line in output.splitlines()]
    assert looks[-1]["states"] == {"done": 2} and watching.returncode == 0
    assert all(sum(look["states"].values()) == 2 for look in looks)
    run = sweep.runs[0]
    assert run.id in sweep.launchers("logs", run.id, "-f", "--rank", "0")
    assert "reports/s/report.html" in sweep.launchers("report", "s")
