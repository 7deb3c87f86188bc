"""python -m pipeline: one run here, or with -m a sweep. Imports no torch before a run starts."""

from __future__ import annotations

import os
import sys

import hydra
from omegaconf import DictConfig

import pipeline.optim as optimizers
from pipeline.batch import schedule_class
from pipeline.config import BatchConfig, Config, OptimConfig, hints_of, typed
from pipeline.identity import NOT_OF_ALL_SOURCES, complete, settings_read
from pipeline.overrides import CONF, group_names, options_of, run_command
from pipeline.store import RunDirectory


def main() -> int:
    """The exit code: 0 all well, 1 a run failed, 2 the request is wrong, 130 interrupted."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions instead of Hydra's own report and exit code 1
    arguments = sys.argv[1:]
    sys.argv = ["python -m pipeline", *_normalised(arguments)]
    hint = "All settings and options: python -m pipeline --help"
    return run_command(lambda: _command(arguments), arguments, hint)


def _command(arguments: list[str]) -> int:
    if {"--help", "-h"} & set(arguments):
        print(_help())
        return 0
    trees = _composed()
    configs = [complete(typed(tree)) for tree in trees]
    _warn_of_unread_settings(configs, arguments)
    return max((_run(config) for config in configs), default=0)


def _normalised(arguments: list[str]) -> list[str]:
    """-m first, because argparse rejects settings on both sides of it. A chosen launcher implies it: Hydra
    would ignore hydra/launcher=preview for a single run and train it."""
    multirun = ("-m", "--multirun")
    rest = [argument for argument in arguments if argument not in multirun]
    flags = any(argument.startswith("-") for argument in rest)
    launcher = any(argument.startswith("hydra/launcher=") for argument in rest)
    sweep = len(rest) < len(arguments) or (launcher and not flags)
    return ["-m", *rest] if sweep else rest


def _composed() -> list[DictConfig]:
    """The composed tree of a single run; none after --cfg or a sweep, whose launcher runs it.

    The run itself starts outside Hydra, which would wrap its exceptions and write about them.
    """
    trees: list[DictConfig] = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def collect(tree: DictConfig) -> None:
        trees.append(tree)

    collect()
    return trees


def _help() -> str:
    """Not Hydra's own, which takes four times as long and leaves out what each setting means."""
    options = "\n".join(f"  {group}: {', '.join(options_of(group))}" for group in group_names())
    settings = (CONF / "config.yaml").read_text(encoding="utf-8")
    settings = settings[settings.index("\nseed:") : settings.index("\nhydra:")]
    return f"""Crescendo finds out which batch-size schedule trains a language model best.

  python -m pipeline model=10m batch=norm_test                     one run, here
  python -m pipeline -m batch=constant,norm_test 'seed=range(3)'   a sweep, here
  … hydra/launcher=preview                                         the same sweep, only shown
  … --cfg job                                                      the composed config

Options of each group (model=10m):
{options}

Every setting and its default (batch.eta=0.3):
{settings}"""


def _warn_of_unread_settings(configs: list[Config], arguments: list[str]) -> None:
    """In a sweep some options of a group read a setting and others do not; in a single run it was meant to be
    read."""
    for config in configs:
        batch, optim = config.batch.schedule, config.optim.name
        of_batch = set(hints_of(BatchConfig)) - schedule_class(batch).settings - {"schedule"}
        unread = {
            "batch": (f"batch.schedule={batch}", of_batch),
            "optim": (f"optim={optim}", set(hints_of(OptimConfig)) - optimizers.settings(config.optim)),
            "data": (f"data={config.data.source}", NOT_OF_ALL_SOURCES - settings_read(config.data)),
        }
        for argument in arguments:
            group, _, name = argument.lstrip("+").partition("=")[0].partition(".")
            option, settings = unread.get(group, ("", set()))
            if name in settings:
                print(f"{group}.{name}: not read by {option}", file=sys.stderr)


def _run(config: Config) -> int:
    run = RunDirectory.of(config)
    run.freeze(config)
    from pipeline import worker

    return worker.main([str(run.path)])


if __name__ == "__main__":
    sys.exit(main())
