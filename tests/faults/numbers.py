"""A loss that is no number: in one step of one attempt, as by a flipped bit; or in every attempt, as by a rate
that is too high."""

from __future__ import annotations

import math
import random

import pipeline.train as training
from tests.faults.campaign import Place, Verdict, family
from tests.faults.runs import Worker, clean, finished, judged, new_run, steps


@family("NaN loss", 30)
def nan_loss(place: Place, draw: random.Random, number: int) -> Verdict:
    run = new_run(place)
    at, value = draw.randint(1, steps(place.lab)), draw.choice([math.nan, math.inf, -math.inf])

    def sabotage() -> None:
        loss = training.Trainer._loss

        def spoiled(trainer, inputs, targets):  # type: ignore[no-untyped-def]
            return loss(trainer, inputs, targets) * (value if trainer.progress.step + 1 == at else 1.0)

        training.Trainer._loss = spoiled  # type: ignore[method-assign]

    ended = Worker(run, sabotage).ended()
    if (
        told := clean(ended, run.path)
    ).outcome != "failed cleanly" or f"step {at}: training loss" not in ended.output:
        return Verdict("lost data", told.why)
    if number % 5 == 0:  # again at the same step, as where the cause is in the run itself
        told = clean(Worker(run, sabotage).ended(), run.path)
        if told.outcome != "failed cleanly":
            return told
    return judged(run, finished(run), place.lab)
