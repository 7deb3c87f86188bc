"""From the tree that Hydra composes to the dataclasses, and back."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.config.errors import ConfigError, did_you_mean, nearest_multiples, one_of, shown
from pipeline.config.schema import AboveOne, Config, LaunchConfig, ParallelConfig, Positive, Rest, SweepConfig

T = TypeVar("T")


def typed(tree: DictConfig) -> Config:
    """The typed config of what Hydra composed. Raises ConfigError for unknown keys, missing and mistyped
    values: mistakes in the request, whatever the other settings are."""
    settings = tree
    if "hydra" in tree:
        settings = OmegaConf.masked_copy(tree, [str(key) for key in tree if key != "hydra"])
    try:
        plain = OmegaConf.to_container(settings, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException:
        if missing := sorted(OmegaConf.missing_keys(settings)):
            raise ConfigError(
                *(
                    f"{k}: needs a value. An option of its group sets it: {k.partition('.')[0]}=…"
                    for k in missing
                )
            ) from None
        raise
    assert isinstance(plain, dict)
    return parse(plain)  # type: ignore[arg-type]


def sweep_settings(tree: DictConfig) -> SweepConfig:
    """Those of the sweep itself, of a tree whose other settings may still be swept. Raises ConfigError."""
    return parse_group(SweepConfig, OmegaConf.to_container(tree.sweep, resolve=True), "sweep")


def parse_group(kind: type[T], tree: Any, path: str) -> T:
    """One group of settings, whose keys begin with `path`. Raises ConfigError with every misspelt key and
    wrong type."""
    problems: list[str] = []
    group = _convert(kind, tree, path, problems)
    if problems:
        raise ConfigError(*problems)
    return group


def parse(tree: Mapping[str, Any]) -> Config:
    """The typed config of a composed tree. Raises ConfigError with every misspelt key and wrong type, and
    when the one -1 of the mesh cannot be filled in."""
    config = parse_group(Config, tree, "")
    return replace(config, parallel=_whole_mesh(config.parallel, config.launch))


def to_tree(config: object) -> Any:
    """The inverse of `parse`: plain dicts, lists and scalars."""
    if is_dataclass(config):
        return {f.name: to_tree(getattr(config, f.name)) for f in fields(config)}
    return list(config) if isinstance(config, (list, tuple)) else config


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """The type of each field, with its marks. Kept, because reading them from text takes long."""
    return get_type_hints(kind, include_extras=True)


def forms_of(hint: Any) -> tuple[type, ...]:
    """The dataclasses that a group of settings may be, told apart by their `kind`; none for a plain value."""
    return tuple(
        form for form in (get_args(hint) or (hint,)) if isinstance(form, type) and is_dataclass(form)
    )


def known_keys(kind: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, groups included."""
    keys: dict[str, None] = {}
    for name, hint in hints_of(kind).items():
        keys[prefix + name] = None
        for form in forms_of(hint):
            keys |= dict.fromkeys(known_keys(form, f"{prefix}{name}."))
    return list(keys)


def unknown_key(key: str) -> str:
    """What a user is told who sets it: where it belongs, or the nearest that there is."""
    if key.partition(".")[0] == "experiment":
        return "experiment: its file in conf/experiment/ must begin with the line `# @package _global_`"
    group, _, name = key.partition(".")
    forms = forms_of(hints_of(Config).get(group))
    for form in forms:
        if name in hints_of(form) and len(forms) > 1:  # not of the one that was chosen
            kinds = "|".join(get_args(hints_of(form)["kind"]))
            return f"{key}: only a {group} of {group}.kind={kinds} has it"
        if name in hints_of(form):  # which Hydra does not find to delete
            return f"{key}: is null; there is nothing to delete"
    return f"{key}: no such setting." + did_you_mean(key, known_keys())


def _convert(kind: type[T], tree: Any, path: str, problems: list[str]) -> T:
    if not isinstance(tree, Mapping):
        problems.append(f"{path}: is a group of settings, not {shown(tree)}")
        return None  # type: ignore[return-value]
    prefix = f"{path}." if path else ""
    hints = hints_of(kind)  # type: ignore[arg-type]
    problems += [unknown_key(f"{prefix}{key}") for key in tree if key not in hints]
    values: dict[str, Any] = {}
    for name, hint in hints.items():
        key = f"{prefix}{name}"
        if name not in tree:
            problems.append(f"{key}: missing")
        elif forms := forms_of(hint):
            values[name] = _convert(_form(forms, tree[name]), tree[name], key, problems)
        else:
            try:
                values[name] = _value(hint, tree[name])
            except ValueError as error:
                problems.append(f"{key}={shown(tree[name])}: {error}")
    return kind(**{name: values.get(name) for name in hints})


