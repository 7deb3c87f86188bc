"""Runs of wandb's as they were logged: from its files, or asked of its server."""

from __future__ import annotations

import functools
import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from analysis import online
from analysis.load import PointState
from analysis.records import numbers
from analysis.sources import ONLINE, STATES, attempt
from analysis.study_file import FIELDS, Study
from analysis.wandb_files import WandbRun, read_run
from pipeline.config import ConfigError


@dataclass(frozen=True)
class Logged:
    """One run of wandb's, wherever it was read. `parts`: its rows, one table for each file."""

    id: str
    fields: dict[str, Any]  # by the names of FIELDS
    started: str
    state: PointState
    config: dict[str, Any]
    parts: list[pl.DataFrame]
    url: str | None = None
    warnings: list[str] = field(default_factory=list)
    problem: str | None = None

    @property
    def metrics(self) -> set[str]:
        return {name for part in self.parts for name in part.columns}


def from_server(study: Study) -> list[Logged]:
    """The runs of a project that pass those filters that the server can apply. Raises ConfigError."""
    wanted = {
        FIELDS[key]: {"$in": value} if isinstance(value, list) else value
        for key, value in study.filters.items()
        if key in FIELDS
    }
    return [
        Logged(
            run.id,
            {name: getattr(run, name) for name in FIELDS},
            run.created,
            STATES.get(run.state, "LOST"),
            run.config,
            [run.rows],
            run.url,
            [run.warning] if run.warning else [],
            run.problem or (None if run.state in ("finished", "running") else f"{run.state}, says wandb"),
        )
        for run in online.fetch(study.source.removeprefix(ONLINE), [wanted])
    ]


def files_of(study: Study, path: Path) -> list[Path]:
    """wandb's files that the study at `path` names, each once. Raises ConfigError for one without any."""
    found: list[Path] = []
    for pattern in study.files:
        places = glob.glob(str(path.parent / os.path.expanduser(pattern)), recursive=True)
        files = [
            file
            for place in map(Path, sorted(places))
            for file in (sorted(place.rglob("run-*.wandb")) if place.is_dir() else [place])
            if file.is_file()
        ]
        if not files:
            raise ConfigError(f"{path}: files: {pattern}: holds no run-*.wandb")
        found += files
    return list({file.resolve(): file for file in found}.values())  # once, though two patterns name it


def from_files(paths: Sequence[Path], metrics: set[str] | None) -> tuple[list[Logged], list[str]]:
    """The runs in these files, and a line for each file that tells none: damaged, foreign, or only begun."""
    whole: list[tuple[Path, WandbRun]] = []
    lost = []
    for path in paths:
        run, problem = attempt(functools.partial(read_run, path, metrics), path)
        if run and run.id:
            whole.append((path, run))
        elif line := problem or (run and run.warning):
            lost.append(line)
    return _merged(whole), lost


def _merged(whole: list[tuple[Path, WandbRun]]) -> list[Logged]:
    """The files of each id as one run, as they began one after the other."""
    whole.sort(key=lambda item: (item[1].started or 0.0, str(item[0])))
    by_id: dict[str, list[WandbRun]] = {}
    for _, run in whole:
        by_id.setdefault(str(run.id), []).append(run)
    return [_offline(id_, parts) for id_, parts in by_id.items()]


def _offline(id_: str, parts: Sequence[WandbRun]) -> Logged:
    last = parts[-1]
    state: PointState = "LOST" if last.exit_code is None else "FAILED" if last.exit_code else "DONE"
    problems: dict[PointState, str] = {
        "LOST": "its file has no end: it was killed, or goes on",
        "FAILED": f"exit code {last.exit_code}",
    }
    return Logged(
        id_,
        dict(
            group=last.group,
            state=_WORDS[state],
            tags=last.tags,
            job_type=last.job_type,
            name=last.name,
            id=id_,
        ),
        f"{parts[0].started or 0:020.6f}",
        state,
        last.config,
        [numbers(part.rows) for part in parts],
        warnings=[part.warning for part in parts if part.warning],
        problem=problems.get(state),
    )


_WORDS: dict[PointState, str] = {"DONE": "finished", "FAILED": "failed", "LOST": "running"}
