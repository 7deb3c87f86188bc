"""The file that says where anybody's runs are and what their keys and metrics are called."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from analysis.load import SEED
from analysis.records import COLUMNS
from analysis.sources import OFFLINE, ONLINE
from analysis.summary import RunNumbers
from pipeline.config import ConfigError, did_you_mean

EXAMPLE = """\
  name: study                                   # of the report
  source: wandb-offline                         # or wandb:ENTITY/PROJECT
  files: [wandb, "../else/*/wandb"]             # folders or files, from this file's folder; offline alone
  filters: {group: ablation, optim.lr: 0.001}   # wandb's fields or config keys; a list: any of it
  axes: {batch: train.batch_size, lr: optim.lr} # name in the report: config key
  seed: seed                                    # config key; without it every run is a seed of its own
  task: [data.name]                             # config keys; runs that differ there are never compared
  metrics:                                      # name in the record: metric
    train/loss: loss
    val/loss: eval/loss
    tokens: consumed_tokens
    step: _step                                 # without it: wandb's count of log calls
    time: _runtime                              # without it: wandb's clock, in seconds
"""

LOSSES = ("train/loss", "val/loss")
# Columns of the table of runs (analysis.tables) beside the axes.
TAKEN = {
    *("run", "schedule", "state", "attempt", "budget_tokens", "host", "started", "updated", "problem"),
    *RunNumbers.__dataclass_fields__,
}
DEFAULTS = {"step": "_step", "time": "_runtime"}

# Names in the file -> how wandb's server calls them.
FIELDS = {
    "group": "group",
    "state": "state",
    "tags": "tags",
    "job_type": "jobType",
    "name": "displayName",
    "id": "name",
}


@dataclass(frozen=True)
class Study:
    """The file, checked."""

    name: str
    source: str
    files: list[str] = field(default_factory=list)
    filters: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)
    seed: str | None = None
    task: list[str] = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """Of the config, that must be known."""
        own = [key for key in self.filters if key not in FIELDS]
        return [*self.axes.values(), *([self.seed] if self.seed else []), *self.task, *own]


def read_study(path: Path) -> Study:
    """Raises ConfigError with every setting that is unknown, missing or of no use."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds no settings; python -m analysis --help shows what belongs there")
    options = list(Study.__dataclass_fields__)
    problems = [
        f"{path}: {key}: no such setting.{did_you_mean(str(key), options)}"
        for key in tree
        if key not in options
    ]
    if problems:
        raise ConfigError(*problems, f"Settings: {', '.join(options)}")
    problems = [f"{path}: {key}: missing" for key in ("name", "source", "metrics") if not tree.get(key)]
    if problems:
        raise ConfigError(*problems)
    kinds = {"files": list, "filters": dict, "axes": dict, "task": list, "metrics": dict}
    for key in ("files", "task", "axes"):  # one thing may stand for a list of one
        if isinstance(tree.get(key), str):
            tree[key] = [tree[key]]
    if isinstance(tree.get("axes"), list):
        tree["axes"] = {str(key): key for key in tree["axes"]}
    for key, kind in kinds.items():
        if not isinstance(tree.get(key) or kind(), kind):
            what = "a list" if kind is list else "a mapping"
            raise ConfigError(f"{path}: {key}: is {what}, not {tree[key]!r}")
    study = Study(
        name=str(tree["name"]),
        source=str(tree["source"]),
        files=[str(each) for each in tree.get("files") or []],
        filters={str(key): value for key, value in (tree.get("filters") or {}).items()},
        axes={str(name): str(key) for name, key in (tree.get("axes") or {}).items()},
        seed=str(tree["seed"]) if tree.get("seed") else None,
        task=[str(key) for key in tree.get("task") or []],
        metrics=DEFAULTS | {str(name): str(metric) for name, metric in tree["metrics"].items()},
    )
    _check(path, study)
    return study


def _check(path: Path, study: Study) -> None:
    plain = study.name.isprintable() and study.name == study.name.strip() and study.name not in (".", "..")
    if not plain or "/" in study.name:
        raise ConfigError(
            f"{path}: name: {study.name!r}: is a folder of reports/, so one plain name, without a slash"
        )
    if study.source != OFFLINE and not study.source.startswith(ONLINE):
        raise ConfigError(f"{path}: source: {study.source}: either {OFFLINE} or {ONLINE}ENTITY/PROJECT")
    if study.source == OFFLINE and not study.files:
        raise ConfigError(f"{path}: files: missing; the wandb folders to read, such as files: [wandb]")
    if SEED in study.axes:
        raise ConfigError(f"{path}: axes: {SEED}: is no axis, but the setting {SEED}: {study.axes[SEED]}")
    for name, key in study.axes.items():
        if name in TAKEN:
            free = f"config.{name}"
            raise ConfigError(
                f"{path}: axes: {name}: the table of runs has a column of that name. Call it {free}: {key}"
            )
    for name in study.metrics:
        if name not in COLUMNS:
            raise ConfigError(
                f"{path}: metrics: {name}: the report knows no such metric.{did_you_mean(name, COLUMNS)}",
                f"It knows: {', '.join(COLUMNS)}",
            )
    if not any(name in study.metrics for name in LOSSES):
        raise ConfigError(f"{path}: metrics: names no loss, neither {' nor '.join(LOSSES)}")
