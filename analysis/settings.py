"""What was run, in words: the settings of all runs, the values side by side where they differ."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from analysis import numbers as text
from analysis.load import Sweep
from pipeline.config import ClassifierConfig, Config
from pipeline.identity import identity_fields

Facts = list[tuple[str, str]]


def describe(sweep: Sweep) -> Facts:
    """What a reader must know of the runs before their numbers: (name, value)."""
    configs = [run.config for run in sweep.runs if run.config]
    facts = [(name, _distinct(map(show, configs))) for name, show in _SETTINGS.items()]
    facts.insert(0, ("Common overrides", ", ".join(f"{k}={v}" for k, v in sweep.common.items())))
    facts.append(("Seeds", _distinct(run.seed for run in sweep.runs)))
    hosts = [run.status.host for run in sweep.runs if run.status and run.status.host]
    facts.append(("Hosts", _distinct(hosts)))
    facts.append(("Dates", _dates(sweep)))
    facts.append(("Read from", sweep.source.place))
    return [(name, value) for name, value in facts if value]


def differences(sweep: Sweep) -> dict[int, dict[str, str]]:
    """By point: the settings that decide a result and are not the same in all runs of the sweep."""
    trees = {run.point: dict(_flat(identity_fields(run.config))) for run in sweep.runs if run.config}
    keys = dict.fromkeys(key for tree in trees.values() for key in tree)
    varied = [key for key in keys if len({tree.get(key) for tree in trees.values()}) > 1]
    return {point: {key: tree[key] for key in varied if key in tree} for point, tree in trees.items()}


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """batch.size, 16"""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, "none" if value is None else str(value)


def in_brief(sweep: Sweep) -> str:
    """One line: model, tokens, seeds, hosts."""
    facts = dict(describe(sweep))
    seeds = facts.get("Seeds", "")
    seeds = f"seeds {seeds}" if "," in seeds else f"seed {seeds}" if seeds else ""
    budgets = [text.compact(run.config.budget_tokens) for run in sweep.runs if run.config]
    units = {_unit(run.config) for run in sweep.runs if run.config}
    unit = units.pop() if len(units) == 1 else "tokens"
    budget = f"{_distinct(budgets)} {unit} per run" if budgets else ""
    return " · ".join(part for part in (facts.get("Model"), budget, seeds, facts.get("Hosts")) if part)


def _model(config: Config) -> str:
    m = config.model
    if isinstance(m, ClassifierConfig):
        widths = f", widths {m.widths}" if m.widths else ""
        return f"{m.name}{widths}, {m.loss.replace('_', ' ')} loss, l2 {m.l2:g}"
    return f"{m.name}, {text.compact(m.parameters)} parameters ({m.layers} layers, width {m.width})"


def _budget(config: Config) -> str:
    sequences, length = config.budget_sequences, config.data.sequence_length
    if _unit(config) == "samples":
        return f"{text.compact(sequences)} samples"
    return f"{text.compact(config.budget_tokens)} tokens ({sequences:,} sequences of {length})"


def _unit(config: Config) -> str:
    return "samples" if isinstance(config.model, ClassifierConfig) else "tokens"


def _data(config: Config) -> str:
    if _unit(config) == "samples":
        return f"{config.data.source}{', standardised' if config.data.standardise else ''}"
    tokenizer = "bytes" if config.data.tokenizer == "bytes" else f"tokens of {config.data.tokenizer}"
    return f"{config.data.source}, {tokenizer}"


def _parallel(config: Config) -> str:
    p = config.parallel
    ranks = "1 process" if p.world_size == 1 else f"{p.world_size} processes"
    return f"{p.strategy}, {ranks}, micro-batch {config.data.micro_batch}, {p.precision}"


def _imbalance(config: Config) -> str:
    kind, i = config.imbalance.kind, config.imbalance
    late = {
        "none": "none",
        "delay": f"{i.ranks} random ranks {i.delay_ms:g} ms late in every step",
        "lognormal": f"ranks late by a log-normal time, median {i.delay_ms:g} ms, σ {i.sigma:g}",
        "variable_length": f"ranks train on {i.min_share:.0%} to all of their sequences",
    }[kind]
    return late + (f"; all sleep {i.compute_ms:g} ms a step besides" if i.compute_ms else "")


def _optimizer(config: Config) -> str:
    o = config.optim
    clip = "no clipping" if o.clip is None else f"clip {o.clip:g}"
    return f"{o.name}, learning rate {o.lr:g}, betas {o.betas}, weight decay {o.weight_decay:g}, {clip}"


def _learning_rate(config: Config) -> str:
    lr = config.lr
    tokens = f"{text.compact(lr.warmup_tokens)} {_unit(config)}"
    warmup = f"{lr.warmup_steps} steps" if lr.warmup_tokens is None else tokens
    scaling = "" if lr.batch_scaling == "none" else f", scaled with the batch: {lr.batch_scaling}"
    return f"{lr.schedule.replace('_', ' ')}, warm-up {warmup}, down to {lr.min_ratio:g} of the peak{scaling}"


def _evaluation(config: Config) -> str:
    every = config.eval.interval_tokens
    unit = _unit(config)
    when = "at the end" if every is None else f"every {text.compact(every)} {unit} and at the end"
    held_out = "held-out samples at most" if unit == "samples" else "held-out sequences"
    return f"{config.eval.sequences} {held_out}, {when}"


_SETTINGS: dict[str, Callable[[Config], str]] = {
    "Model": _model,
    "Budget per run": _budget,
    "Data": _data,
    "Parallelism": _parallel,
    "Synchronisation": lambda config: config.sync.method,
    "Imbalance": _imbalance,
    "Optimizer": _optimizer,
    "Learning rate": _learning_rate,
    "Evaluation": _evaluation,
}


def _distinct(values: Iterable[str]) -> str:
    found = list(dict.fromkeys(values))
    return ("; " if any(", " in value for value in found) else ", ").join(found)


def _dates(sweep: Sweep) -> str:
    statuses = [run.status for run in sweep.runs if run.status]
    times = [t for s in statuses for t in (s.started, s.updated) if t]
    if not times:
        return ""
    first, last = date(min(times)), date(max(times))
    return first if first == last else f"{first} to {last}"


def date(unix: float) -> str:
    """2026-01-31 12:34 UTC, from Unix seconds."""
    return datetime.datetime.fromtimestamp(unix, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
