"""Options by file name: `batch.schedule=norm_test` is the module pipeline/batch/norm_test.py.

So a new option is one new file. Files whose name starts with an underscore are shared helpers.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def names(package: ModuleType) -> list[str]:
    """The options in a package."""
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def load(package: ModuleType, name: str) -> ModuleType:
    """The module of one option."""
    return importlib.import_module(f"{package.__name__}.{name}")
