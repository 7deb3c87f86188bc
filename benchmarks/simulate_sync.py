"""How fast ranks go under each way to agree, on networks and numbers of ranks that are not at hand.

    python -m benchmarks.simulate_sync [--settings resnet50 …] [--ranks N …] [--json]
    python -m benchmarks.simulate_sync --settings own --compute-ms 100 --delay-ms 50 --ranks 64
    python -m benchmarks.simulate_sync --validate [--rounds 3] [--json]

The model is benchmarks.sync_model: recurrences on the times at which ranks end their steps. Speeds are steps
of all ranks in a second, each rank at its own pace. `ideal` is the speed of ranks that neither exchange
anything nor are delayed.

`--validate` measures the methods themselves, on 4 and 8 processes that sleep instead of computing, and
predicts their times under delays. What a rank does by itself in each step is taken from a run without delays
of the same method, and so is the cost of an exchange: the one with which the model gets that run's time. That
of WAGMA-SGD's synchronisations is the cost of averaging in every step; that of D-PSGD and AD-PSGD, whose
messages travel while ranks compute, is what every step takes longer. Without the trainer nobody bounds how
far ranks run ahead of each other, nor do the predictions. Delayed runs contribute nothing. Of several rounds
the run of median time counts.

Settings are those of WAGMA-SGD's paper (Li et al. 2021, arXiv 2005.00124), beside what it reports.
Nothing is fitted to its ratios. What is assumed:

- Network: Cray Aries, 10 GB/s into and out of a node and 1.3 µs, about what Cray's white paper on the XC
  network (WP-Aries01-1112) measures. Collectives by recursive halving and doubling, without overlap with the
  computation (analysis.synchronisation), models in float32. One GPU in a node; copies between GPU and host
  are left out.
- ResNet-50: 25,559,081 parameters, τ = 10, S = √P, 2 random ranks of each step late by 320 ms (section V-B).
  Undelayed steps take 128 images / (53,000 / 256 images/s) = 618 ms: the ideal bar of figure 4 at 256 nodes.
- D-PSGD and SGP in the paper's code (github.com/Shigangli/WAGMA-SGD, optimizer_dpsgd_imagenet.py and
  optimizer_sgp_imagenet.py) wait for their neighbours at each of ResNet-50's 161 tensors, one after another,
  so that a delay travels 161 hops in a step. D-PSGD does so after the gradient, not while it is computed as
  here (pipeline.sync.dpsgd). Both have rows of their own besides the methods of this pipeline. In the other
  settings, for which that code was not read, D-PSGD's row is for models in one piece.
- Transformer: 61,362,176 parameters, τ = 8, S = √P. Steps take 8,192 tokens / (9·10⁵ / 64 tokens/s) = 583 ms
  on average: the largest local batch, the ideal bar of figure 7 at 64 nodes. How they vary with the length
  of sentences is not known in numbers. Taken is what eager-SGD's paper (Li et al. 2020, arXiv 1908.04207,
  section 2) has for a Transformer on WMT, as remembered, not read again: from 179 to 3,482 ms, 475 ms on
  average, a standard deviation of 144 ms; scaled to the mean, log-normal between the ends.
- DDPPO: 8,476,421 parameters, τ = 8, S = √P. Iterations take 1.7 to 43.5 s, the median is below 2 s. The
  ideal bar of figure 10 at 1,024 nodes, 256 experience steps / (10⁵ / 1,024 steps/s), makes the mean 2.62 s.
  A log-normal excess over 1.7 s with the median at 2 s and this mean, cut at 43.5 s, has one time in 2,000
  beyond the cut. Times are independent of each other. DD-PPO itself lets a rank stop when 60 % of the ranks
  are done (Wijmans et al. 2020, arXiv 1911.00357), which would cut the tail; whether it did so in the paper's
  runs is not known. Here it does not.
- DDPPO, cut: local SGD's bar at 1,024 nodes, 2.1·10⁴ steps/s, makes its step 12.5 s, which should be the
  longest of 1,024 times. The distribution above gives 36 s. This setting cuts times at 12.5 s instead of
  43.5 s. It so uses one bar of the paper, and can be held against the others only.
- Local SGD has period 1 unless a period is given, as in the paper. Delayed averaging and local SGD with a
  period have WAGMA-SGD's, and so have the synchronisations of eager-SGD and gradient coding; delayed averages
  are met one step later; adaptive periods have a mean of 4; DEF sends a 64th of the weights, the pipeline's
  default; gradient coding has two copies of every shard. What methods compute besides the gradient takes no
  time, unless --overhead-ms says so. The paper's ratio to eager-SGD stands beside the majority kind; which of
  the two it ran is not known.

Ratios marked ~ are read off the paper's bars, to some 5 %; the others are in its text.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis.synchronisation import Network
from benchmarks.printing import beside_json, print_json
from benchmarks.sync_model import (
    PAPERS_CODE,
    Costs,
    Options,
    Run,
    Seconds,
    Work,
    alone,
    averaging,
    background,
    butterfly,
    exponential,
    gradient_coding,
    methods,
    ring,
    sent_before,
    with_neighbours,
    world,
)
from pipeline.config import ConfigError, ImbalanceConfig
from pipeline.imbalance import Imbalance
from pipeline.sync.wagma import is_power_of_two, nearest_power_of_two

ARIES = Network(bandwidth_gb_per_s=10.0, latency_us=1.3)
KEPT = 1 / 64  # of the weights: sync.block_share
STEPS = 1000

# --- what ranks do by themselves


@dataclass(frozen=True)
class Times:
    """Computing times as quantiles: a share `below` of them is at most so many `seconds`."""

    below: Sequence[float]
    seconds: Sequence[float]

    def drawn(self, shape: tuple[int, int], random: np.random.Generator) -> Seconds:
        return np.interp(random.random(shape), self.below, self.seconds)


def constant(seconds: float) -> Times:
    return Times((0.0, 1.0), (seconds, seconds))


def measured(seconds: Sequence[float]) -> Times:
    """Of a trace, sorted."""
    return Times(np.linspace(0, 1, len(seconds)).tolist(), seconds)


def lognormal(least_s: float, most_s: float, shift_s: float, median_s: float, sigma: float) -> Times:
    """shift + a log-normal excess, kept between two limits."""
    normal = statistics.NormalDist()
    deviations = np.linspace(-6, 6, 4001)
    seconds = np.clip(shift_s + (median_s - shift_s) * np.exp(sigma * deviations), least_s, most_s)
    below = [0.0, *(normal.cdf(z) for z in deviations), 1.0]
    return Times(below, [float(seconds[0]), *seconds.tolist(), float(seconds[-1])])


def heavy_tailed(least_s: float, median_s: float, mean_s: float, most_s: float) -> Times:
    """A log-normal excess over the least time, from median and mean: mean/median = exp(σ²/2)."""
    sigma = math.sqrt(2 * math.log((mean_s - least_s) / (median_s - least_s)))
    return lognormal(least_s, most_s, least_s, median_s, sigma)


def spread(mean_s: float, deviation: float, least: float, most: float) -> Times:
    """Log-normal, by its standard deviation and its limits as shares of the mean: σ² = ln(1 + deviation²)."""
    variance = math.log1p(deviation**2)
    median_s = mean_s * math.exp(-variance / 2)
    return lognormal(least * mean_s, most * mean_s, 0.0, median_s, math.sqrt(variance))


def no_delay() -> ImbalanceConfig:
    return ImbalanceConfig(
        kind="none", ranks=1, delay_ms=0.0, sigma=1.0, min_share=1.0, compute_ms=0.0, seed=0
    )


def work(times: Times, delays: ImbalanceConfig, ranks: int, steps: int, seed: int = 0) -> Work:
    """The delays are those that a real run with this imbalance would have."""
    imbalance = Imbalance(delays, 0, ranks)
    return Work(
        times.drawn((steps, ranks), np.random.default_rng([seed, ranks])),
        np.array([imbalance.delays_s(step) for step in range(1, steps + 1)]),
    )


# --- settings


@dataclass(frozen=True)
class Setting:
    parameters: int
    period: int
    times: Times
    delays: ImbalanceConfig
    ranks: tuple[int, ...]
    group_size: int | None = None  # else √P
    tensors: int = 1  # in which neighbours exchange it in the paper's code
    # Reported, by the number of ranks: WAGMA-SGD's speed over that of others, and shares of the ideal.
    ratios: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    read_off: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # the same, from bars
    shares: Mapping[int, Mapping[str, float]] = field(default_factory=dict)


def over(wagma: float, others: Mapping[str, float]) -> dict[str, float]:
    return {name: wagma / other for name, other in others.items()}


LOCAL = "local_sgd, period 1"
SGP_2, SGP_1, SGP_4 = "sgp, 2 neighbours", "sgp, 1 neighbour", "sgp, 4 neighbours"
MAJORITY = "eager_sgd, majority"
# Thousands of images, tokens and experience steps in a second.
RESNET_BARS = {"allreduce": 32.5, LOCAL: 32.5, "dpsgd": 36, "adpsgd": 52.5, SGP_2: 36.5, MAJORITY: 32.5}
TRANSFORMER_BARS = {"allreduce": 150, LOCAL: 320, "dpsgd": 410, "adpsgd": 590, SGP_1: 450}
DDPPO_BARS = {LOCAL: 21, "dpsgd": 26, "adpsgd": 82, SGP_4: 23}

DDPPO_LEAST_S, DDPPO_MEDIAN_S, DDPPO_MEAN_S = 1.7, 2.0, 256 * 1024 / 1e5

SETTINGS = {
    "resnet50": Setting(
        parameters=25_559_081,
        period=10,
        times=constant(128 * 256 / 53_000),
        delays=replace(no_delay(), kind="delay", ranks=2, delay_ms=320.0),
        ranks=(4, 16, 64, 256),
        tensors=161,
        ratios={64: {"allreduce": 1.26, LOCAL: 1.25, "dpsgd": 1.23, SGP_2: 1.25, MAJORITY: 1.13}},
        read_off={256: over(44.5, RESNET_BARS)},
        shares={256: {name: bar / 53 for name, bar in {**RESNET_BARS, "wagma": 44.5}.items()}},
    ),
    "transformer": Setting(
        parameters=61_362_176,
        period=8,
        times=spread(8192 * 64 / 9e5, 144 / 475, 179 / 475, 3482 / 475),
        delays=no_delay(),
        ranks=(4, 16, 64),
        read_off={64: over(525, TRANSFORMER_BARS)},
        shares={64: {name: bar / 900 for name, bar in {**TRANSFORMER_BARS, "wagma": 525}.items()}},
    ),
    "ddppo": Setting(
        parameters=8_476_421,
        period=8,
        times=heavy_tailed(DDPPO_LEAST_S, DDPPO_MEDIAN_S, DDPPO_MEAN_S, most_s=43.5),
        delays=no_delay(),
        ranks=(16, 64, 256, 1024),
        ratios={1024: {LOCAL: 2.33, "dpsgd": 1.88, SGP_4: 2.10}},
        read_off={1024: over(49, {"adpsgd": 82})},
        shares={1024: {name: bar / 100 for name, bar in {**DDPPO_BARS, "wagma": 49}.items()}},
    ),
}
SETTINGS["ddppo_cut"] = replace(
    SETTINGS["ddppo"],
    times=heavy_tailed(DDPPO_LEAST_S, DDPPO_MEDIAN_S, DDPPO_MEAN_S, most_s=256 * 1024 / 2.1e4),
    ranks=(1024,),
)


def simulate(
    setting: Setting,
    ranks: int,
    steps: int,
    network: Network = ARIES,
    grace_s: float = 0.0,
    overheads_s: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """A row for each method."""
    size = setting.group_size or 1 << max(1, ranks.bit_length() // 2)  # as in pipeline.sync.wagma
    if not is_power_of_two(ranks) or not is_power_of_two(size) or not 2 <= size <= ranks:
        near = max(2, nearest_power_of_two(ranks))
        raise ConfigError(
            f"{ranks} ranks in groups of {size}: both must be powers of two, 2 <= group <= ranks. Nearest: "
            f"--ranks {near} --group-size {min(near, max(2, nearest_power_of_two(size)))}"
        )
    if setting.delays.kind == "delay" and setting.delays.ranks > ranks:
        raise ConfigError(f"{setting.delays.ranks} late ranks of {ranks}. Nearest: --late-ranks {ranks}")
    given = work(setting.times, setting.delays, ranks, steps)
    costs = Costs.on(network, ranks, size, setting.parameters, KEPT)
    ideal = ranks / given.compute_s.mean()
    runs: dict[str, Run] = {}
    options = Options(setting.period, size, grace_s=grace_s, tensors=setting.tensors)
    for name, method in methods(ranks, options).items():
        overhead_s = (overheads_s or {}).get(name.split(",")[0], 0.0)
        runs[name] = method(given, replace(costs, overhead_s=overhead_s))
    rows = []
    for name, run in runs.items():
        ratio = runs["wagma"].steps_per_s / run.steps_per_s
        known = name.removesuffix(PAPERS_CODE)
        text, bar = (reported.get(ranks, {}).get(known) for reported in (setting.ratios, setting.read_off))
        paper = text or bar
        rows.append(
            {
                "method": name,
                "ranks": ranks,
                "step_s": ranks / run.steps_per_s,
                "of_ideal": run.steps_per_s / ideal,
                "paper_of_ideal": setting.shares.get(ranks, {}).get(known),
                "wagma_over_it": ratio,
                "paper_wagma_over_it": paper,
                "read_off": text is None and bar is not None,
                "deviation": ratio / paper - 1 if paper else None,
                "fresh": run.fresh,
            }
        )
    return rows


# --- validation: the methods themselves, on processes that sleep

VALIDATED_RANKS = (4, 8)
STEP_S, RUN_STEPS, PERIOD, COPIES = 0.025, 100, 10, 2
SIZES = {4: 2, 8: 4}  # of WAGMA-SGD's groups
UNDELAYED = "none"
DELAYS = {
    UNDELAYED: no_delay(),
    "2 ranks by 50 ms": replace(no_delay(), kind="delay", ranks=2, delay_ms=50.0, seed=7),
    "log-normal, median 10 ms": replace(no_delay(), kind="lognormal", delay_ms=10.0, seed=7),
}
Exchange = float  # seconds


@dataclass(frozen=True)
class Validated:
    overrides: tuple[str, ...]
    # From what ranks do by themselves, the cost of an exchange, and that of averaging all models.
    predict: Callable[[Seconds, Exchange, Exchange], Run]
    groups: bool = False


def predict_wagma(own_s: Seconds, exchange_s: Exchange, synchronisation_s: Exchange) -> Run:
    ranks = own_s.shape[1]
    costs = Costs(synchronisation_s, exchange_s, 0.0, 0.0, 0.0)
    return background(own_s, butterfly(ranks, SIZES[ranks]), at_period, costs)


def predict_eager(own_s: Seconds, exchange_s: Exchange, _: Exchange) -> Run:
    return background(own_s, world(own_s.shape[1]), at_period, Costs(exchange_s, 0.0, 0.0, 0.0, 0.0))


def at_period(step: int) -> bool:
    return step % PERIOD == 0


AVERAGING, WAGMA = "local_sgd, period 1", f"wagma, period {PERIOD}"
VALIDATED = {
    AVERAGING: Validated(
        ("sync=local_sgd", "sync.period=1"), lambda own_s, exchange_s, _: averaging(own_s, 1, exchange_s)
    ),
    f"local_sgd, period {PERIOD}": Validated(
        ("sync=local_sgd", f"sync.period={PERIOD}"),
        lambda own_s, exchange_s, _: averaging(own_s, PERIOD, exchange_s),
    ),
    WAGMA: Validated(("sync=wagma", f"sync.period={PERIOD}"), predict_wagma, groups=True),
    "dpsgd": Validated(
        ("sync=dpsgd",),
        lambda own_s, exchange_s, _: sent_before(own_s + exchange_s, ring(own_s.shape[1]), 0.0),
    ),
    "sgp, 1 neighbour": Validated(
        ("sync=sgp", "sync.neighbours=1"),
        lambda own_s, exchange_s, _: with_neighbours(own_s, exponential(own_s.shape[1], 1), exchange_s),
    ),
    "adpsgd": Validated(("sync=adpsgd",), lambda own_s, exchange_s, _: alone(own_s + exchange_s)),
    f"eager_sgd, solo, period {PERIOD}": Validated(
        ("sync=eager_sgd", "sync.quorum=solo", f"sync.period={PERIOD}"), predict_eager
    ),
    f"gradient_coding, period {PERIOD}": Validated(
        ("sync=gradient_coding", f"sync.redundancy={COPIES}", f"sync.period={PERIOD}"),
        lambda own_s, exchange_s, _: gradient_coding(own_s, COPIES, PERIOD, exchange_s),
    ),
}


@dataclass(frozen=True)
class Measured:
    own_s: Seconds  # [steps, ranks], without what the method waited; where a step was left out the median
    total_s: float
    fresh: float | None  # of exchanges that wait for nobody


def run_for_real(method: Validated, ranks: int, delay_s: Seconds) -> Measured:
    from tests.sync.trial import trial  # PyTorch, which the simulations do without

    more = [f"sync.group_size={SIZES[ranks]}"] if method.groups else []
    steps = range(1, len(delay_s) + 1)
    delays = {(rank, step): float(delay_s[step - 1, rank]) for rank in range(ranks) for step in steps}
    logs = trial(ranks, *method.overrides, *more, steps=len(steps), delays=delays, step_s=STEP_S)
    ended = np.array([log.ended_s for log in logs]).T
    waited = np.array([log.waited_s for log in logs]).T
    left_out = np.array([[row.get("skipped", 0.0) > 0 for row in log.observed] for log in logs]).T
    seen = [log.observed[step - 1] for log in logs for step in steps if not at_period(step)]
    fresh = [row["fresh"] for row in seen if "fresh" in row]
    own_s = np.diff(ended, axis=0, prepend=0) - waited
    return Measured(
        np.where(left_out, np.median(own_s[~left_out]), own_s),
        float(ended.max()),
        float(np.mean(fresh)) if fresh else None,
    )


def fitted(method: Validated, run: Measured, synchronisation_s: Exchange) -> Exchange:
    """The cost with which the model gets the time of a run; 0 if that was shorter than any."""
    low, high = 0.0, run.total_s
    for _ in range(50):
        middle = (low + high) / 2
        if method.predict(run.own_s, middle, synchronisation_s).ended_s.max() < run.total_s:
            low = middle
        else:
            high = middle
    return (low + high) / 2


# By number of ranks, method and delays: a run of every round.
Measurements = dict[tuple[int, str, str], list[Measured]]


def delays_of(name: str, ranks: int, steps: int) -> Seconds:
    return work(constant(0.0), DELAYS[name], ranks, steps).delay_s


def measure(rounds: int, steps: int = RUN_STEPS) -> Measurements:
    runs: Measurements = {}
    for number in range(rounds):
        for ranks in VALIDATED_RANKS:
            for name, method in VALIDATED.items():
                for delays in DELAYS:
                    run = run_for_real(method, ranks, delays_of(delays, ranks, steps))
                    runs.setdefault((ranks, name, delays), []).append(run)
        print(f"round {number + 1} of {rounds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    return runs


def middle(runs: Sequence[Measured]) -> Measured:
    """The one of median time: other work on the machine hits one round, not all."""
    return sorted(runs, key=lambda run: run.total_s)[(len(runs) - 1) // 2]


def compare(runs: Measurements) -> list[dict[str, Any]]:
    """Predicted from the undelayed runs alone, beside the delayed ones."""
    rows = []
    averaging_s: dict[int, Exchange] = {}
    for ranks, name, undelayed in [key for key in runs if key[2] == UNDELAYED]:
        method, base = VALIDATED[name], middle(runs[ranks, name, undelayed])
        exchange_s = fitted(method, base, averaging_s.get(ranks, 0.0))
        averaging_s.setdefault(ranks, exchange_s)  # of the first method, which is AVERAGING
        for delays in (delays for delays in DELAYS if delays != UNDELAYED):
            own_s = base.own_s + delays_of(delays, ranks, len(base.own_s))
            found = method.predict(own_s, exchange_s, averaging_s[ranks])
            predicted_s, run = float(found.ended_s.max()), middle(runs[ranks, name, delays])
            rows.append(
                {
                    "ranks": ranks,
                    "method": name,
                    "delays": delays,
                    "steps": len(own_s),
                    "exchange_s": exchange_s,
                    "undelayed_s": [run.total_s for run in runs[ranks, name, undelayed]],
                    "measured_s": [run.total_s for run in runs[ranks, name, delays]],
                    "median_s": run.total_s,
                    "predicted_s": predicted_s,
                    "error": predicted_s / run.total_s - 1,
                    "predicted_fresh": found.fresh,
                    "measured_fresh": run.fresh,
                }
            )
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Errors of times, and of the ratios of WAGMA-SGD's speed to the others'."""
    ratios = []
    for wagma in (row for row in rows if row["method"] == WAGMA):
        same = [row for row in rows if all(row[key] == wagma[key] for key in ("ranks", "delays"))]
        for row in (row for row in same if row is not wagma):
            predicted = row["predicted_s"] / wagma["predicted_s"]
            measured = row["median_s"] / wagma["median_s"]
            ratios.append(
                {key: row[key] for key in ("ranks", "delays", "method")}
                | {"predicted": predicted, "measured": measured, "error": predicted / measured - 1}
            )
    found: dict[str, Any] = {"wagma_over": ratios}
    for what, of in (("times", rows), ("ratios", ratios)):
        errors = [abs(row["error"]) for row in of]
        found[what] = {"median_error": statistics.median(errors), "largest_error": max(errors)}
    return found


