"""wandb as a mirror of the record: after it, throttled, and never able to stop training."""

from __future__ import annotations

import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from pipeline.batch import schedule_class
from pipeline.config import Config, to_tree
from pipeline.secrets import mask_files, masked
from pipeline.store import Row, RunDirectory

QUEUED_ROWS = 200
STARTING_ROWS = 50_000  # that may wait until wandb has come up: some 50 MB
FINISH_TIMEOUT_S = 60.0


class Tracker:
    """Sends rows to wandb from a thread of its own, so that neither its failure nor its silence reaches the
    run. The record has everything in any case. The thread starts after the first row, since importing wandb
    takes a second that the first step need not share; rows that come meanwhile wait for it."""

    def __init__(self, config: Config, run: RunDirectory, attempt: int) -> None:
        self._run = run
        self._every = config.track.every
        self._rows: queue.SimpleQueue[Row | int] = queue.SimpleQueue()  # an exit code ends it
        self._room = STARTING_ROWS
        self._mirror: threading.Thread | None = None
        self._dropped = self._preempted = False
        mode = os.environ.get("WANDB_MODE") or config.track.mode
        if mode != "disabled":
            self._mirror = threading.Thread(
                target=self._run_mirror, args=(config, run, attempt, mode), daemon=True
            )

    def log(self, row: Row) -> None:
        """Every `track.every`-th step, the first, and every evaluation."""
        mirror = self._mirror  # it withdraws when it fails
        if mirror and (row["step"] % self._every == 0 or row["step"] == 1 or "val/loss" in row):
            if self._rows.qsize() < self._room:
                self._rows.put(row)
            elif not self._dropped:
                print("wandb does not keep up and misses rows; metrics.jsonl is complete", file=sys.stderr)
                self._dropped = True
            self._start_once(mirror)

    def finish(self, exit_code: int, preempted: bool = False) -> None:
        """Waits a while for the mirror to catch up. wandb shows a preempted run as one that will go on."""
        if mirror := self._mirror:
            self._preempted = preempted
            self._rows.put(exit_code)
            self._start_once(mirror)  # also a run without a row is shown, as failed
            mirror.join(FINISH_TIMEOUT_S)
        mask_files(self._logs())  # also where the mirror has failed

    def _logs(self) -> list[Path]:
        """Where words of wandb's server may have come to, in any attempt."""
        return [*self._run.logs.glob("*.log"), *self._run.path.glob("wandb/**/*.log")]

    def _start_once(self, mirror: threading.Thread) -> None:
        if mirror.ident is None:
            mirror.start()

    def _run_mirror(self, config: Config, run: RunDirectory, attempt: int, mode: str) -> None:
        try:
            mirror = self._start(config, run, attempt, mode)
            while isinstance(item := self._rows.get(), dict):
                mirror.log(item)
                if self._rows.empty():  # it has caught up with what waited for it
                    self._room = QUEUED_ROWS
            if self._preempted:
                mirror.mark_preempting()
            mirror.finish(item)
        except Exception:  # whatever wandb raises must not end a run
            self._mirror = None
            print("wandb failed; the run goes on and metrics.jsonl is complete", file=sys.stderr)
            print(masked(traceback.format_exc()), file=sys.stderr)

    def _start(self, config: Config, run: RunDirectory, attempt: int, mode: str) -> Any:
        # Tables and caches would otherwise lie outside the run directory and be lost when it is copied.
        for variable, name in (("DATA", "data"), ("CACHE", "cache"), ("ARTIFACT", "artifacts")):
            os.environ[f"WANDB_{variable}_DIR"] = str(run.path / "wandb" / name)
        import wandb

        wanted: dict[str, Any] = {
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
        mirror = wandb.init(
            mode=mode,  # type: ignore[arg-type]
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
        mirror.define_metric("tokens")
        mirror.define_metric("*", step_metric="tokens")
        return mirror


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"batch": {"eta": 1}} -> {"batch.eta": 1}: wandb filters flat keys reliably."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
