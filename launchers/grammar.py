"""The points of a sweep: all combinations of the swept values, those of `sweep.zip` walked together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override

from pipeline.config import ConfigError, did_you_mean


def expand(overrides: Sequence[Override], zips: Sequence[Sequence[str]]) -> list[list[str]]:
    """The overrides of each point, in Hydra's order: the last axis varies fastest, and of two values of one
    key the last counts. A zipped group of axes stands where its first one does.

    Raises ConfigError when a group cannot be walked together.
    """
    axes: dict[str, list[str]] = {}
    for override in overrides:
        (points,) = BasicSweeper.split_arguments([override], max_batch_size=None)
        axes[override.get_key_element()] = [text for (text,) in points]
    _check_zips(axes, zips)
    group_of = {name: group for group in zips for name in group}
    factors: dict[str, list[tuple[str, ...]]] = {}
    for name in axes:
        group = group_of.get(name, [name])
        factors.setdefault(group[0], list(zip(*(axes[each] for each in group), strict=True)))
    return [list(itertools.chain(*point)) for point in itertools.product(*factors.values())]


def _check_zips(axes: dict[str, list[str]], zips: Sequence[Sequence[str]]) -> None:
    problems = []
    names = [name for group in zips for name in group]
    for name in dict.fromkeys(names):
        if name not in axes:
            hint = did_you_mean(name, list(axes)) or f" Give it values, as in {name}=a,b"
            problems.append(f"sweep.zip: {name} is not swept.{hint}")
        elif names.count(name) > 1:
            problems.append(
                f"sweep.zip: {name} stands in it {names.count(name)} times. One axis walks with one group: "
                f"join the groups, as in sweep.zip=[[a,b,c]]"
            )
    for group in zips:
        sizes = {name: len(axes[name]) for name in group if name in axes}
        if len(set(sizes.values())) > 1:
            counts = ", ".join(f"{name} has {size}" for name, size in sizes.items())
            problems.append(
                f"sweep.zip=[[{','.join(group)}]]: walked together, so all need as many values, but {counts}."
                f" Give each {max(sizes.values())}, or leave sweep.zip out for all combinations"
            )
    if problems:
        raise ConfigError(*problems)
