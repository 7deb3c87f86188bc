"""Sweeps on disk with made-up numbers, written through the real RunDirectory."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from analysis.load import RECORD, Sweep, load_sweep
from pipeline.config import Config
from pipeline.store import MetricsWriter, Row, RunDirectory, State, Status, home
from tests.support import config

UNIT = 8  # sequences of a micro-batch on each of the demo's ranks
HOUR_ZERO = 1_760_000_000.0  # 2025-10-09 08:53:20 UTC


@dataclass
class Point:
    """One point of a made-up sweep. `rows` None: nothing recorded; `state` None: nothing started."""

    axes: dict[str, str]
    rows: list[Row] | None = None
    state: State | None = "DONE"
    error: str | None = None
    problem: str | None = None
    extra: list[str] = field(default_factory=list)  # further overrides


def write_sweep(name: str, points: Sequence[Point], common: Sequence[str] = ("experiment=demo",)) -> None:
    entries: list[dict[str, Any]] = []
    for number, point in enumerate(points):
        overrides = [*common, *(f"{axis}={value}" for axis, value in point.axes.items()), *point.extra]
        run = None if point.problem else _write_run(_config(*overrides), point, number)
        entries.append({"run": run, "axes": point.axes, "overrides": overrides, "problem": point.problem})
    axes = list(dict.fromkeys(axis for point in points for axis in point.axes))
    swept = [f"{axis}={','.join(dict.fromkeys(p.axes.get(axis, '') for p in points))}" for axis in axes]
    manifest = {
        "name": name,
        "created": HOUR_ZERO,
        "command": ["python", "-m", "pipeline", "-m", *common, *swept],
        "axes": axes,
        "common": dict(item.split("=", 1) for item in common),
        "points": entries,
    }
    folder = home() / "sweeps" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def rerun(name: str, run: str, rows: Sequence[Row] | None, state: State, updated: float) -> str:
    """Adds a point that is `run` again under another id, as after a change of what the id is made of."""
    again = RunDirectory(home() / "runs" / f"{run}again")
    shutil.copytree(home() / "runs" / run, again.path)
    if rows is not None:
        again.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again.status_file.write_text(json.dumps(vars(again.status()) | {"state": state, "updated": updated}))
    path = home() / "sweeps" / name / "manifest.json"
    manifest = json.loads(path.read_text())
    (point,) = (point for point in manifest["points"] if point["run"] == run)
    manifest["points"].append({**point, "run": again.id})
    path.write_text(json.dumps(manifest))
    return again.id


def command_of(name: str, number: int, *words: str) -> None:
    """Makes these words the command that asked for a point last."""
    path = home() / "sweeps" / name / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["points"][number]["command"] = ["python", "-m", "pipeline", *words]
    path.write_text(json.dumps(manifest))


_config = functools.cache(config)  # composing takes a while


def _write_run(settings: Config, point: Point, number: int) -> str:
    directory = RunDirectory.of(settings)
    if point.state is None:
        return directory.id
    directory.freeze(settings)
    if point.rows:
        writer = MetricsWriter(directory.metrics_file)
        for row in point.rows:
            writer.write(row)
        writer.close()
    last = point.rows[-1] if point.rows else {"step": 0, "tokens": 0}
    directory.write_status(
        Status(
            point.state,
            attempt=1,
            step=last["step"],
            tokens_seen=last["tokens"],
            budget_tokens=settings.budget_tokens,
            started=HOUR_ZERO + 60 * number,
            host="node-1",
            exit_code=0 if point.state == "DONE" else 1,
            error=point.error,
        )
    )
    return directory.id


def train_row(step: int, tokens: int, loss: float, size: int, seconds: float, **more: float) -> Row:
    return {
        **_clock(step, tokens, seconds),
        "train/loss": loss,
        "lr": 1e-3,
        "batch/size": size,
        "batch/requested": more.pop("requested", size),
        "batch/accumulation": -(-size // UNIT),
        "grad/norm": 1.0,
        "throughput/tokens_per_s": 1.0,
        **more,
    }


def val_row(step: int, tokens: int, loss: float, seconds: float) -> Row:
    return {**_clock(step, tokens, seconds), "val/loss": loss}


def _clock(step: int, tokens: int, seconds: float) -> Row:
    return {
        "step": step,
        "tokens": tokens,
        "sequences": tokens // 128,
        "time": seconds,
        "wall": HOUR_ZERO + seconds,
        "attempt": 1,
    }


def short_run(val_loss: float, steps: int = 4, train_loss: float = 3.0, seconds: float = 8.0) -> list[Row]:
    """800k tokens in equal steps, one evaluation at the end."""
    tokens = 800_000 // steps
    size = tokens // 128
    rows = [train_row(i, i * tokens, train_loss, size, seconds * i / steps) for i in range(1, steps + 1)]
    return [*rows, val_row(steps, steps * tokens, val_loss, seconds)]


def pairs(losses: dict[str, Sequence[float]], **shape: Any) -> list[Point]:
    """Finished short runs: schedule -> final validation loss by seed; `shape`: of short_run."""
    return [
        Point({"batch": batch, "seed": str(seed)}, short_run(loss, **shape.get(batch, {})))
        for batch, values in losses.items()
        for seed, loss in enumerate(values)
    ]


# --- realistic curves ------------------------------------------------------------------------------------


def realistic_run(
    batch: Callable[[float], int], seed: int, budget: int = 800_000, stop: float = 1.0, measured: bool = False
) -> list[Row]:
    """A demo-sized run: power-law losses, worse with fewer steps, noise that shrinks with the batch.

    batch: the size at a share of the budget; stop: the share at which the run breaks off.
    """
    noise, seed_offset = random.Random(seed), 0.02 * random.Random(1000 + seed).gauss(0, 1)
    rows: list[Row] = []
    sequences, step, seconds, evaluated, progress = 0, 0, 0.0, 0, 0.0
    while sequences < budget // 128 * stop:
        requested = batch(sequences * 128 / budget)
        size = min(requested, budget // 128 - sequences)
        sequences, step = sequences + size, step + 1
        seconds += 0.012 + size * 128 / 60_000
        progress += size**0.35 / 390
        tokens = sequences * 128
        loss = 1.75 + 3.8 * math.exp(-3.4 * progress**0.55) + seed_offset
        scale = 5 + 160 * tokens / budget
        more = {"requested": float(requested)}
        if measured:
            variance = scale * math.exp(noise.gauss(0, 0.25))
            more |= {"stat/noise_scale": variance if noise.random() > 0.03 else -4 * variance}
        sample = loss + noise.gauss(0, 0.35 / math.sqrt(size))
        rows.append(train_row(step, tokens, sample, size, seconds, **more))
        if tokens // 80_000 > evaluated or tokens == budget // 128 * 128:
            evaluated = tokens // 80_000
            rows.append(val_row(step, tokens, loss + noise.gauss(0, 0.004) + 0.03, seconds))
    return rows


SCHEDULES: dict[str, tuple[Callable[[float], int], bool]] = {
    "constant_16": (lambda share: 16, False),
    "constant_64": (lambda share: 64, False),
    "stages": (lambda share: 16 if share < 0.1 else 32 if share < 0.3 else 64, False),
    "norm_test": (lambda share: min(8 * round(1 + 5 * share), 256), True),
}


def realistic(seeds: int = 2) -> list[Point]:
    """The demo: four schedules, all runs finished."""
    return [
        Point({"batch": name, "seed": str(seed)}, realistic_run(batch, seed, measured=measured))
        for name, (batch, measured) in SCHEDULES.items()
        for seed in range(seeds)
    ]


def many_long_runs(schedules: int, seeds: int, rows: int) -> Sweep:
    """A sweep of learning rates with `rows` training steps in each run and an evaluation every hundredth of
    them. Only its first run is on disk: a million rows would take a minute to write."""
    write_sweep(
        "many", [Point({"optim.lr": "0.001", "seed": "0"}, short_run(2.0), extra=["batch=constant_16"])]
    )
    sweep = load_sweep("many")
    (first,) = sweep.runs
    assert first.config is not None
    runs, tables = [], []
    for point in range(schedules * seeds):
        rate, seed = 0.001 * (1 + point // seeds), point % seeds
        config = dataclasses.replace(
            first.config, seed=seed, optim=dataclasses.replace(first.config.optim, lr=rate)
        )
        axes = {"optim.lr": f"{rate:.3f}", "seed": str(seed)}
        runs.append(dataclasses.replace(first, point=point, id=f"run{point}", axes=axes, config=config))
        tables.append(_long_record(point, point // seeds, rows))
    return dataclasses.replace(sweep, axes=["optim.lr", "seed"], runs=runs, record=pl.concat(tables))


def _long_record(point: int, schedule: int, rows: int) -> pl.DataFrame:
    noise = np.random.default_rng(point)
    step = np.arange(1.0, rows + 1)
    loss = 2 + 0.004 * schedule + 3 * np.exp(-5 * step / rows)
    training = {
        "step": step,
        "tokens": 2_048 * step,
        "sequences": 16 * step,
        "time": np.cumsum(0.1 + 0.001 * schedule + 0.01 * noise.random(rows)),
        "train/loss": loss + noise.normal(0, 0.05, rows),
        "batch/size": np.full(rows, 16.0),
        "batch/requested": np.full(rows, 16.0),
        "stat/noise_scale": 20 * np.exp(2 * step / rows + noise.normal(0, 0.4, rows)),
    }
    evaluated = {
        key: training[key][rows // 100 - 1 :: rows // 100] for key in ("step", "tokens", "sequences", "time")
    }
    evaluated["val/loss"] = loss[rows // 100 - 1 :: rows // 100] + noise.normal(0, 0.01, 100)
    parts = [pl.DataFrame(columns) for columns in (training, evaluated)]
    both = pl.concat(parts, how="diagonal").sort("step", maintain_order=True)
    return pl.concat([pl.DataFrame(schema=RECORD), both], how="diagonal").with_columns(point=pl.lit(point))
