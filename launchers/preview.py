"""hydra/launcher=preview: what a sweep would do. Writes nothing."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console

from launchers import manifest
from launchers.compose import Compose
from launchers.plan import Plan, Point, again, compare, make_plan, state
from launchers.scheduler import SchedulerError, available, queue_of
from launchers.shapes import Shape, by_shape
from launchers.state import UNFINISHED
from launchers.table import (
    DASH,
    Column,
    axis_columns,
    count,
    duration,
    make_console,
    name_points,
    progress,
    say,
    screen_width,
    show_command,
    table,
    tally,
)
from pipeline.config import Config, ConfigError, LlamaConfig, common_unit
from pipeline.store import RunDirectory, home

_LISTED_SIZES = 4  # batch sizes named one by one before a plan is abridged
_RECENT_RUNS = 100  # finished runs read for the estimate of the time


@dataclass(frozen=True)
class Work:
    """What a point asks for."""

    batch: str
    steps: str


def launch(jobs: Sequence[Sequence[str]], compose: Compose) -> int:
    """Shows what the points would do, and starts nothing. The exit code."""
    console = make_console()
    plan = make_plan(progress(jobs, "composing"), compose)
    show_heading(console, plan)
    rates = Rates()
    queue = queue_of(point.directory.status() for point in plan.valid)
    states = [state(point, queue) for point in plan.points]
    show_points(console, plan, states, rates)
    show_invalid(console, plan)
    console.print()
    todo = [p for p, s in zip(plan.points, states, strict=True) if s in UNFINISHED]
    say(console, f"{tally(states, EXCUSES)}. Nothing was written.")
    say(console, *_estimate(todo, rates))
    if todo and available():
        _show_cluster(console, plan.name, todo, rates)
    if plan.valid and not todo and manifest.holds(plan):
        show_command(console, "compare", compare(plan.name))
    elif plan.valid:  # also when all is done: running the sweep writes the manifest that compare needs
        show_command(console, "run", again("hydra/launcher=local"))
    return 2 if plan.invalid else 0


def _show_cluster(console: Console, sweep: str, todo: Sequence[Point], rates: Rates) -> None:
    """What it would be asked for, and whether it would take it."""
    from launchers.slurm import earliest_starts

    shapes = by_shape([(point, point.config) for point in todo if point.config])
    try:
        starts = earliest_starts(sweep, shapes)
    except SchedulerError as error:
        say(console, "", *str(error).splitlines(), style="yellow")
        return
    show_shapes(console, shapes, rates, starts)
    show_command(console, "submit", again("hydra/launcher=slurm"))


EXCUSES = {"done": "skipped", "queued": "skipped", "running": "elsewhere, skipped", "invalid": "excluded"}


def introduce(console: Console, plan: Plan) -> bool:
    """Shows the plan's heading and its invalid points. Whether there is something to run."""
    show_heading(console, plan)
    show_invalid(console, plan)
    strict = any(point.config and point.config.sweep.strict for point in plan.points)
    if plan.valid and not (plan.invalid and strict):
        return True
    why = "sweep.strict=true and a point is invalid" if plan.valid else "no point is valid"
    console.print()
    say(console, f"Nothing was run: {why}.")
    return False


def show_heading(console: Console, plan: Plan) -> None:
    """`sweep demo: 8 points = batch(4) × seed(2)`."""
    sizes = _factors(plan)
    whole = math.prod(sizes.values()) == len(plan.points) + plan.duplicates + len(plan.excluded)
    shown = [f"{axis}({size})" for axis, size in sizes.items() if size > 1]
    axes = (" × " if whole else ", ").join(shown)
    points = f"{len(plan.points)} point" + "s" * (len(plan.points) != 1)
    repeats = f", without {plan.duplicates} that repeat another" if plan.duplicates else ""
    left_out = f", {len(plan.excluded)} left out by sweep.exclude" if plan.excluded else ""
    what = f" {'=' if whole else 'in'} {axes}" if axes else ""
    say(console, f"sweep {plan.name}: {points}{what}{repeats}{left_out}")
    if plan.common:
        say(console, "  all with " + " ".join(f"{key}={value}" for key, value in plan.common.items()))
    for condition in plan.unmet:
        say(console, f"  sweep.exclude: no point meets {condition}", style="yellow")


def _factors(plan: Plan) -> dict[str, int]:
    """How many values each axis takes; axes that are walked together count as one."""
    group_of = {axis: group for group in plan.zips for axis in group}
    factors: dict[str, int] = {}
    for axis in plan.axes:
        group = [other for other in group_of.get(axis, [axis]) if other in plan.axes]
        values = {tuple(p.axes.get(other) for other in group) for p in (*plan.points, *plan.excluded)}
        name = axis if len(group) == 1 else f"({', '.join(group)})"
        factors[name] = len(values - {(None,) * len(group)})
    return factors


def show_points(console: Console, plan: Plan, states: Sequence[str], rates: Rates) -> None:
    """A line for each point. `states` and what it costs by `rates` stand beside it."""
    work = _describe_all(plan.points)
    seconds = [rates.seconds(point.config) if point.config else None for point in plan.points]
    columns = [
        Column("run", [point.run or DASH for point in plan.points], "left"),
        *axis_columns(plan.axes, [point.axes for point in plan.points]),
        Column("ranks", [_ranks(point) for point in plan.points], optional=2),
        Column("batch size", [each.batch for each in work], "left", optional=1),
        Column("steps", [each.steps for each in work]),
        Column("est. time", [duration(s) if s is not None else DASH for s in seconds], optional=3),
        Column("state", list(states), "left"),
    ]
    console.print()
    console.print(table(columns, screen_width(console)), soft_wrap=True)


