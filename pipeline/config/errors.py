"""What a user is told of a mistake: what was given, what is allowed, the nearest valid value."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class ConfigError(ValueError):
    """The request itself is wrong. Says what was given, what is allowed and the nearest valid value."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def nearest(word: str, candidates: Sequence[str]) -> str | None:
    """The candidate a user most likely meant: closest in spelling as a whole, else in its last part."""
    if match := difflib.get_close_matches(word, candidates, n=1, cutoff=0.6):
        return match[0]
    leaf = word.rsplit(".", 1)[-1]
    leaves = {candidate.rsplit(".", 1)[-1]: candidate for candidate in reversed(candidates)}
    match = difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.75)
    return leaves[match[0]] if match else None


def did_you_mean(word: str, candidates: Sequence[str]) -> str:
    """The end of an error message; empty where nothing is near."""
    hint = nearest(word, candidates)
    return f" Did you mean {hint}?" if hint else ""


def one_of(word: str, options: Sequence[str]) -> str:
    """What is allowed, with the option that was likely meant."""
    hint = did_you_mean(word, options)
    return f"one of {', '.join(options)}" + (f".{hint}" if hint else "")


def nearest_multiples(value: int, divisor: int) -> str:
    """The multiples of `divisor` on both sides of `value`, for an error message."""
    below, above = value // divisor * divisor, -(-value // divisor) * divisor
    return f"{above}" if below == 0 else f"{below} or {above}"


def shown(value: object) -> str:
    """As a user would type it."""
    return "null" if value is None else str(value)
