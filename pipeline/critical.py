"""python -m pipeline.critical RUN: how large the batch may be at a checkpoint before it costs loss.

Merrill et al. 2025 (arXiv 2505.23971, section 3): from one checkpoint branches go on with the batch k·B and
the rate f(k)·η, for the same tokens Δ; f(k) = √k for Adam and its kin, k for SGD. k* is the largest k for
which no smaller one does better by more than a tolerance, and the critical batch is k*·B.

The branches are a sweep like any other: the same launchers run them, the same command asked again does what
is missing, and when all are done it reports. All branches read the same sequences. One that diverges is done,
and too large.

Their losses are exponential averages of single steps, whose noise at a small batch is far above any
difference of interest. But all branches read the same sequences. So losses are averaged over the same
stretches of them, one batch of the largest branch long, before anything is compared: what the data do to a
loss cancels in the difference. The tolerance is theirs, 0.01, unless the differences are noisier: an average
with the weights α(1 − α)^i has the standard error σ √(α/(2 − α)), where σ is the deviation of single
differences, and a branch counts as worse when it is so by more than twice that.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.batch._interface import round_up
from pipeline.config import Config, ConfigError, parse_tokens, to_tree
from pipeline.identity import complete
from pipeline.optim import batch_scalings
from pipeline.optim._batch_scaling import BatchScaling
from pipeline.store import Row, RunDirectory, home, write_atomically

SMOOTHING = 0.5  # α of the averaged loss
TOLERANCE = 0.01  # nats per token
FEWEST_STEPS = 16  # of the branch with the largest batch


@dataclasses.dataclass(frozen=True)
class Branch:
    """How one branch went."""

    factor: int  # k
    batch: int  # sequences
    steps: int
    losses: tuple[float, ...]  # of each stretch of the stream, nats per token; none where it diverged

    @property
    def diverged(self) -> bool:
        return not self.losses

    @property
    def loss(self) -> float:
        """Averaged over the last stretches."""
        return averaged(self.losses) if self.losses else math.inf


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How far the batch may grow."""

    factor: int  # k*
    next_factor: int | None  # the smallest that was too large; None: none was


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 all well, 1 a branch failed, 2 the request is wrong."""
    options = _parser().parse_args(arguments)
    try:
        return _measure(options)
    except ConfigError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        return 2


# --- the verdict


def averaged(losses: Sequence[float], alpha: float = SMOOTHING) -> float:
    """The exponential average at the end, begun with the first loss."""
    average = losses[0]
    for loss in losses[1:]:
        average = (1 - alpha) * average + alpha * loss
    return average


def standard_error(losses: Sequence[float], alpha: float = SMOOTHING) -> float:
    """Of the average at the end. The deviation comes from the differences of neighbours, which a slow change
    hardly touches (von Neumann 1941)."""
    changes = [later - earlier for earlier, later in itertools.pairwise(losses)]
    deviation = math.sqrt(statistics.fmean(change**2 for change in changes) / 2)
    return deviation * math.sqrt(alpha / (2 - alpha))


def difference(branch: Branch, other: Branch) -> tuple[float, float]:
    """How much worse a branch ends than another, and the standard error of that."""
    paired = [a - b for a, b in zip(branch.losses, other.losses, strict=True)]
    return averaged(paired), standard_error(paired)


def verdict(branches: Sequence[Branch], tolerance: float = TOLERANCE) -> Verdict:
    """k* of branches in the order of their factors: L_k ≤ L_k' + tolerance for all k' < k. The first has not
    diverged."""
    accepted = branches[0].factor
    for index, branch in enumerate(branches[1:], 1):
        if branch.diverged:
            return Verdict(accepted, branch.factor)
        for smaller in branches[:index]:
            worse, error = difference(branch, smaller)
            if worse > max(tolerance, 2 * error):
                return Verdict(accepted, branch.factor)
        accepted = branch.factor
    return Verdict(accepted, None)


def stretches(rows: Sequence[Row], start: int, length: int) -> tuple[float, ...]:
    """Mean training loss of each whole stretch of `length` sequences after the first `start`."""
    ends = [float(row["sequences"]) for row in rows]
    sums = itertools.accumulate(
        row["train/loss"] * (end - before)
        for row, before, end in zip(rows, [float(start), *ends[:-1]], ends, strict=True)
    )
    total = np.concatenate([[0.0], np.fromiter(sums, float)])
    edges = np.arange(start, ends[-1] + 0.5, length)
    return tuple(np.diff(np.interp(edges, [start, *ends], total)) / length)


# --- the branches


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where the branches start, and how they differ."""

    parent: RunDirectory
    config: Config  # of the parent
    tokens: int  # seen at the checkpoint
    batch: int  # B: sequences of the parent's next step
    rate: float  # optim.lr of a branch whose batch is B
    more: int  # Δ, tokens
    factors: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"critical-{self.parent.id}-{self.tokens}"

    @property
    def name_of_parent(self) -> str:
        """Its id, or where it lies if that is elsewhere."""
        here = self.parent.path == home() / "runs" / self.parent.id
        return self.parent.id if here else str(self.parent.path)

    def branch(self, factor: int) -> Config:
        config = self.config
        return dataclasses.replace(
            config,
            budget=dataclasses.replace(config.budget, stop_tokens=self.tokens + self.more),
            branch=dataclasses.replace(config.branch, run=self.name_of_parent, tokens=self.tokens),
            batch=dataclasses.replace(config.batch, schedule="constant", size=factor * self.batch),
            optim=dataclasses.replace(config.optim, lr=self.rate),
            lr=dataclasses.replace(config.lr, batch_scaling=rule(config)),
            # What the parent's sweep walks together or leaves out is of its axes.
            sweep=dataclasses.replace(config.sweep, name=self.name, strict=True, zip=[], exclude=[]),
            track=dataclasses.replace(config.track, group=self.name),
        )