# --- what is printed


def of_validation(row: Mapping[str, Any]) -> str:
    fresh = ""
    if row["measured_fresh"] is not None:
        fresh = f"  fresh {row['predicted_fresh']:.0%}, measured {row['measured_fresh']:.0%}"
    return (
        f"{row['ranks']} ranks  {row['method']:26}  {row['delays']:24}  "
        f"exchange {row['exchange_s'] * 1000:6.2f} ms  predicted {row['predicted_s']:6.2f} s  "
        f"measured {row['median_s']:6.2f} s  {row['error']:+.1%}{fresh}"
    )


def of_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    width = max(len(row["method"]) for row in rows)
    ranks = f"{rows[0]['ranks']} ranks"
    lines = [f"{ranks:{width}}   step ms  of ideal  (paper)   fresh   wagma is  (paper)  deviation"]
    for row in rows:
        share = "" if row["paper_of_ideal"] is None else f"~{row['paper_of_ideal']:.0%}"
        fresh = "" if row["fresh"] is None else f"{row['fresh']:.0%}"
        paper = row["paper_wagma_over_it"]
        beside = "" if paper is None else f"{'~' if row['read_off'] else ''}{paper:.2f}×"
        deviation = "" if paper is None else f"{row['deviation']:+.0%}"
        lines.append(
            f"{row['method']:{width}} {row['step_s'] * 1000:9.1f}  {row['of_ideal']:8.0%}  "
            f"{share:>7}  {fresh:>6}  {row['wagma_over_it']:8.2f}×  {beside:>7}  {deviation:>9}".rstrip()
        )
    return "\n".join(lines)


