"""From a composed tree to the config that is frozen: typed, checked, with the data it will read named.

Single runs and sweeps go through here, so that the same request is the same run either way.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pipeline.config import Config, ConfigError, check, parse


def typed(tree: DictConfig) -> Config:
    """The typed config of a composed tree. Raises ConfigError for unknown keys, missing and mistyped values:
    mistakes in the request, whatever the other settings are."""
    settings = OmegaConf.masked_copy(tree, [key for key in tree if key != "hydra"])
    if missing := sorted(OmegaConf.missing_keys(settings)):
        raise ConfigError(*(_needs_a_value(key) for key in missing))
    plain: Any = OmegaConf.to_container(settings, resolve=True)
    assert isinstance(plain, Mapping)
    return parse(plain)


def complete(config: Config) -> Config:
    """The config that is frozen. Raises ConfigError when its values cannot work together."""
    check(config)
    from pipeline.data import fingerprint

    data = config.data
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            data,
            # A job may start in another directory.
            files=[os.path.abspath(os.path.expanduser(path)) for path in data.files],
            tokenizer=data.tokenizer if data.tokenizer == "bytes" else os.path.abspath(data.tokenizer),
            fingerprint=data.fingerprint or fingerprint(data),
        ),
    )


def compose_point(tree: DictConfig) -> Config:
    """`typed` and `complete` in one step."""
    return complete(typed(tree))


def _needs_a_value(key: str) -> str:
    group = key.partition(".")[0]
    return f"{key}: needs a value. An option of its group sets it: {group}=…"
