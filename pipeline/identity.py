"""What makes a run this run: its complete config, and its id, a hash of all that can change its result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from typing import Any

import pipeline.batch as batch_schedules
import pipeline.optim as optimizers
import pipeline.samples as labelled_samples
import pipeline.sync as sync_methods
from pipeline.batch import _own as own_schedules
from pipeline.batch._adaptive import AVERAGING
from pipeline.config import TEXT_SOURCES, Config, DataConfig, LlamaConfig, check, to_tree

SCHEMA_VERSION = 1  # raise it when the same config begins to mean another computation

# Where and how a run is executed, shown and named, but not what it computes. Paths of data are excluded as
# well: they differ between machines, and data.fingerprint says which tokens they hold.
_EXCLUDED = (
    "checkpoint", "launch", "track", "sweep", "model.name", "data.workers", "data.files", "data.tokenizer",
)  # fmt: skip
_FIRST_OPTIMIZERS = ("adagrad", "adamw", "sgd", "signum")
_FIRST_OPTIMIZER_SETTINGS = {"name", "lr", "weight_decay", "betas", "momentum", "eps", "clip"}

# To these schedules batch.estimator says nothing unless it is `sample`.
_NO_OTHER_ESTIMATOR = ("inner_product", "coordinate_norm_test")
NOT_OF_ALL_SOURCES = {"field", "samples", "features", "standardise", "validation_fraction"}


def identity_fields(config: Config) -> dict[str, Any]:
    """The settings that decide the result: no checkpoints, launch, tracking, names, paths,
    worker counts.

    Settings of the batch group that its schedule does not read are left out too, so that
    `batch=constant,norm_test batch.eta=0.2,0.3` holds one constant run, not two; likewise those of the sync
    group, of the imbalance group and of the optim group, but for the first optimizers, whose ids have always
    named all settings that there were; and all of the lr group where the optimizer finds its own rate.
    """
    tree: dict[str, Any] = to_tree(config)
    for key in _EXCLUDED:
        group, _, leaf = key.partition(".")
        if leaf:
            del tree[group][leaf]
        else:
            del tree[group]
    read = batch_schedules.settings_read(config.batch.schedule) | {"schedule"}
    if config.batch.schedule in _NO_OTHER_ESTIMATOR and config.batch.estimator != "sample":
        read -= {"estimator"}
    if config.batch.averaged_steps is None:
        read -= AVERAGING
    tree["batch"] = {key: value for key, value in tree["batch"].items() if key in read}
    read = sync_methods.method_class(config.sync.method).settings | {"method"}
    tree["sync"] = {key: value for key, value in tree["sync"].items() if key in read}
    read = optimizers.settings(config.optim)
    if config.optim.name in _FIRST_OPTIMIZERS:
        read |= _FIRST_OPTIMIZER_SETTINGS
    tree["optim"] = {key: value for key, value in tree["optim"].items() if key in read}
    if optimizers.own_rate(config.optim):
        del tree["lr"]
    if config.data.distribution == "shared":
        del tree["data"]["distribution"]
    if isinstance(config.model, LlamaConfig):
        del tree["model"]["kind"]  # which the first runs had no name for
    unread = NOT_OF_ALL_SOURCES - settings_read(config.data)
    tree["data"] = {key: value for key, value in tree["data"].items() if key not in unread}
    tree["imbalance"] = {key: tree["imbalance"][key] for key in config.imbalance.read}
    if not config.imbalance.read:
        del tree["imbalance"]
    return tree


def settings_read(data: DataConfig) -> frozenset[str]:
    """Of the settings of the data group that not all sources read, those that this one does."""
    if data.source in TEXT_SOURCES:
        return frozenset(["field", "validation_fraction"])
    return labelled_samples.settings(data)


def run_id(config: Config) -> str:
    """10 hex digits. Raises ValueError for a value without a canonical form (NaN, infinity)."""
    fields = {"schema": SCHEMA_VERSION, **identity_fields(config)}
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:10]


def complete(config: Config, known: dict[object, str] | None = None) -> Config:
    """The config that is frozen: checked, with the tokens it will read named and its paths absolute.

    Points of a sweep that share a corpus share its fingerprint in `known`, because reading it looks at every
    file. Raises ConfigError when its values cannot work together.
    """
    config = dataclasses.replace(config, batch=own_schedules.completed(config.batch))
    check(config)
    from pipeline.data import fingerprint

    data, known = config.data, {} if known is None else known
    corpus = (data.source, tuple(data.files), data.tokenizer, data.samples, data.features)
    if not data.fingerprint and corpus not in known:
        known[corpus] = fingerprint(data)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            data,
            files=[_absolute(path) for path in data.files],
            tokenizer=data.tokenizer if data.tokenizer == "bytes" else _absolute(data.tokenizer),
            fingerprint=data.fingerprint or known[corpus],
        ),
    )


def _absolute(path: str) -> str:
    """A job may start in another directory."""
    from pipeline.data.hub import is_remote

    return path if is_remote(path) else os.path.abspath(os.path.expanduser(path))
