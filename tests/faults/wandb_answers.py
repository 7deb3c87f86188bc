"""wandb's server refuses, fails or says nothing: at log-in, at the start of a run, while rows are sent."""

from __future__ import annotations

import contextlib
import os
import random
import time
from typing import Any

from tests.faults.campaign import Place, Verdict, family
from tests.faults.runs import Worker, judged, new_run
from tests.wandb_server import WandbServer

_CALLS = ("Viewer", "UpsertBucket", "file_stream", "CreateRunFiles")


class Moody(WandbServer):
    """Answers so to `call`, for the first `times`; None: not at all."""

    def __init__(self, status: int | None, call: str, times: int) -> None:
        super().__init__()
        self.mute = status is None
        if status is not None:
            self.fail_next(times, status, call)

    def answer(self, *asked: Any) -> Any:
        if self.mute:
            time.sleep(600)
        return super().answer(*asked)


@family("wandb answers", 12, timeout_s=900, sleeps=True)
def wandb_answers(place: Place, draw: random.Random, number: int) -> Verdict:
    status = (429, 500, None)[number % 3]
    server = Moody(status, _CALLS[number // 3 % len(_CALLS)], draw.choice([1, 5, 10_000]))
    user = place.home / "user"
    user.mkdir()
    os.environ |= server.environment(user) | {"WANDB_MODE": "online"}
    run = new_run(place)
    worker = Worker(run)  # before the server's threads begin: a process with threads is not to be forked
    with contextlib.suppress(AssertionError), server:  # it may be asked what a moody one need not know
        ended = worker.ended(400)
    return judged(run, ended, place.lab)
