"""One process."""

from __future__ import annotations

from pipeline.parallel import _strategy


class Strategy(_strategy.Strategy):
    shows_samples = True
