"""Modules that only some corpora need: those of the `data` extra."""

from __future__ import annotations

import importlib
from typing import Any

from pipeline.config import ConfigError


def require(module: str) -> Any:
    """A module of the `data` extra, imported when a corpus needs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = module.partition(".")[0]
        raise ConfigError(f"this corpus needs {name}: pip install 'crescendo[data]'") from error
