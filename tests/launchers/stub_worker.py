"""Stands in for pipeline.worker: keeps its contract in milliseconds, written without the project's code.

    stub_worker.py RUN_DIR EVENTS BEHAVIOUR SECONDS

Appends a line to EVENTS when it has the lock and when it ends. Behaviours: ok, fail, die (by kill -9, leaving
a child), stubborn (ignores SIGTERM and has a child).
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

run, events, behaviour, seconds = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])


def event(kind, **more):
    line = {"kind": kind, "run": run.name, "time": time.monotonic(), "pid": os.getpid(), **more}
    with open(events, "a") as file:
        file.write(json.dumps(line) + "\n")


def status(state, tokens=0, **more):
    old = json.loads((run / "status.json").read_text())
    new = old | {
        "state": state,
        "attempt": 1,
        "tokens_seen": tokens,
        "started": began,
        "updated": time.time(),
    }
    (run / "status.new").write_text(json.dumps(new | more))
    os.replace(run / "status.new", run / "status.json")


began = time.time()
lock = open(run / "lock", "a")  # noqa: SIM115 - held until the end
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("somebody else is at it")
    sys.exit(0)
if json.loads((run / "status.json").read_text())["state"] == "DONE":
    sys.exit(0)

children = []
if behaviour in ("die", "stubborn"):
    children.append(subprocess.Popen(["sleep", "600"]).pid)
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
status("RUNNING")
event("start", threads=os.environ["OMP_NUM_THREADS"], session=os.getsid(0), children=children)
time.sleep(seconds)
if behaviour == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "fail":
    logs = run / "logs"
    logs.mkdir(exist_ok=True)
    (logs / "attempt-1.rank-0.log").write_text("rank 0 only noticed\n")
    (logs / "attempt-1.rank-1.log").write_text(
        "Traceback (most recent call last):\n  line 7\nValueError: loss is NaN\n"
    )
    status("FAILED", exit_code=1, error="rank 1: ValueError: loss is NaN")
    event("end")
    sys.exit(1)
row = {"step": 10, "tokens": 1000, "time": 2.0, "attempt": 1, "train/loss": 2.5, "batch/size": 5}
row |= {"batch/requested": 16.0, "throughput/tokens_per_s": 480.0}
(run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
wandb = run / "wandb" / f"offline-run-20260101_000000-{run.name}-a1"
wandb.mkdir(parents=True, exist_ok=True)
(wandb / "run.wandb").write_text("")
status("DONE", 1000, exit_code=0, step=10)
event("end")
