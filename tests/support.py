"""A typed config from Hydra overrides."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pipeline.config import Config, check, parse

ROOT = Path(__file__).resolve().parents[1]


def compose_tree(*overrides: str) -> dict[str, object]:
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        tree = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
    assert isinstance(tree, dict)
    return tree  # type: ignore[return-value]


# Tests ask for the same again and again, and Hydra takes a tenth of a second. Not for schedules of one's own,
# which come and go.
_kept_tree = functools.cache(compose_tree)


def config(*overrides: str) -> Config:
    """The checked config of these Hydra overrides."""
    composed = parse(copy.deepcopy(_kept_tree(*overrides)))
    check(composed)
    return composed
