"""wandb as a mirror of the record: after it, throttled, and never able to stop training."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

from pipeline.batch import schedule_class
from pipeline.config import Config, to_tree
from pipeline.store import Row, RunDirectory


class Tracker:
    """Sends rows to wandb. When wandb fails once, says so and goes silent; the record has everything."""

    def __init__(self, config: Config, run: RunDirectory, attempt: int) -> None:
        self._every = config.track.every
        self._run: Any = None
        mode = os.environ.get("WANDB_MODE") or config.track.mode
        if mode != "disabled":
            self._guard(self._start, config, run, attempt, mode)

    def log(self, row: Row) -> None:
        """Every `track.every`-th step, the first, and every evaluation."""
        if self._run and (row["step"] % self._every == 0 or row["step"] == 1 or "val/loss" in row):
            self._guard(self._run.log, row)

    def finish(self, exit_code: int) -> None:
        if self._run:
            self._guard(self._run.finish, exit_code)

    def _start(self, config: Config, run: RunDirectory, attempt: int, mode: str) -> None:
        # Tables and caches would otherwise lie outside the run directory and be lost when it is copied.
        for variable, name in (("DATA", "data"), ("CACHE", "cache"), ("ARTIFACT", "artifacts")):
            os.environ[f"WANDB_{variable}_DIR"] = str(run.path / "wandb" / name)
        import wandb

        wanted = {
            "console": "off",
            "disable_git": True,
            "show_info": False,
            "silent": True,
            "init_timeout": 60.0,
            "finish_timeout": 120.0,
            "x_disable_meta": False,
            "x_save_requirements": False,
            # kill -9 loses what is not yet in the file; 15 s is the library's default.
            "x_transaction_log_flush_interval": 1.0,
        }
        _, first = schedule_class(config.batch.schedule)(config).start()
        settings = wandb.Settings(**{k: v for k, v in wanted.items() if k in wandb.Settings.model_fields})
        self._run = wandb.init(
            mode=mode,
            project=config.track.project,
            entity=config.track.entity,
            group=config.track.group,
            # One id per attempt: an offline id that is logged to twice comes out with shifted steps.
            id=f"{run.id}-a{attempt}",
            name=f"{config.batch.schedule}-{first.size}-{config.model.name}-seed{config.seed}",
            job_type="train",
            tags=[*config.track.tags, config.batch.schedule, config.model.name, config.parallel.strategy],
            config={**flatten(to_tree(config)), "run": run.id, "attempt": attempt},
            dir=run.path,
            reinit="finish_previous",
            settings=settings,
        )
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")

    def _guard(self, function: Any, *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception:  # whatever wandb raises must not end a run
            self._run = None
            print("wandb failed; the run goes on and metrics.jsonl is complete", file=sys.stderr)
            traceback.print_exc()


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"batch": {"eta": 1}} -> {"batch.eta": 1}: wandb filters flat keys reliably."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
