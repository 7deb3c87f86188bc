"""What one attempt of a run may do differently from its frozen config: where and on what mesh it runs.

    python -m pipeline.worker RUN_DIR parallel=fsdp parallel.shard=8

The run stays the same run: a checkpoint of any mesh can be continued on any other, and sequences, learning
rates and decisions do not depend on the mesh.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import yaml

from pipeline.config import Config, ConfigError, check, nearest, parse, to_tree
from pipeline.overrides import CONF, options_of

GROUPS = ("parallel", "launch")


def for_attempt(config: Config, changes: Sequence[str]) -> Config:
    """`config` with `changes` to its parallel and launch settings, checked. Raises ConfigError."""
    tree = to_tree(config)
    for change in changes:
        key, equals, text = change.partition("=")
        group, _, setting = key.partition(".")
        if not equals or group not in GROUPS:
            raise ConfigError(
                f"{change}: an attempt can change parallel=…, parallel.* and launch.* alone; "
                f"with anything else it would be another run"
            )
        if setting:
            tree[group][setting] = yaml.safe_load(text)
            continue
        if text not in options_of(group):
            hint = nearest(text, options_of(group))
            raise ConfigError(
                f"{change}: no such option of {group}."
                + (f" Did you mean {hint}?" if hint else "")
                + f" Options: {', '.join(options_of(group))}"
            )
        tree[group] |= yaml.safe_load((CONF / group / f"{text}.yaml").read_text(encoding="utf-8")) or {}
    changed = parse(tree)
    # Batches are what they were, unless the new number of ranks cannot share them out evenly.
    multiple = math.lcm(config.batch_multiple, changed.batch_unit)
    changed = replace(changed, batch=replace(changed.batch, round_to=multiple))
    check(changed)
    return changed


def mesh_of(config: Config) -> str:
    """In a few words, for people: `fsdp, shard 4`."""
    parallel = config.parallel
    axes = [f"{axis} {n}" for axis in ("replicate", "shard", "tensor") if (n := getattr(parallel, axis)) > 1]
    return ", ".join([parallel.strategy, *axes])
