"""How a model is spread over ranks. Each strategy is one file with a class `Strategy` (see `_strategy`).

Importing this package, or a strategy, does not import torch: the command line checks configs with it.
"""

from __future__ import annotations

import sys

from pipeline import registry
from pipeline.parallel._strategy import Strategy


def names() -> list[str]:
    """What `parallel.strategy` may be."""
    return registry.names(sys.modules[__name__])


def strategy_class(name: str) -> type[Strategy]:
    strategy: type[Strategy] = registry.load(sys.modules[__name__], name).Strategy
    return strategy
