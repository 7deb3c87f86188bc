"""A clock that is set, forwards or back, while a run is at work; and files that say they are of another time."""

from __future__ import annotations

import os
import random
import time

from launchers.__main__ import main as launchers
from tests.faults.campaign import Place, Verdict, family
from tests.faults.runs import Worker, at_step, finished, in_process, judged, kill_self, new_run, steps

_STEPS_S = (-30 * 365 * 86400.0, -86400.0, -3600.0, -1.0, 1.0, 3600.0, 86400.0, 30 * 365 * 86400.0)


@family("clock step", 30)
def clock_step(place: Place, draw: random.Random, number: int) -> Verdict:
    """Of rank and, every other time, of an attempt that is killed and goes on at the old time."""
    run = new_run(place)
    last, by = steps(place.lab), _STEPS_S[number % len(_STEPS_S)]
    at = draw.randint(1, last - 1)

    def set_clock() -> None:
        now = time.time
        time.time = lambda: now() + by

    def sabotage() -> None:
        at_step(at, set_clock)()
        if number % 2:
            at_step(draw.randint(at + 1, last), kill_self)()

    Worker(run, sabotage).ended()
    if number % 3 == 0:
        for path in [p for p in run.path.rglob("*") if p.is_file()]:
            at_s = max(1.0, time.time() + draw.uniform(-1e8, 1e8))
            os.utime(path, (at_s, at_s))
    shown = in_process(launchers, "status", run.id, "--json")
    if "Traceback" in shown.output:
        return Verdict("lost data", shown.output[-300:])
    return judged(run, finished(run), place.lab)