def _form(forms: Sequence[type], tree: Any) -> type:
    """The one of these dataclasses that a tree of this `kind` is; the first where no other claims it."""
    kind = tree.get("kind") if isinstance(tree, Mapping) else None
    claiming = (form for form in forms if kind in get_args(hints_of(form).get("kind")))
    return next(claiming, forms[0])


def _value(hint: Any, value: Any) -> Any:
    """`value` as the type `hint`, or ValueError saying what is allowed."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        number = parse_tokens(value) if "tokens" in arguments else _value(arguments[0], value)
        if Positive in arguments and number <= 0 and not (Rest in arguments and number == -1):
            rest = ", or -1 for the rest of the ranks" if Rest in arguments else ""
            raise ValueError(f"must be above 0{rest}")
        if AboveOne in arguments and number <= 1:
            raise ValueError("must be above 1")
        return number
    if origin in (Union, types.UnionType):
        return None if value is None else _value(arguments[0], value)
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError(one_of(str(value), arguments))
    if origin is list:
        nested = get_origin(arguments[0]) is list
        if not _is_list(value) or (nested and not all(_is_list(item) for item in value)):
            example = "[[a, b]]" if nested else "[a, b]"
            raise ValueError(f"a list of {_plural(arguments[0])} is needed, such as {example}")
        return [_value(arguments[0], item) for item in value]
    if origin is dict:  # whose values only its owner knows
        if not isinstance(value, Mapping):
            raise ValueError("a group of settings is needed")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        if hint is float and not math.isfinite(value):
            raise ValueError("a finite number is needed")
        return value
    given = next((one for kind, (one, _) in _NAMES.items() if type(value) is kind), "a group or list")
    given = "nothing" if value is None else given
    raise ValueError(f"{_NAMES[hint][0]} is needed, not {given}")


def _plural(hint: Any) -> str:
    if get_origin(hint) is list:
        return f"lists of {_plural(get_args(hint)[0])}"
    return "counts of tokens" if get_origin(hint) else _NAMES[hint][1]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


# One and several values of a type, in a user's words.
_NAMES = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("a text", "texts"),
}


def _whole_mesh(parallel: ParallelConfig, launch: LaunchConfig) -> ParallelConfig:
    """With the axis that is -1 filled in from the launch's ranks, so that the run's id names the mesh."""
    open_axes = [axis for axis, ranks in parallel.mesh.items() if ranks == -1]
    if not open_axes:
        return parallel
    axis, key = open_axes[0], f"parallel.{open_axes[0]}=-1"
    if axis in parallel.unused_axes():
        raise ConfigError(f"{key}: parallel={parallel.strategy} does not use this axis; it must be 1")
    if len(open_axes) > 1:
        raise ConfigError(f"{key} and parallel.{open_axes[1]}=-1: only one axis can be the rest of the ranks")
    if launch.gpus_per_node is None:
        raise ConfigError(f"{key}: the rest of how many ranks? Set launch.gpus_per_node (and launch.nodes)")
    nodes = launch.nodes or 1
    ranks = nodes * launch.gpus_per_node
    others = math.prod(n for other, n in parallel.mesh.items() if other != axis)
    if ranks % others:
        raise ConfigError(
            f"{key}: launch.nodes={nodes} × launch.gpus_per_node={launch.gpus_per_node} = {ranks} "
            f"ranks cannot be divided by the other axes' {others}. Nearest number of ranks: "
            f"{nearest_multiples(ranks, others)}"
        )
    whole: dict[str, Any] = {axis: ranks // others}
    return replace(parallel, **whole)


def parse_tokens(value: object) -> int:
    """A token count: 300000, 300k, 2M, 1.5B. Raises ValueError for anything else."""
    units = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    if isinstance(value, str) and value[-1:] in units:
        try:
            tokens = float(value[:-1]) * units[value[-1]]
        except ValueError:
            tokens = math.nan
        if tokens == tokens and tokens.is_integer():
            value = int(tokens)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e6
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("a count of tokens is needed, such as 300000, 300k, 2M or 1.5B")
    return value
