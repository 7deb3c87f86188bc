"""What one attempt of a run may do differently from its frozen config: where and on what mesh it runs.

    python -m pipeline.worker RUN_DIR parallel=fsdp parallel.shard=8

The run stays the same run: a checkpoint of any mesh can be continued on any other, and sequences,
batches, learning rates and decisions stay what they would have been. A batch that the new ranks cannot
share out evenly leaves some of them idle at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import yaml

import pipeline.optim as optimizers
from pipeline.batch import schedule_class
from pipeline.config import Config, ConfigError, check_imbalance, check_mesh, check_replicas, parse, to_tree
from pipeline.overrides import CONF, no_such_option, options_of
from pipeline.parallel import strategy_class
from pipeline.sync import method_class

GROUPS = ("parallel", "launch")


def for_attempt(config: Config, changes: Sequence[str]) -> Config:
    """`config` with `changes` to its parallel and launch settings, checked. Raises ConfigError."""
    tree = to_tree(config)
    # Options of a group before single settings, in whatever order they are given: as Hydra does.
    for change in sorted(changes, key=lambda change: "." in change.partition("=")[0]):
        _apply(change, tree)
    changed = parse(tree)
    changed = replace(changed, batch=replace(changed.batch, round_to=config.batch_multiple))
    fit = [
        *check_mesh(changed),
        *schedule_class(changed.batch.schedule).check(changed),
        *check_replicas(changed),
        *check_imbalance(changed),
        *optimizers.check(changed),
    ]
    if problems := [*fit, *_check_same_run(config, changed)]:
        raise ConfigError(*problems)
    return changed


def _apply(change: str, tree: dict[str, Any]) -> None:
    key, equals, text = change.partition("=")
    group, _, setting = key.partition(".")
    if not equals or group not in GROUPS:
        raise ConfigError(
            f"{change}: an attempt can change parallel=…, parallel.* and launch.* alone; "
            f"with anything else it would be another run"
        )
    if setting:
        try:
            tree[group][setting] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"{change}: the value cannot be read") from None
    elif text in options_of(group):
        tree[group] |= yaml.safe_load((CONF / group / f"{text}.yaml").read_text(encoding="utf-8")) or {}
    else:
        raise ConfigError(no_such_option(group, text, options_of(group)))


def _check_same_run(frozen: Config, changed: Config) -> list[str]:
    """What would make other numbers of it, beyond rounding."""
    before, after = frozen.parallel, changed.parallel
    problems = []
    if after.precision != before.precision:
        problems.append(
            f"parallel.precision={after.precision}: the run computes in {before.precision}; "
            f"in another precision it would be another run"
        )
    by_ranks = [
        setting
        for setting, counts in (
            ("data.distribution=by_rank", frozen.data.distribution == "by_rank"),
            ("imbalance=variable_length", frozen.imbalance.kind == "variable_length"),
        )
        if counts and after.data_ranks != before.data_ranks
    ]
    if by_ranks:
        problems.append(
            f"parallel: {mesh_of(changed)}: with {' and '.join(by_ranks)} what is read depends on "
            f"the {before.data_ranks} data-parallel ranks of this run. Keep replicate × shard = "
            f"{before.data_ranks}"
        )
    if method_class(frozen.sync.method).replicas and after.replicate != before.replicate:
        problems.append(
            f"parallel: {mesh_of(changed)}: sync={frozen.sync.method} brings together the {before.replicate} "
            f"replicas of this run. Keep parallel.replicate={before.replicate}"
        )
    needs = schedule_class(frozen.batch.schedule)(frozen).needs
    if needs and needs.units == "worker":
        visible = strategy_class(after.strategy).shows_workers(after)
        if after.data_ranks != before.data_ranks or not visible:
            problems.append(
                f"parallel: {mesh_of(changed)}: batch.estimator={frozen.batch.estimator} compares the "
                f"{before.data_ranks} data-parallel ranks of this run. Keep replicate × shard = "
                f"{before.data_ranks}, with parallel=ddp or a parallel.shard of at least 2"
            )
    if not needs and optimizers.needs(changed) != (measured := optimizers.needs(frozen)):
        assert measured
        problems.append(
            f"parallel={after.strategy}: optim={frozen.optim.name} steps by the noise that it sees in every "
            f"{measured.units} of this run, and sees in something else there. Keep parallel={before.strategy}"
        )
    return problems


def mesh_of(config: Config) -> str:
    """In a few words, for people: `fsdp, shard 4`."""
    axes = [f"{axis} {n}" for axis, n in config.parallel.mesh.items() if n > 1]
    return ", ".join([config.parallel.strategy, *axes])