def of_summary(found: Mapping[str, Any]) -> str:
    lines = [
        f"{r['ranks']} ranks  {r['delays']:24}  wagma over {r['method']:26}  "
        f"predicted {r['predicted']:.2f}×  measured {r['measured']:.2f}×  {r['error']:+.1%}"
        for r in found["wagma_over"]
    ]
    for what in ("times", "ratios"):
        errors = found[what]
        lines.append(
            f"errors of {what}: median {errors['median_error']:.1%}, largest {errors['largest_error']:.1%}"
        )
    return "\n".join(lines)


def own_setting(arguments: argparse.Namespace) -> Setting:
    times = arguments.trace or constant(arguments.compute_ms / 1000)
    delays = no_delay()
    if arguments.sigma is not None:
        delays = replace(delays, kind="lognormal", delay_ms=arguments.delay_ms, sigma=arguments.sigma)
    elif arguments.delay_ms:
        delays = replace(delays, kind="delay", delay_ms=arguments.delay_ms, ranks=arguments.late_ranks)
    return Setting(
        arguments.parameters, arguments.period, times, delays, (4, 16, 64, 256), arguments.group_size
    )


def trace(path: str) -> Times:
    try:
        seconds = sorted(float(word) for word in Path(path).read_text().split())
    except (OSError, ValueError) as problem:
        raise argparse.ArgumentTypeError(str(problem)) from problem
    if not seconds or seconds[0] < 0:
        raise argparse.ArgumentTypeError(f"{path}: at least one time, and none below 0, are needed")
    return measured(seconds)


