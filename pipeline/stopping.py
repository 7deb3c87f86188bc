"""What somebody asks of a run that goes on, and when all ranks know it: a stop, or a checkpoint by time."""

from __future__ import annotations

import time

import torch

from pipeline.config import Config
from pipeline.parallel._ranks import Ranks
from pipeline.store import RunDirectory

STOP_INTERVAL_S = 1.0  # between looks whether the run is to stop


class Wishes:
    """Rank 0 looks for them, and the ranks agree on them in what they exchange in every step anyway."""

    def __init__(self, config: Config, run: RunDirectory, ranks: Ranks) -> None:
        self._run, self._ranks = run, ranks
        self._minutes = config.checkpoint.interval_minutes
        self._looked_at, self._saved_at = 0.0, time.monotonic()
        self.stop = self.save = False  # agreed by all ranks: a stop for good, a checkpoint until it is made

    def asked(self) -> torch.Tensor:
        """What this rank asks of all, [stop, save] in float64: nothing but on rank 0."""
        wanted = torch.zeros(2, dtype=torch.float64, device=self._ranks.device)
        wanted[0].fill_(self._stop_requested())
        wanted[1].fill_(self._save_due())
        return wanted

    def hear(self, stop: float, save: float) -> None:
        """What `asked` is over all ranks. A look for a stop that comes soon after another finds nothing, so
        what was agreed on stays."""
        self.stop |= stop > 0
        self.save |= save > 0

    def look_together(self) -> None:
        """When the run begins, or goes on. All ranks call it."""
        self._saved_at = time.monotonic()
        self.stop = self._ranks.from_main(self._run.stop_requested() is not None)

    def saved(self) -> None:
        self.save, self._saved_at = False, time.monotonic()

    def _stop_requested(self) -> bool:
        now = time.monotonic()
        if not self._ranks.is_main or now - self._looked_at < STOP_INTERVAL_S:
            return False
        self._looked_at = now
        return self._run.stop_requested() is not None

    def _save_due(self) -> bool:
        if not self._ranks.is_main or self._minutes is None:
            return False
        return time.monotonic() - self._saved_at > 60 * self._minutes
