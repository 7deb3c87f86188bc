"""What a projection rests on, how far it can be trusted and what it assumes, in words."""

from __future__ import annotations

from analysis import numbers as text
from analysis.projection import RUNS_NETWORK, WORTH, Fit, Projection
from analysis.synchronisation import Network

# `python -m benchmarks.projection`, for sweeps that cannot check themselves.
BENCHMARK = "benchmarks/results/projection-cpu.json"
BENCHMARK_ERROR = 0.31  # the worst of two repetitions; the longer one: 0.06


def notes(projection: Projection) -> list[str]:
    """In the order in which a reader asks."""
    found = []
    if projection.outlooks:
        found.append(
            f"Training time and GPU-hours, means over the finished runs; how many times as fast as the "
            f"baseline on as many GPUs. Worth it up to: the number of "
            f"GPUs beyond which another doubling saves less than {WORTH:.0%} of the time."
        )
    for fit in projection.fits:
        found += [_basis(fit), *_mixed(fit), _synchronised(fit, projection), _checked(fit)]
    if projection.fits:
        found += _assumptions(projection)
    missing: dict[str, list[str]] = {}
    for label, reason in projection.missing.items():
        missing.setdefault(reason, []).append(label)
    return found + [f"No projection of {', '.join(labels)}: {why}." for why, labels in missing.items()]


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _basis(fit: Fit) -> str:
    config = fit.example.config
    ranks = f"{text.listed(fit.ranks)} data-parallel rank{'' if fit.ranks == [1] else 's'}"
    tensor = f" of {config.parallel.tensor} GPUs each" if config.parallel.tensor > 1 else ""
    return (
        f"Measured in {fit.steps:,} steps on {ranks}{tensor}, each on {fit.example.hardware}: "
        f"{_seconds(fit.cost.micro_s)} for a micro-batch of {config.data.micro_batch} sequences, "
        f"{_seconds(fit.cost.step_s)} for the rest of a step, without synchronisation. Steps at their median "
        f"account for {fit.typical:.0%} of the time of these steps; what disturbs a step now and then is not "
        f"projected."
    )


def _mixed(fit: Fit) -> list[str]:
    if not fit.perhaps_unlike:
        return []
    return [
        f"What hardware these runs had is not known here, nor whether all had the same (hosts: "
        f"{text.listed(fit.perhaps_unlike)}): their times are taken together as if they had."
    ]


def _synchronised(fit: Fit, projection: Projection) -> str:
    measured, assumed = fit.cost.sync_scale, _shape(RUNS_NETWORK)
    asked = f"Synchronisation: {_shape(projection.network)}" + (", as asked for" if projection.given else "")
    if measured is None:
        of_runs = (
            "" if fit.ranks == [1] else f" The runs are taken to have had {assumed}, which is taken off."
        )
        return f"{asked}; the sweep ran at one width, so that nothing here measured it.{of_runs}"
    if projection.given:
        return f"{asked}; that of the runs took {measured:.3g} times as long as on a network of {assumed}."
    return (
        f"Synchronisation takes {measured:.3g} times as long as on a network of {assumed}, as measured; "
        f"between more hosts it may be slower."
    )


def _shape(network: Network) -> str:
    return f"{network.bandwidth_gb_per_s:g} GB/s and {network.latency_us:g} µs per message for each rank"


def _checked(fit: Fit) -> str:
    if not fit.checks:
        return (
            f"Not checked in this sweep, which lacks the widths for it. Elsewhere, on 1, 2 and 4 processes "
            f"of a CPU, each predicted from the others, the same model of a step was off by at most "
            f"{BENCHMARK_ERROR:.0%} ({BENCHMARK})."
        )
    found = [
        f"on {check.ranks} from {text.listed(check.from_ranks)} by {text.signed(100 * check.error, 0)}%"
        for check in fit.checks
    ]
    return (
        f"Checked in this sweep: the time of its steps, predicted from other numbers of ranks, is off "
        f"{text.listed(found)}."
    )


def _assumptions(projection: Projection) -> list[str]:
    found = [
        "Assumed: batches as logged, the same micro-batch, nothing of the synchronisation hidden behind "
        "computation, equally fast ranks and enough memory; starting up, evaluation and checkpoints are left "
        "out. A run begun at that width would round its batches up to a micro-batch on each rank."
    ]
    if any(fit.example.threads for fit in projection.fits):
        found.append(
            "Measured on a CPU: a GPU stands for a process with cores of its own, such as those measured."
        )
    if projection.by_rank:
        found.append(
            f"The batches of {text.listed(projection.by_rank)} follow from differences between the "
            f"ranks of the run: on another number of ranks they would be others."
        )
    return found
