"""Composes the points of a sweep: each choice of options once through Hydra, values on a copy of that.

Hydra reads every file anew for every point, about 0.1 s. The points of a sweep mostly differ in values, which
Hydra applies when its files are merged; so do `Composer`s, with Hydra's own function.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf, open_dict

from pipeline.config import Config, ConfigError, forms_of, hints_of

# Settings that are no group; all others of them have a dot in their name, which no group has.
_TOP_LEVEL = {name for name, hint in hints_of(Config).items() if not forms_of(hint)}


@dataclass(frozen=True)
class Composed:
    """One point as Hydra composes it."""

    settings: DictConfig  # without Hydra's own
    choices: Mapping[str, str | None]  # the option of each group, whoever chose it


Compose = Callable[[Sequence[str]], Composed]


class Composer:
    """The composed point of a list of overrides.

    `full` is Hydra's composition, with the `hydra` node; `zips` is the sweep.zip that the points were made
    with. Raises ConfigError for a point that says otherwise, such as one of several experiments.
    """

    def __init__(self, full: Callable[[Sequence[str]], DictConfig], zips: Sequence[Sequence[str]]) -> None:
        self._full, self._zips = full, [list(group) for group in zips]
        self._known: dict[tuple[str, ...], bytes] = {}  # pickled: a copy so made takes a sixth of a deepcopy

    def __call__(self, overrides: Sequence[str]) -> Composed:
        parsed = [_parsed(text) for text in overrides]
        values = [override for override in parsed if _is_value(override)]
        rest = [override for override in parsed if not _is_value(override)]
        if all(_is_option(override) for override in rest):
            options = tuple(override.input_line or "" for override in rest)
            if options not in self._known:
                self._known[options] = pickle.dumps(self._compose(options))
            composed: Composed = pickle.loads(self._known[options])
            ConfigLoaderImpl._apply_overrides_to_config(values, composed.settings)
        else:  # +key, ~key, a list of options, …
            composed = self._compose(overrides)
        self._refuse_another_zip(composed.settings)
        return composed

    def _compose(self, overrides: Sequence[str]) -> Composed:
        tree = self._full(overrides)
        choices = dict(tree.hydra.runtime.choices)
        with open_dict(tree):
            del tree["hydra"]
        return Composed(tree, choices)

    def _refuse_another_zip(self, settings: DictConfig) -> None:
        zips = OmegaConf.select(settings, "sweep.zip")
        if zips is not None and zips != self._zips:
            shown = str(zips).replace("'", "")
            raise ConfigError(
                f"sweep.zip={shown}: is of one point alone (of an experiment that is swept, or of a row), "
                f"and a sweep has one sweep.zip. Give the command once for each, or name sweep.zip on it"
            )


@functools.cache
def _parsed(text: str) -> Override:
    (override,) = OverridesParser.create().parse_overrides([text])
    return override


def _is_plain(override: Override) -> bool:
    return override.type == OverrideType.CHANGE and not override.is_sweep_override()


def _is_value(override: Override) -> bool:
    """Whether it is applied after the files are merged, and to nothing that they depend on."""
    key = override.key_or_group
    named = key in _TOP_LEVEL or ("." in key and not key.startswith("hydra."))
    return _is_plain(override) and named


def _is_option(override: Override) -> bool:
    return _is_plain(override) and isinstance(override.value(), str)
