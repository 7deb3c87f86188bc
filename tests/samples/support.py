"""The data settings of a request."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from pipeline.config import DataConfig
from tests.support import config


def data(source: str, *overrides: str, files: list[Path] | None = None) -> DataConfig:
    """Of `data=source`, of these files."""
    names = [str(path) for path in files or []]
    return dataclasses.replace(_checked(source, overrides, len(names)), files=names)


@functools.cache  # composing takes long
def _checked(source: str, overrides: tuple[str, ...], files: int) -> DataConfig:
    return config("model=logistic", f"data={source}", f"data.files={['x'] * files}", *overrides).data
