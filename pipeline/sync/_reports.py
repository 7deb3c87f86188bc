"""What a replica tells the others of each of its steps, and what the record shows of it."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator

from pipeline.config import Config
from pipeline.parallel._ranks import Ranks
from pipeline.stopping import Wishes
from pipeline.store import Row
from pipeline.sync._agreement import Agreement, Report, Sketch, row_of
from pipeline.sync._interface import Method
from pipeline.sync._replica import Replica


class Reports:
    """Every rank has one. What others say of a step comes some steps later, so its row waits."""

    def __init__(self, config: Config, ranks: Ranks, replica: Replica, method: Method) -> None:
        self._replica, self._method = replica, method
        self._agreement = Agreement(ranks, method.drift_steps)
        self._sketch: Sketch | None = None
        if config.sync.consensus:
            self._sketch = Sketch(sum(p.numel() for p in replica.parameters), ranks.device)
        self._observed: dict[str, float] = {}  # in the step just done
        self._waited_s = 0.0  # since the last report
        self._rows: deque[Row] = deque()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what this replica does for the others, and waits for."""
        began = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - began

    def exchange(self, loss: float, squared_norm: float, wishes: Wishes, meet: bool) -> list[Report]:
        """Tells the other replicas of the step just done: its part of the mean loss and the ‖g‖² of what it
        applied. What all of them have told meanwhile, whole up to this step where they are to meet."""
        stop, save = wishes.asked().tolist()
        values = {"loss": loss, "squared_norm": squared_norm, "stop": stop, "save": save}
        self._observed = {"wait_s": self._waited_s, "wait_s_max": self._waited_s, **self._method.observed()}
        values |= self._observed
        self._waited_s = 0.0
        if self._sketch:
            values |= self._sketch(self._replica.weights())
        with self.waiting():  # of the next step
            reports = self._agreement.tell(values)
        _hear(reports, wishes)
        if meet or wishes.stop or wishes.save:
            late = self._agreement.wait()
            self._method.settle()
            _hear(late, wishes)
            reports += late
        return reports

    def completed(self, row: Row, reports: list[Report]) -> list[Row]:
        """The rows, up to this one of the step just done, of which all have told by these reports."""
        self._rows.append(row)
        return [
            {
                **self._rows.popleft(),
                "train/loss": float(report["loss"].sum()),
                "grad/norm": math.sqrt(report["squared_norm"].mean()),
                **row_of(report, list(self._observed)),
            }
            for report in reports
        ]

    def incomplete(self) -> list[Row]:
        """The rows that still wait, with what this rank knows."""
        return list(self._rows)


def _hear(reports: list[Report], wishes: Wishes) -> None:
    for report in reports:
        wishes.hear(float(report["stop"].max()), float(report["save"].max()))
