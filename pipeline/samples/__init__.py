"""Data sets of labelled samples. Each is one file with

    settings(data)     the data.* settings that change its samples, beside data.standardise
    check(data)        problems of the settings
    fingerprint(data)  which samples these are, without reading all of them
    read(data)         (samples, those held out if the data set comes with some)

Importing this package, or a data set, imports neither torch nor scikit-learn: the command line checks configs
with it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from pipeline import registry

if TYPE_CHECKING:
    from pipeline.config import DataConfig
    from pipeline.samples._samples import Split


def names() -> list[str]:
    """What `data.source` may be beside text."""
    return registry.names(sys.modules[__name__])


def settings(data: DataConfig) -> frozenset[str]:
    """Of the settings that not all sources read, those that change these samples."""
    found: frozenset[str] = _module(data.source).settings(data)
    return found | {"standardise"}


def check(data: DataConfig) -> list[str]:
    """Problems of the settings, for the user; files are looked at by `fingerprint` and `read`."""
    problems: list[str] = _module(data.source).check(data)
    return problems


def fingerprint(data: DataConfig) -> str:
    """Which samples these are, cheap enough for a preview. Raises ConfigError when a file is missing."""
    found: str = _module(data.source).fingerprint(data)
    return found


def read(data: DataConfig) -> Split:
    """The samples to train on and those held out. Raises ConfigError, with the place, for what is
    malformed."""
    from pipeline.samples._samples import Split, hold_out, standardise

    samples, validation = _module(data.source).read(data)
    split = Split.of(samples, validation) if validation else hold_out(samples, data.validation_fraction)
    return standardise(split) if data.standardise else split


def _module(name: str) -> ModuleType:
    return registry.load(sys.modules[__name__], name)