_RATES = {"sqrt": "√k × the rate", "linear": "k × the rate", "none": "the same rate"}


def rule(config: Config) -> Any:
    """f: √k, or k where the optimizer has only that, or 1 where neither is defined for it."""
    defined = batch_scalings(config.optim)
    return next(rule for rule in ("sqrt", "linear", "none") if rule in defined)


def plan_branches(parent: RunDirectory, at: int | None, more: int | None, factors: Sequence[int]) -> Plan:
    """Raises ConfigError when the parent has no such checkpoint or too few tokens are left."""
    from pipeline.checkpoint import Progress, by_tokens, read_progress

    config = parent.config()
    kept = by_tokens(parent)
    if not kept:
        raise ConfigError(f"{parent.id}: has no checkpoint to branch from. Set checkpoint.interval_tokens")
    usable = [tokens for tokens in kept if tokens < config.planned_tokens]
    tokens = at if at is not None else max(usable, default=-1)
    if tokens not in kept or tokens not in usable:
        listed = ", ".join(map(str, sorted(usable))) or "none"
        raise ConfigError(
            f"--at {'newest' if at is None else at}: run {parent.id} has checkpoints to branch from at these "
            f"tokens: {listed}. checkpoint.interval_tokens makes them and checkpoint.keep keeps them"
        )
    progress = Progress.from_tree(read_progress(kept[tokens]))
    batch, length = progress.next_batch.size, config.data.sequence_length
    largest = max(factors) * batch * length
    if more is None:
        more = max(config.planned_tokens // 20, FEWEST_STEPS * largest)
    if more < 3 * largest:
        raise ConfigError(
            f"--tokens {more}: less than 3 steps of the largest batch ({max(factors)} × {batch} sequences × "
            f"{length} = {largest} tokens). Nearest: {3 * largest}; or leave out --factors {max(factors)}"
        )
    if tokens + more > config.planned_tokens:
        raise ConfigError(
            f"--tokens {more}: run {parent.id} has {config.planned_tokens - tokens} tokens left after "
            f"{tokens}. Choose an earlier checkpoint (--at), fewer tokens, or smaller factors"
        )
    scaled = BatchScaling(config).factor(batch, progress.first_batch, progress.noise)
    return Plan(parent, config, tokens, batch, config.optim.lr * scaled, more, tuple(factors))


def command(plan: Plan, launcher: str) -> list[str]:
    """The sweep over all branches. What they have in common is an experiment in a file of its own."""
    place = home() / "sweeps" / plan.name / "conf"
    tree = to_tree(plan.branch(1))
    if plan.config.model.kind != "llama":  # the default model is one, with other settings
        tree = {"defaults": [{"override /model": plan.config.model.kind}], **tree}
    text = "# @package _global_\n" + yaml.safe_dump(tree, sort_keys=False)
    (place / "experiment").mkdir(parents=True, exist_ok=True)
    write_atomically(place / "experiment" / f"{plan.name}.yaml", text)
    sizes = ",".join(str(factor * plan.batch) for factor in plan.factors)
    return [
        *[sys.executable, "-m", "pipeline", "-m", "--config-dir", os.path.relpath(place)],
        *[f"experiment={plan.name}", f"batch.size={sizes}", f"hydra/launcher={launcher}"],
    ]


def ended(plan: Plan) -> list[Branch]:
    """The branches that are done or have diverged, in the order of their factors."""
    branches = []
    for factor in sorted(plan.factors):
        config = complete(plan.branch(factor))
        run = RunDirectory.of(config)
        status = run.status()
        if status and (status.state == "DONE" or status.diverged):
            rows = [row for row in run.rows() if "train/loss" in row]
            size = round_up(config.batch.size, config.batch_multiple)
            length = max(plan.factors) * plan.batch
            losses = () if status.diverged else stretches(rows, config.first_sequence, length)
            branches.append(Branch(factor, size, len(rows), losses))
    return branches


# --- the report


def _measure(options: argparse.Namespace) -> int:
    parent = RunDirectory.find(options.run)
    plan = plan_branches(parent, options.at, options.tokens, options.factors)
    branches = ended(plan)
    if len(branches) < len(plan.factors):
        done = subprocess.run(command(plan, options.launcher), stdout=sys.stderr if options.json else None)
        branches = ended(plan)
        # A branch that diverges is a failed run, and an answer.
        if options.launcher == "preview" or (done.returncode and len(branches) < len(plan.factors)):
            return done.returncode
    if len(branches) < len(plan.factors):
        if options.json:
            print(json.dumps({"sweep": plan.name, "done": len(branches), "branches": len(plan.factors)}))
            return 0
        print(
            f"{len(branches)} of {len(plan.factors)} branches are done. When all are, the same command "
            f"reports: {shlex.join(['python', '-m', 'pipeline.critical', *sys.argv[1:]])}"
        )
        return 0
    if branches[0].diverged:
        raise ConfigError(
            f"{parent.id}: diverges after {plan.tokens} tokens with its own batch of {plan.batch}, so there "
            f"is nothing to compare with. Choose an earlier checkpoint (--at)"
        )
    found = verdict(branches, options.tolerance)
    report = _report(plan, branches, found)
    place = home() / "reports" / plan.name
    place.mkdir(parents=True, exist_ok=True)
    write_atomically(place / "critical.json", json.dumps(report, indent=1) + "\n")
    _draw(plan, branches, found, place / "critical.png")
    print(json.dumps(report, indent=1) if options.json else _text(plan, branches, found, place))
    return 0


def _report(plan: Plan, branches: Sequence[Branch], found: Verdict) -> dict[str, Any]:
    return {
        "run": plan.parent.id,
        "tokens": plan.tokens,
        "batch": plan.batch,
        "branch_tokens": plan.more,
        "batch_scaling": rule(plan.config),
        "critical_batch": found.factor * plan.batch,
        "too_large": found.next_factor and found.next_factor * plan.batch,
        "branches": [
            {
                **dataclasses.asdict(branch),
                "diverged": branch.diverged,
                "loss": None if branch.diverged else branch.loss,
                "worse": worse,
                "error": error,
            }
            for branch, (worse, error) in zip(branches, _against_the_best(branches), strict=True)
        ],
    }


def _against_the_best(branches: Sequence[Branch]) -> list[tuple[float | None, float | None]]:
    """The difference to the best smaller branch, and its standard error; None of one that diverged."""
    best = [min(branches[: max(i, 1)], key=lambda branch: branch.loss) for i in range(len(branches))]
    return [
        (None, None) if branch.diverged else difference(branch, other)
        for branch, other in zip(branches, best, strict=True)
    ]


def _text(plan: Plan, branches: Sequence[Branch], found: Verdict, place: Path) -> str:
    lines = [
        f"run {plan.parent.id} after {plan.tokens:,} tokens, batch {plan.batch}: {plan.more:,} tokens with "
        f"k × the batch and {_RATES[rule(plan.config)]}",
        "",
        "   k   batch  steps     loss  above the best smaller one",
    ]
    for branch, (worse, error) in zip(branches, _against_the_best(branches), strict=True):
        compared = "" if worse is None or error is None else f"{worse:+.4f} ± {2 * error:.4f}"
        loss = "diverged" if branch.diverged else f"{branch.loss:8.4f}"
        mark = "  ← too large" if branch.factor == found.next_factor else ""
        lines.append(
            f"{branch.factor:4d} {branch.batch:7d} {branch.steps:6d} {loss}  "
            f"{compared if branch.factor > 1 else ''}{mark}"
        )
    size = found.factor * plan.batch
    if found.next_factor is None:
        lines += ["", f"critical batch: at least {size} sequences; larger factors would tell (--factors)"]
    else:
        lines += ["", f"critical batch: {size} sequences, below {found.next_factor * plan.batch}"]
    lines += [
        f"for a run that doubles as this allows: batch=critical 'batch.measured_tokens=[{plan.tokens}]' "
        f"'batch.measured_sizes=[{size}]' lr.batch_scaling={rule(plan.config)}",
        f"figure and numbers: {os.path.relpath(place)}",
    ]
    return "\n".join(lines)


def _draw(plan: Plan, branches: Sequence[Branch], found: Verdict, path: Path) -> None:
    """How much worse each batch ends than the checkpoint's own, with twice the standard error, and where the
    critical batch lies."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    ended_well = [branch for branch in branches if not branch.diverged]
    sizes = [branch.batch for branch in ended_well]
    worse = [difference(branch, branches[0]) for branch in ended_well]
    means, bars = [mean for mean, _ in worse], [2 * error for _, error in worse]
    axes.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.errorbar(sizes, means, bars, marker="o", capsize=3, color="#1f4e79")
    last = found.factor * plan.batch
    if found.next_factor:
        axes.axvspan(last, found.next_factor * plan.batch, color="#e8a33d", alpha=0.3, label="critical batch")
        axes.legend(frameon=False)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("batch (sequences)")
    axes.set_ylabel(f"loss above that of batch {plan.batch} (nats)")
    axes.set_title(
        f"run {plan.parent.id} after {plan.tokens:,} tokens, branches of {plan.more:,}", fontsize=10
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.critical",
        description="Measures the critical batch at a checkpoint by branches with larger batches.",
    )
    parser.add_argument("run", metavar="RUN", help="id of a run with a checkpoint, or its directory")
    parser.add_argument(
        "--factors", type=_factors, default=(1, 2, 4, 8), metavar="1,2,4,8", help="k: times the batch"
    )
    parser.add_argument("--at", type=_tokens, metavar="TOKENS", help="which checkpoint; default: the newest")
    parser.add_argument(
        "--tokens",
        type=_tokens,
        help=f"of each branch; default: 5 %% of the budget, {FEWEST_STEPS} steps at least",
    )
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help=f"nats that do not count; default {TOLERANCE}"
    )
    parser.add_argument("--launcher", default="local", help="local, slurm or preview")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    return parser


def _tokens(text: str) -> int:
    try:
        return parse_tokens(int(text) if text.isdigit() else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _factors(text: str) -> tuple[int, ...]:
    factors = tuple(sorted({int(part) for part in text.split(",") if part.isdigit()}))
    if len(factors) < 2 or factors[0] != 1 or len(factors) != len(text.split(",")):
        raise argparse.ArgumentTypeError("at least two different whole numbers, the first 1, such as 1,2,4,8")
    return factors


if __name__ == "__main__":
    sys.exit(main())