def show_invalid(console: Console, plan: Plan) -> None:
    """The invalid points with all their reasons; points with the same reasons stand together."""
    reasons: dict[str, list[dict[str, str]]] = {}
    for point in plan.invalid:
        reasons.setdefault(point.problem or "", []).append(point.axes)
    for problem, points in reasons.items():
        console.print()
        say(console, f"invalid: {name_points(points) or 'the only point'}", style="red")
        say(console, *("  " + line for line in problem.splitlines()))


def describe(config: Config) -> Work:
    """Batch sizes and optimizer steps: exact where no measurement decides, else the range it can take."""
    plan = config.batch_plan()
    if plan.sizes is None:
        steps = [-(-config.trained_sequences // size) for size in (plan.largest, plan.first)]
        return Work(f"{plan.first}…{plan.largest} {config.batch.schedule}", f"{steps[0]}…{steps[1]}")
    sizes = plan.sizes
    whole = sizes[:-1] or sizes  # the last step, cut to the budget, is no size of its own
    stages = [str(size) for size, _ in itertools.groupby(whole)]
    if len(stages) > _LISTED_SIZES:
        stages = [stages[0], "…", stages[-1]]
    return Work("→".join(stages), str(len(sizes)))


def _describe_all(points: Sequence[Point]) -> list[Work]:
    """Points that differ in other things share one batch plan, which can be long to walk through."""
    known: dict[str, Work] = {}
    works = []
    for config in (point.config for point in points):
        if config is None:
            works.append(Work(DASH, DASH))
            continue
        key = repr(
            (
                config.batch,
                config.lr,
                config.budget,
                config.branch,
                config.data.sequence_length,
                config.batch_multiple,
            )
        )
        if key not in known:
            known[key] = describe(config)
        works.append(known[key])
    return works


class Rates:
    """Tokens per second of finished runs, newest first, by what the speed depends on."""

    def __init__(self) -> None:
        self._finished = _finished_runs()

    def matching(self, config: Config) -> list[float]:
        """Of runs with this model, mesh and sequence length; with this batch group too if there are any."""
        alike = [(other, rate) for other, rate in self._finished if _shape(other) == _shape(config)]
        same_batch = [rate for other, rate in alike if other.batch == config.batch]
        return same_batch or [rate for _, rate in alike]

    def seconds(self, config: Config) -> float | None:
        rates = self.matching(config)
        return config.trained_tokens / statistics.median(rates) if rates else None


def _shape(config: Config) -> object:
    data = config.data
    samples = None if isinstance(config.model, LlamaConfig) else data.source  # they have shapes of their own
    return (config.model, config.parallel, data.sequence_length, data.micro_batch, samples)


def _finished_runs() -> list[tuple[Config, float]]:
    """The config and the tokens per second of the newest finished runs."""
    newest = sorted((home() / "runs").glob("*/status.json"), key=lambda path: -path.stat().st_mtime)
    finished: list[tuple[Config, float]] = []
    for file in newest:
        run = RunDirectory(file.parent)
        status, row = run.status(), run.last_row()
        if status and status.state == "DONE" and row and row["time"] > 0:
            with contextlib.suppress(ConfigError):  # frozen under an older schema
                config = run.config()
                finished.append((config, (row["tokens"] - config.first_token) / row["time"]))
        if len(finished) == _RECENT_RUNS:
            break
    return finished


def _estimate(points: Sequence[Point], rates: Rates) -> list[str]:
    """Sentences on the time the points would take and where the figure comes from."""
    configs = [point.config for point in points if point.config]
    if not configs:
        return []
    seconds = [s for config in configs if (s := rates.seconds(config)) is not None]
    unit = common_unit(config.unit for config in configs)
    trained = f"{count(sum(config.trained_tokens for config in configs))} {unit}"
    if not seconds:
        return [f"{trained} to train; no finished run here to estimate the time from."]
    at_a_time = min(configs[0].launch.max_parallel or 1, len(configs))
    alike = "data" if unit == "samples" else "sequence length"
    known = "" if len(seconds) == len(configs) else f" for {len(seconds)} of {len(configs)} runs"
    return [
        f"{trained} to train, about {duration(sum(seconds) / at_a_time)}{known}, {at_a_time} at a time "
        f"(from the median {unit}/s of finished runs with the same model, mesh and {alike})."
    ]


def show_shapes(
    console: Console,
    shapes: Mapping[Shape, Sequence[Point]],
    rates: Rates,
    starts: Mapping[Shape, str | None],
) -> None:
    """What the cluster is asked for, one line for each kind of job."""
    unit = "GPU-hours" if any(shape.gpus_per_node for shape in shapes) else "rank-hours"
    estimates = [_device_hours(shape, points, rates) for shape, points in shapes.items()]
    limits = [len(points) * shape.device_hours for shape, points in shapes.items()]
    columns = [
        Column("jobs of", list(map(str, shapes)), "left"),
        Column("runs", [str(len(points)) for points in shapes.values()]),
        Column(f"est. {unit}", [DASH if e is None else f"{e:,.1f}" for e in estimates], optional=2),
        Column("at the time limit", [f"{limit:,.1f}" for limit in limits]),
        Column("earliest start", [starts.get(shape) or DASH for shape in shapes], "left", optional=1),
    ]
    console.print()
    console.print(table(columns, screen_width(console)), soft_wrap=True)


def _device_hours(shape: Shape, points: Sequence[Point], rates: Rates) -> float | None:
    seconds = [rates.seconds(point.config) for point in points if point.config]
    known = [each for each in seconds if each is not None]
    return shape.devices * statistics.mean(known) * len(points) / 3600 if known else None


def _ranks(point: Point) -> str:
    return str(point.config.parallel.world_size) if point.config else DASH
