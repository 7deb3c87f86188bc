"""Signals that ask for a stop, at random times, once or twice."""

from __future__ import annotations

import os
import random
import signal
import time

from tests.faults.campaign import Place, Verdict, family
from tests.faults.runs import Worker, at_step, finished, judged, new_run, span, steps

_NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


@family("signal", 40)
def stopped_by_a_signal(place: Place, draw: random.Random, number: int) -> Verdict:
    run = new_run(place)
    worker, asked = Worker(run), _NUMBERS[number % len(_NUMBERS)]
    time.sleep(draw.uniform(0.1, span(place.lab)))
    for _ in range(1 + (number % 5 == 0)):
        worker.signal(asked)
        time.sleep(draw.uniform(0, 0.2))
    ended, status = worker.ended(), run.status()
    told = {0: "DONE", 128 + asked: "CANCELLED", -asked: "PENDING"}  # the last: before it could answer
    if status and ended.code in told and status.state == told[ended.code]:
        return judged(run, finished(run), place.lab)
    return Verdict("lost data", f"exit code {ended.code} after {asked.name}, and the status is {status}")


@family("real-time signal", 4)
def killed_by_a_signal_without_a_name(place: Place, draw: random.Random, number: int) -> Verdict:
    """A rank, by a number that has none."""
    run, asked = new_run(place), signal.SIGRTMIN + draw.randint(1, 20)
    ended = Worker(
        run, at_step(draw.randint(1, steps(place.lab)), lambda: os.kill(os.getpid(), asked))
    ).ended()
    if ended.code != 1 or f"(signal {asked})" not in ended.output:
        return Verdict("lost data", f"exit code {ended.code}: {ended.output[-300:]}")
    return judged(run, finished(run), place.lab)
