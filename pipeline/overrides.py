"""Explains a request that Hydra rejected: what was given, what is allowed, the nearest match."""

from __future__ import annotations

import errno
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from pipeline.batch import _own as own_schedules
from pipeline.config import ConfigError, did_you_mean, known_keys, nearest, unknown_key
from pipeline.store import home

if TYPE_CHECKING:
    from hydra.errors import OverrideParseException

_ELSEWHERE = "Choose another place with CRESCENDO_HOME"
_LOCKS = "Its file system has no locks (flock). Mount it with them, or choose another place"
_DISK_PROBLEMS = {
    errno.ENOSPC: "Make room",
    errno.EDQUOT: "Make room",
    errno.EROFS: _ELSEWHERE,
    errno.EACCES: _ELSEWHERE,
    errno.EPERM: _ELSEWHERE,
    errno.ENOLCK: _LOCKS,
    errno.ENOSYS: _LOCKS,
    errno.ENOTSUP: _LOCKS,
}

CONF = Path(__file__).resolve().parents[1] / "conf"

_SEVERAL_VALUES = re.compile(r"(?:Ambiguous value for argument|Sweep parameters) '(.*?)'")
_NO_SUCH_KEY = re.compile(r"Could not (?:override|delete|delete from config\.) '([^'=]+)")
_GIVEN_ALREADY = re.compile(r"Could not append to config\. An item is already at '(.*?)'")
_VALUE_FOR_A_GROUP = re.compile("Config group override (deletion value )?must be a string")
_GIVEN_TWICE = re.compile(r"Multiple values for ([^\s.]+)\. To override a value use 'override \S+: (.*)'")


def run_command(command: Callable[[], int], arguments: Sequence[str], hint: str = "") -> int:
    """The exit code of a command: its own; 2 when the request is wrong, which is told in words with the hint;
    130 when it is interrupted; 1 when nobody reads what it prints."""
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()  # here, where a closed pipe can be caught
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough, as in `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        problems = explain(error, arguments)
        if problems is None:
            raise
        print(*problems, *filter(None, [hint]), sep="\n", file=sys.stderr)
        return 2


def explain(error: Exception, arguments: Sequence[str]) -> tuple[str, ...] | None:
    """One line for each mistake of the user in `arguments`; None when `error` is none of theirs."""
    # Not at the top: processes that compose nothing use this module, too.
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    text = str(error)
    match error:
        case ConfigError():
            return error.problems
        case OverrideParseException():
            return (_unreadable(error),)
        case MissingConfigException() if error.missing_cfg_file and error.options:
            group, _, option = error.missing_cfg_file.rpartition("/")
            return (no_such_option(group, option, error.options),)
        case HydraException():
            return (_rejected(text),)
        case OmegaConfBaseException():  # an interpolation that leads nowhere
            return (f"{error.full_key}: {text.splitlines()[0]}",)
        case ValueError() if _VALUE_FOR_A_GROUP.match(text):
            return tuple(_value_for_a_group(arguments)) or (text,)
        case yaml.MarkedYAMLError() if error.problem_mark:
            mark = error.problem_mark
            return (f"{mark.name}, line {mark.line + 1}: {error.problem}",)
        case ValueError() if text.startswith(("Only one of --run", "The --resolve flag")):
            return (text,)
        case OSError() if error.errno in _DISK_PROBLEMS:
            place = error.filename or home()
            return (f"{place}: {error.strerror}. {_DISK_PROBLEMS[error.errno]}; the same command goes on",)
    return None


def _unreadable(error: OverrideParseException) -> str:
    if "=" not in error.override and not error.override.startswith("~"):
        hint = nearest(error.override, [*group_names(), *known_keys()])
        value = options_of(hint)[0] if hint in group_names() else "…"
        example = f", such as {hint}={value}" if hint else ""
        return f"{error.override}: not of the form setting=value{example}"
    reason = error.message.removeprefix(f"Error parsing override '{error.override}'\n").splitlines()[0]
    reason = reason.partition(" expecting {")[0]
    return (
        f"{error.override}: cannot be read ({reason}). A list is key=[a,b]; "
        f"a value with special characters needs two pairs of quotes: 'key=\"…\"'"
    )


def no_such_option(group: str, option: str, options: Sequence[str]) -> str:
    """What a user is told who asks for it."""
    return (
        f"{group}={option}: no such option of {group}."
        + did_you_mean(option.lower(), options)
        + f" Options: {', '.join(options)}"
    )


def _rejected(text: str) -> str:
    if found := _SEVERAL_VALUES.match(text):
        again = f"python -m pipeline -m {shlex.quote(found[1])} …"
        return f"{found[1]}: several values make a sweep, which needs -m: {again}"
    if found := _GIVEN_TWICE.match(text):
        return f"+{found[1]}={found[2]}: {found[1]} has a value already; leave out the +"
    if found := _GIVEN_ALREADY.match(text):
        return f"+{found[1]}: {found[1]} has a value already; leave out the +"
    if found := _NO_SUCH_KEY.match(text):
        if found[1].startswith("hydra"):
            return f"{found[1]}: Hydra has no such setting"
        if found[1].startswith("batch.own."):
            return f"{found[1]}: no such setting." + did_you_mean(found[1], own_schedules.keys())
        return unknown_key(found[1])
    return text.partition("\nConfig search path")[0]


def _value_for_a_group(arguments: Sequence[str]) -> list[str]:
    groups = group_names()
    return [
        f"{argument}: {key} is a group of settings, its options are {', '.join(options_of(key))}; "
        f"one setting of it is {key}.<name>=…"
        for argument in arguments
        for key, _, value in [argument.lstrip("+~").partition("=")]
        if key in groups and value not in options_of(key)
    ]


def group_names() -> list[str]:
    """What an option is chosen of: the directories of conf/ but Hydra's own."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")


def options_of(group: str) -> list[str]:
    """Those of conf/, and of batch also a user's own. Raises ConfigError when those cannot be listed."""
    own = own_schedules.options() if group == "batch" else []
    return sorted([*(path.stem for path in (CONF / group).glob("*.yaml")), *own])