def overhead(text: str) -> tuple[str, float]:
    method, _, ms = text.partition("=")
    known = sorted({name.split(",")[0] for name in methods(2, Options(1, 2))})
    if method not in known:
        raise argparse.ArgumentTypeError(f"{method}: no such method; there are {', '.join(known)}")
    return method, amount(ms) / 1000


def amount(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0, and finite")
    return number


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=[*SETTINGS, "own"],
        default=list(SETTINGS),
        help="the paper's, or one of the arguments below (own)",
    )
    parser.add_argument("--ranks", type=count, nargs="+", help="powers of two; default: those of the setting")
    parser.add_argument("--steps", type=count, default=STEPS, help=f"simulated (default {STEPS})")
    parser.add_argument("--gb-per-s", type=amount, default=ARIES.bandwidth_gb_per_s)
    parser.add_argument("--latency-us", type=amount, default=ARIES.latency_us)
    parser.add_argument("--grace-ms", type=amount, default=0.0, help="of wagma")
    parser.add_argument(
        "--overhead-ms", nargs="+", type=overhead, default=[], metavar="METHOD=MS", help="of a step"
    )
    own = parser.add_argument_group("the setting own")
    own.add_argument("--compute-ms", type=amount, default=100.0, help="of every step (default 100)")
    own.add_argument("--trace", type=trace, help="file of computing times in seconds, instead")
    own.add_argument("--delay-ms", type=amount, default=0.0)
    own.add_argument("--late-ranks", type=count, default=2, help="random ones, in each step (default 2)")
    own.add_argument("--sigma", type=amount, help="every rank is late, by a log-normal share of --delay-ms")
    own.add_argument("--parameters", type=count, default=25_559_081)
    own.add_argument("--period", type=count, default=10)
    own.add_argument("--group-size", type=count)
    parser.add_argument("--validate", action="store_true", help="against real runs; takes minutes")
    parser.add_argument("--rounds", type=count, default=3, help="of the validation (default 3)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(words)
    if arguments.sigma is not None and not arguments.delay_ms:
        parser.error("--sigma: of no delay; give --delay-ms, the median, too")
    return arguments


def main() -> int:
    arguments = parse()
    validation, figures = {}, {}
    if arguments.validate:
        rows = compare(measure(arguments.rounds))
        validation = {"rounds": arguments.rounds, "runs": rows, **summary(rows)}
        with beside_json(arguments.json):
            print("\n".join(map(of_validation, rows)))
            print(of_summary(validation), end="\n\n")
    network = Network(arguments.gb_per_s, arguments.latency_us)
    for name in arguments.settings:
        setting = own_setting(arguments) if name == "own" else SETTINGS[name]
        tables = [
            simulate(
                setting,
                ranks,
                arguments.steps,
                network,
                arguments.grace_ms / 1000,
                dict(arguments.overhead_ms),
            )
            for ranks in arguments.ranks or setting.ranks
        ]
        figures[name] = [row for table in tables for row in table]
        with beside_json(arguments.json):
            for table in tables:
                print(f"{name}, {of_rows(table)}", end="\n\n")
    if arguments.json:
        validated = {"validation": validation} if validation else {}
        print_json(figures, network=asdict(network), **validated)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as problem:
        sys.exit(str(problem))
