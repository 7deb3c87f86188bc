"""status.json: how a run stands."""

from __future__ import annotations

import functools
import json
import typing
from dataclasses import dataclass
from typing import Any, Literal, get_args

State = Literal["PENDING", "RUNNING", "DONE", "FAILED", "PREEMPTED", "CANCELLED"]
StopState = Literal["CANCELLED", "PREEMPTED"]


@dataclass(frozen=True)
class Status:
    """status.json. Times are Unix seconds; `error` is one line, the whole story is in logs/."""

    state: State
    attempt: int = 0
    step: int = 0
    tokens_seen: int = 0
    budget_tokens: int = 0
    unit: str = "tokens"  # what the two count, in words
    started: float | None = None
    updated: float | None = None
    host: str | None = None
    job: str | None = None
    mesh: str | None = None
    exit_code: int | None = None
    error: str | None = None

    @property
    def diverged(self) -> bool:
        """Whether a rank ended with `pipeline.record.Diverged`: the error holds its name."""
        return "Diverged: " in (self.error or "")


@functools.cache
def _status_types() -> dict[str, Any]:
    numbers = {float | None: float | int | None}  # JSON writes 1.0 as it likes
    hints = typing.get_type_hints(Status)
    return {name: numbers.get(hint, hint) for name, hint in hints.items() if name != "state"}


def status_of(text: str) -> Status:
    """Raises ValueError for what is no status.json."""
    tree = json.loads(text)
    if not isinstance(tree, dict) or tree.get("state") not in get_args(State):
        raise ValueError("it names no state")
    types = _status_types()
    if unknown := tree.keys() - types.keys() - {"state"}:
        raise ValueError(f"it holds {', '.join(sorted(unknown))}")
    for key, kind in types.items():
        if key in tree and not isinstance(tree[key], kind):
            raise ValueError(f"{key}: {tree[key]!r}")
    return Status(**tree)
