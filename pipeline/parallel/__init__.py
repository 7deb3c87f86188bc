"""Mesh and wrapping. Each strategy is one file with

    AXES                            the parallel.* axes it uses; the others must be 1
    apply(model, ranks, parallel)   the model wrapped for these ranks
    without_sync(model)             a context in which a backward pass only accumulates locally

Importing this package, or a strategy, does not import torch: the command line checks configs with it.
"""

from __future__ import annotations

import sys
from types import ModuleType

from pipeline import registry


def names() -> list[str]:
    """What `parallel.strategy` may be."""
    return registry.names(sys.modules[__name__])


def load(name: str) -> ModuleType:
    return registry.load(sys.modules[__name__], name)
