"""Runs of a wandb project, read with wandb's public interface: complete histories, fetched once.

A history is what `scan_history` gives without keys: `history` samples it, and with several keys a scan leaves
out the rows that lack one. wandb's own cache of it is not used, since it does not see that a run went on.
What was fetched is kept here instead, under what the server says of the run: its state, its last sign of
life, and how many rows it has up to which step. A pull that was cut short goes on where it stopped; a run
that changed is fetched again.

wandb's client repeats what the server refuses for the moment (429, 5xx) by itself, with growing pauses or
those that the server asks for, here for some minutes at most.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import polars as pl

from analysis import cache
from analysis.records import numbers
from analysis.wandb_files import flattened
from pipeline.config import ConfigError, nearest
from pipeline.store import python

RUNS_PER_PAGE = 500
THREADS = 12
_LIST_S = 300  # for a page of runs, with all repetitions
_CLIENT = {  # its settings, where the user has not made them
    "WANDB__GRAPHQL_RETRY_MAX": "7",  # of a request; with pauses of 2, 4, 8, … s
    "WANDB__GRAPHQL_RETRY_WAIT_MAX_SECONDS": "60",
    "WANDB_SILENT": "true",  # or it asks for a login where there is a terminal, and waits
}
_SILENCE_S = 900.0  # without a run, after which the rest is given up
_REACH_S = 10.0
_PAUSE_S = 30.0  # between two lines of progress
_TERMINAL_PAUSE_S = 0.2
_VERSION = 1  # raise it when the same history is kept differently

Filters = Mapping[str, Any]  # as MongoDB writes them


@dataclass(frozen=True)
class OnlineRun:
    """What the server has of one run. Nested keys of the config are joined by dots."""

    id: str
    name: str
    group: str
    job_type: str
    tags: list[str]
    state: str  # wandb's word
    created: str
    heartbeat: str
    url: str
    config: dict[str, Any]
    rows: pl.DataFrame  # all numbers of its history in the order of `_step`, absent ones null
    warning: str | None = None  # not all rows came
    problem: str | None = None  # why none could be fetched


def fetch(project: str, filters: Sequence[Filters]) -> list[OnlineRun]:
    """The runs of ENTITY/PROJECT that one of the filters lets pass, the oldest first.

    A run whose history cannot be fetched has a problem instead. Raises ConfigError when there is no such
    project for this login, or no login, or no server.
    """
    server = _Server(project)
    listed = {run.id: run for each in filters for run in server.runs(each)}
    progress = _Progress(len(listed))
    found = {}
    for id_, result in _in_threads(list(listed.values()), server.read):
        found[id_] = result
        progress.tell(len(found), sum(len(run.rows) for run in found.values()))
    progress.end()
    return [found[id_] for id_ in listed]


def glance(project: str, limit: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The configs of the newest runs, and the names of the metrics that they logged."""
    runs = _Server(project).runs({}, limit)
    names = {name for run in runs for name in (run.historyKeys or {}).get("keys", {})}
    return [_config(run) for run in runs], sorted(name for name in names if not name.startswith("_"))


