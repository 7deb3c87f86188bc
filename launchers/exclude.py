"""sweep.exclude: which composed points a sweep leaves out.

A condition is a text of comparisons, `model=60m parallel.world_size>8`; a point that meets all of them is
left out. The left side is a group, compared with its chosen option, or a setting or derived number of the
typed config.
"""

from __future__ import annotations

import functools
import operator
import re
import shlex
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pipeline.config import Config, ConfigError, did_you_mean, forms_of, hints_of, parse_tokens
from pipeline.overrides import no_such_option, options_of

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_ORDER = ("<", "<=", ">", ">=")


@dataclass(frozen=True)
class Comparison:
    """One of a condition: `name operator value`, written as `text`."""

    text: str
    name: str
    operator: str
    value: str


class Exclusions:
    """Applies the conditions of every point to it and counts the points that each one meets."""

    def __init__(self) -> None:
        self.met: dict[str, int] = {}

    def leave_out(self, config: Config, choices: Mapping[str, str | None]) -> bool:
        """Whether a condition of the point's own `sweep.exclude` holds for it. Raises ConfigError."""
        met = [
            condition
            for condition in config.sweep.exclude
            # In a list, so that a mistake in a comparison is told whatever the ones before it say.
            if all([_holds(comparison, config, choices) for comparison in _comparisons(condition)])
        ]
        for condition in config.sweep.exclude:
            self.met[condition] = self.met.get(condition, 0) + (condition in met)
        return bool(met)


@functools.cache
def _comparisons(condition: str) -> list[Comparison]:
    tight = re.sub(r"\s*([=!<>]+)\s*", r"\1", condition)
    try:
        texts = shlex.split(tight)
    except ValueError as error:  # a quote that is not closed
        raise _problem(condition, str(error)) from None
    comparisons = []
    for text in texts:
        found = re.fullmatch(r"([^=!<>]+)([=!<>]+)(.*)", text)
        if not found or found[2] not in _OPERATORS:
            raise _problem(
                text, f"not a comparison such as model=60m; the operators are {' '.join(_OPERATORS)}"
            )
        comparisons.append(Comparison(text, found[1], found[2], found[3]))
    if not comparisons:
        raise _problem(condition, "an empty condition would leave out every point")
    return comparisons


def _holds(comparison: Comparison, config: Config, choices: Mapping[str, str | None]) -> bool:
    name, compare = comparison.name, _OPERATORS[comparison.operator]
    if name in choices:
        return compare(choices[name], _option(comparison))
    kinds = comparable()
    if name not in kinds:
        raise _problem(
            comparison.text,
            "no such setting."
            + did_you_mean(name, [*(group for group in choices if "/" not in group), *kinds]),
        )
    right = _right_side(comparison, kinds[name])
    # None in the end: a setting that another kind of model has.
    left: Any = config
    for key in name.split("."):
        left = getattr(left, key, None)
    if left is None and comparison.operator in _ORDER:  # what is not set has no place in an order
        return False
    return compare(left, right)


def _option(comparison: Comparison) -> str | None:
    """The right side where the left one is a group."""
    option: str | None = _right_side(comparison, str)
    options = options_of(comparison.name)
    if option is not None and options and option not in options:
        raise _problem(comparison.text, no_such_option(comparison.name, option, options))
    return option


@functools.cache
def comparable(kind: type = Config, prefix: str = "") -> dict[str, Any]:
    """The type of every value of a config that a condition can name: settings and derived numbers."""
    derived = {
        name: get_type_hints(member.fget)["return"]
        for name, member in vars(kind).items()
        if isinstance(member, property)
    }
    kinds: dict[str, Any] = {}
    for name, hint in (hints_of(kind) | derived).items():
        if forms := forms_of(hint):
            for form in forms:
                kinds |= comparable(form, f"{prefix}{name}.")
        elif (plain := _plain(hint)) is not dict:
            kinds[f"{prefix}{name}"] = plain
    return kinds


def _plain(hint: Any) -> Any:
    """int, float, bool, str, dict or a list of one of them: a field's values, whatever their marks."""
    while get_origin(hint) in (Annotated, Union, types.UnionType):
        hint = get_args(hint)[0]
    match get_origin(hint):
        case None:
            return hint
        case origin if origin is list:
            return list[_plain(get_args(hint)[0])]  # type: ignore[misc]
        case origin:
            return dict if origin is dict else str  # Literal


def _right_side(comparison: Comparison, kind: Any) -> Any:
    """What the text of the right side means for a setting of this kind."""
    order = comparison.operator in _ORDER
    if order and kind not in (int, float):
        raise _problem(
            comparison.text,
            f"{comparison.operator} orders numbers, and {comparison.name} is none. Use = or !=",
        )
    if comparison.value == "null" and not order:
        return None
    try:
        return _read(kind, comparison.value)
    except ValueError as error:
        raise _problem(comparison.text, str(error)) from None


def _read(kind: Any, text: str) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError("true or false is needed")
        return text == "true"
    if kind in (int, float):
        try:
            return float(text)
        except ValueError:
            pass
        try:
            return parse_tokens(text)
        except ValueError:
            raise ValueError("a number is needed, such as 8, 0.3 or 2M") from None
    if get_origin(kind) is list:
        inner = text.removeprefix("[").removesuffix("]")
        return [_read(get_args(kind)[0], item.strip()) for item in inner.split(",") if inner]
    return text


def _problem(comparison: str, why: str) -> ConfigError:
    return ConfigError(f"sweep.exclude, {comparison}: {why}")


def summary(met: Mapping[str, int]) -> list[str]:
    """A line for every condition."""
    return [f"  {condition}: {count} point{'s' * (count != 1)}" for condition, count in met.items()]
