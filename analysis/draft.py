"""A file as analysis.study_file has it, filled in as far as a project at wandb tells: to be corrected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from analysis import online
from analysis.records import COLUMNS

RUNS = 100  # that are looked at
_MOST_AXES = 4
_MOST_NAMES = 20

# What trainers call them, the likeliest first: Hugging Face, Megatron, torchtitan.
_CALLED = {
    "train/loss": ("loss", "lm loss", "loss_metrics/global_avg_loss", "train_loss"),
    "val/loss": ("eval/loss", "validation/loss", "valid/loss", "val_loss", "eval_loss"),
    "tokens": ("train/num_input_tokens_seen", "consumed_tokens", "tokens_seen", "n_tokens"),
    "step": ("train/global_step", "global_step", "trainer/global_step"),
    "batch/size": ("batch_size", "global_batch_size", "batch-size"),
}


def draft(project: str, name: str) -> str:
    """For the newest runs of ENTITY/PROJECT. Raises ConfigError as analysis.online does."""
    configs, metrics = online.glance(project, RUNS)
    called = {
        column: metric
        for column in COLUMNS
        for metric in [next((name for name in (column, *_CALLED.get(column, ())) if name in metrics), None)]
        if metric
    }
    differing = _differing(configs)
    seeds = sorted(filter(_is_seed, differing), key=len)
    others = [key for key in differing if key not in seeds]
    axes = _splitting(configs, others)[:_MOST_AXES]
    tree: dict[str, Any] = {"name": name, "source": f"wandb:{project}", "axes": axes}
    if seeds:
        tree["seed"] = seeds[0]
    tree["metrics"] = called
    lines = [yaml.safe_dump(tree, sort_keys=False).rstrip()]
    if left := [key for key in others if key not in axes]:
        lines.append(f"# The runs differ in these as well: {', '.join(left[:_MOST_NAMES])}")
    lines.append(f"# Metrics: {', '.join(metrics[:_MOST_NAMES])}")
    return "\n".join(lines)


def _differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that tell groups of runs apart: seeds, and what is not another value in each of many runs."""
    keys = dict.fromkeys(key for config in configs for key in config)
    different = {key: len({str(config.get(key)) for config in configs}) for key in keys}
    most = max(3, len(configs) - 1)
    return [key for key, n in different.items() if n > 1 and (n <= most or _is_seed(key))]


def _splitting(configs: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    """Those that tell runs apart that the keys before them do not."""
    kept: list[str] = []
    groups = 1
    for key in keys:
        found = len({tuple(str(config.get(each)) for each in (*kept, key)) for config in configs})
        if found > groups:
            kept, groups = [*kept, key], found
    return kept


def _is_seed(key: str) -> bool:
    return key.lower().endswith("seed")
