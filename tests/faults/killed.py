"""kill -9, at random times: of a rank, of the supervisor, of the sweep's command, of wandb's own process."""

from __future__ import annotations

import os
import random
import signal
import time

from pipeline.store import RunDirectory
from tests.faults.campaign import Place, Verdict, descendants, family
from tests.faults.runs import (
    TWO,
    Command,
    Worker,
    at_step,
    command,
    composed,
    corpora,
    finished,
    frozen,
    judged,
    kill_self,
    new_run,
    settings,
    span,
    steps,
    wait,
)


@family("rank killed at a step", 60)
def rank_killed_at_a_step(place: Place, draw: random.Random, number: int) -> Verdict:
    """Once or twice: the attempt that goes on is killed, too."""
    run = new_run(place)
    last = steps(place.lab)
    for _ in range(1 + number % 2):
        ended = Worker(run, at_step(draw.randint(1, last), kill_self)).ended()
    if ended.code and "was killed by SIGKILL" not in ended.output:
        return Verdict("lost data", f"not told: {ended.output[-200:]}")
    return judged(run, finished(run), place.lab)


@family("supervisor killed", 30)
def supervisor_killed(place: Place, draw: random.Random, number: int) -> Verdict:
    run = new_run(place)
    worker = Worker(run)
    time.sleep(draw.uniform(0, span(place.lab)))
    worker.signal(signal.SIGKILL)
    worker.ended()
    wait(lambda: not descendants(os.getpid()))
    return judged(run, finished(run), place.lab)


@family("rank of two killed", 8, timeout_s=600)
def rank_of_two_killed(place: Place, draw: random.Random, number: int) -> Verdict:
    """DDP, really started."""
    corpora(place)
    run = frozen(composed(place.lab, *TWO))
    begun = Command("pipeline.worker", str(run.path))
    wait(lambda: len(ranks(begun.process.pid)) == 2 or begun.process.poll() is not None)
    if draw.random() < 0.7:  # else while it starts
        wait(lambda: run.last_row() is not None or begun.process.poll() is not None)
    time.sleep(draw.uniform(0, 3))
    for pid in draw.sample(ranks(begun.process.pid), 1) if begun.process.poll() is None else []:
        os.kill(pid, signal.SIGKILL)
    if begun.ended().code is None:
        return Verdict("hung", "one rank was killed, and the others stayed")
    return judged(run, command("pipeline.worker", str(run.path)), place.lab, "two")


def ranks(supervisor: int) -> list[int]:
    return [pid for pid, line in descendants(supervisor).items() if "pipeline.worker" in line]


@family("launcher killed", 6, timeout_s=900)
def launcher_killed(place: Place, draw: random.Random, number: int) -> Verdict:
    """The command of a sweep; its workers go on without it, and the same command finds what they did."""
    corpora(place)
    asked = ["-m", *settings(place.lab), "seed=0,1", "sweep.name=s", f"launch.max_parallel={1 + number % 2}"]
    begun = Command("pipeline", *asked)
    time.sleep(draw.uniform(2, 25))
    begun.process.kill()
    begun.ended()
    ended = command("pipeline", *asked, timeout_s=200)
    if "elsewhere" in ended.output:
        wait(lambda: not descendants(os.getpid()), 120)
        ended = command("pipeline", *asked, timeout_s=200)
    runs = sorted((place.home / "runs").glob("*/config.yaml"))
    if ended.code == 0 and len(runs) != 2:
        return Verdict("lost data", f"{len(runs)} runs of 2")
    for config in runs:
        run = RunDirectory(config.parent)
        verdict = judged(run, ended, place.lab, f"sweep/runs/{run.id}")
        if verdict.outcome != "survived":
            return verdict
    return Verdict("survived")


@family("wandb killed", 6, timeout_s=600, sleeps=True)
def wandb_killed(place: Place, draw: random.Random, number: int) -> Verdict:
    """wandb's own process; the run goes on."""
    os.environ["WANDB_MODE"] = "offline"
    run = new_run(place)
    worker = Worker(run)
    wait(lambda: core() or not worker.alive)
    time.sleep(draw.uniform(0, 2))
    for pid in core():
        os.kill(pid, signal.SIGKILL)
    return judged(run, worker.ended(200), place.lab)


def core() -> list[int]:
    return [pid for pid, line in descendants(os.getpid()).items() if "wandb-core" in line]