class _Server:
    """wandb's client for one project."""

    def __init__(self, project: str) -> None:
        if not re.fullmatch(r"[^/\s]+/[^/\s]+", project):
            raise ConfigError(
                f"--source wandb:{project}: names no project. It is wandb:ENTITY/PROJECT, as in the address "
                f"of the project's page"
            )
        self.project = project
        os.environ.update({name: value for name, value in _CLIENT.items() if name not in os.environ})
        import wandb  # takes long
        from wandb.sdk.lib.service.service_connection import WandbApiFailedError

        self.errors: tuple[type[Exception], ...] = (wandb.Error, WandbApiFailedError, ValueError)
        base_url = os.environ.get("WANDB_BASE_URL") or str(wandb.setup().settings.base_url)
        if reason := unreachable(base_url):
            raise ConfigError(
                f"--source wandb:{project}: {base_url} is out of reach from here ({reason}). Give the "
                f"command where it can be reached, name another server of wandb's with WANDB_BASE_URL, "
                f"or read what is here: --source record"
            )
        try:
            self.api: Any = wandb.Api(timeout=_LIST_S)
        except self.errors as error:
            raise ConfigError(
                f"--source wandb:{project}: no login at {base_url}: {_words(error)}",
                f"Remedy: {python()} -m wandb login, or set WANDB_API_KEY. Without wandb: --source record",
            ) from None
        self.host = re.sub(r"[^\w.-]", "_", str(self.api.settings["base_url"]).partition("://")[2])

    def runs(self, filters: Filters, limit: int | None = None) -> list[Any]:
        """With their configs; not lazy, which would ask for each run by itself."""
        order = "+created_at" if limit is None else "-created_at"
        found: list[Any] = []
        try:
            per_page = limit or RUNS_PER_PAGE
            for run in self.api.runs(self.project, dict(filters), order, per_page=per_page, lazy=False):
                found.append(run)
                if len(found) == limit:
                    break
        except self.errors as error:
            if "Could not find project" in str(error):
                raise self._no_project() from None
            raise ConfigError(
                f"--source wandb:{self.project}: {self.api.settings['base_url']} does not list its runs: "
                f"{_words(error)}",
                "Remedy: again later, which goes on where it stopped, or --source record",
            ) from None
        return found

    def _no_project(self) -> ConfigError:
        entity, _, name = self.project.partition("/")
        others: list[str] = []
        with contextlib.suppress(*self.errors):
            others = [str(project.name) for project in self.api.projects(entity)]
        hint = nearest(name, others)
        return ConfigError(
            f"--source wandb:{self.project}: {self.api.settings['base_url']} has no such project, or this "
            f"login may not read it." + (f" Did you mean {entity}/{hint}?" if hint else ""),
            f"Projects of {entity}: {', '.join(others) or 'none that this login may read'}. Another login: "
            f"{python()} -m wandb login --relogin. Without wandb: --source record",
        )

    def read(self, run: Any) -> OnlineRun:
        """With its history, from the cache where it has not changed."""
        expected, last = int(run.historyLineCount or 0), int((run.historyKeys or {}).get("lastStep", -1))
        kept = cache.place("wandb", self.host, *self.project.split("/"), name=run.id)
        key = [_VERSION, run.id, run.state, run.heartbeatAt, expected, last]
        warning = problem = None
        known = cache.load(kept, key)
        if known is not None:
            rows = known[0]
        else:
            try:
                history = _scan(run, expected)
            except self.errors as error:
                history, problem = [], f"its history cannot be fetched: {_words(error)}"
            else:
                warning = _missing(run, len(history), expected)
            rows = numbers(history)
            if not problem and not warning:
                cache.save(kept, key, rows, [])
        return OnlineRun(
            id=run.id,
            name=run.name or run.id,
            group=run.group or "",
            job_type=run.jobType or "",
            tags=list(run.tags or []),
            state=run.state,
            created=run.createdAt or "",
            heartbeat=run.heartbeatAt or "",
            url=run.url,
            config=_config(run),
            rows=rows,
            warning=warning,
            problem=problem,
        )


def _config(run: Any) -> dict[str, Any]:
    return {key: value for key, value in flattened(run.config).items() if key.split(".")[0] != "_wandb"}


def _scan(run: Any, expected: int) -> list[dict[str, Any]]:
    """All rows; when there are fewer or more than the server counts, whatever comes the second time."""
    rows = list(run.scan_history(use_cache=False))
    return rows if _missing(run, len(rows), expected) is None else list(run.scan_history(use_cache=False))


def _missing(run: Any, came: int, expected: int) -> str | None:
    """What is to be said when these are not all rows. A run that goes on may have more by now."""
    if came == expected or (came > expected and run.state == "running"):
        return None
    return f"{run.id}: {came:,} rows came, and wandb counts {expected:,}"


# --- the network -----------------------------------------------------------------------------------------


def unreachable(server: str) -> str | None:
    """Why nothing answers there, for which wandb would wait long and silently."""
    try:
        urllib.request.urlopen(server, timeout=_REACH_S).close()
    except urllib.error.HTTPError:
        return None  # an answer, too
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return None if isinstance(reason, ssl.SSLError) else str(reason)  # wandb has certificates of its own
    return None


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


T = TypeVar("T")


def _in_threads(runs: Sequence[Any], work: Callable[[Any], T]) -> Iterable[tuple[str, T]]:
    """The results as they come. Raises ConfigError when none has come for long."""
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[str, T | Exception]] = queue.SimpleQueue()
    for run in runs:
        waiting.put(run)

    def worker() -> None:
        while True:
            try:
                run = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((run.id, work(run)))
            except Exception as error:
                done.put((run.id, error))

    # Daemons: one that waits for a silent server must not keep the process from ending.
    for _ in range(min(THREADS, len(runs))):
        threading.Thread(target=worker, daemon=True).start()
    for _ in runs:
        try:
            id_, result = done.get(timeout=_SILENCE_S)
        except queue.Empty:
            raise ConfigError(
                f"--source wandb: no word from the server for {_SILENCE_S:.0f} s. What came is kept: the "
                f"same command goes on"
            ) from None
        if isinstance(result, Exception):
            raise result
        yield id_, result


class _Progress:
    """A line on stderr: on a terminal, one that is rewritten; elsewhere now and then, if it takes long."""

    def __init__(self, runs: int) -> None:
        self.runs = runs
        self.terminal = sys.stderr.isatty()
        self.pause_s = _TERMINAL_PAUSE_S if self.terminal else _PAUSE_S
        self.last = time.monotonic()
        self.told = False

    def tell(self, done: int, rows: int) -> None:
        if time.monotonic() - self.last < self.pause_s:
            return
        self.last, self.told = time.monotonic(), True
        words = f"wandb: {done} of {self.runs} runs, {rows:,} rows"
        start, end = ("\r\x1b[K", "") if self.terminal else ("", "\n")
        print(start, words, sep="", end=end, file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.told and self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
