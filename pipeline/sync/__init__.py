"""How replicas agree. Each method is one file with a class `Method` (see `_interface`).

Importing this package, or a method, does not import torch: the command line checks configs with it.
"""

from __future__ import annotations

import sys

from pipeline import registry
from pipeline.sync._interface import Method


def names() -> list[str]:
    """What `sync.method` may be."""
    return registry.names(sys.modules[__name__])


def method_class(name: str) -> type[Method]:
    method: type[Method] = registry.load(sys.modules[__name__], name).Method
    return method
