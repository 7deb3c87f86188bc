"""Whether anything became slower: every benchmark, against what benchmarks/baseline.json holds.

    python -m benchmarks.guard [--only NAME …] [--update] [--json]

Runs each benchmark with few rounds, shows its table, and compares ratios alone, never absolute times: ours
over a hand-written loop, a test over a plain step, a command over the import it cannot do without. Ratios
hold on another machine as far as what they relate depends on the machine in the same way.

A ratio may be worse than the baseline by its tolerance: the distance between the quartiles of the rounds when
the baseline was measured, at least 5 %. The median of n rounds has a standard error of 0.93/√n such distances
if the noise is normal; so of 4 rounds, the tolerance is two of them. What is worse is measured a second time,
and the better of both counts: of a hundred ratios that did not change, few are worse twice. Figures that come
from single timings have no quartiles, and a tolerance of 25 %.

`--update` takes what was measured into the baseline, with date, hardware and versions, and leaves alone what
was not. For that nothing else should run on the machine.

Exit code 1 when a ratio is worse or a benchmark fails. That a benchmark missed targets of its own, which are
for more rounds, is said.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.printing import beside_json, here, print_json

ROOT = Path(__file__).resolve().parents[1]
BASELINE = ROOT / "benchmarks" / "baseline.json"
LEAST_TOLERANCE, SINGLE_TOLERANCE = 0.05, 0.25
LIMIT_S = 1800.0  # of a benchmark

Better = Literal["lower", "higher", "same"]


@dataclass(frozen=True)
class Ratio:
    value: float
    better: Better = "lower"
    spread: float | None = None  # between the quartiles of its rounds, over the value; None: not known

    @property
    def tolerance(self) -> float:
        return SINGLE_TOLERANCE if self.spread is None else max(LEAST_TOLERANCE, self.spread)

    def worse_than(self, baseline: float) -> float:
        """By which share; below 0 it is better."""
        higher, lower = self.value / baseline - 1, baseline / self.value - 1
        return {"lower": higher, "higher": lower, "same": max(higher, lower)}[self.better]


Ratios = dict[str, Ratio]


# --- the ratios of each benchmark, from the figures in its JSON


def of_cli(answers: Sequence[Mapping[str, Any]]) -> Ratios:
    """Each answer over the import that it cannot do without: of torch up to a step, else of hydra."""
    floors = {
        module: answer
        for answer in answers
        for module in ("hydra", "torch")
        if f"'import {module}'" in answer["question"]
    }
    ratios = {}
    for answer in answers:
        floor = floors.get("torch" if "step" in answer["question"] else "hydra")
        if floor and answer not in floors.values():
            noise = [each["worst_s"] / each["median_s"] - 1 for each in (answer, floor)]
            ratios[answer["question"]] = Ratio(answer["median_s"] / floor["median_s"], spread=sum(noise))
    return ratios


def of_step(figures: Mapping[str, Any]) -> Ratios:
    """Speeds over a hand-written loop's, and times of steps with a test over those without."""
    return {
        name: _of_quartiles(figure, "higher" if "per second" in name else "lower")
        for name, figure in figures.items()
    }


def of_peers(figures: Mapping[str, Any]) -> Ratios:
    """Ours over each peer, on one process and on two."""
    ratios = {}
    for layout, peers in figures.items():
        for name, figure in peers.items():
            if "refused" in figure:
                continue
            faster, beside = figure["faster"], f"{layout}, over {name}"
            spread = (faster["q3"] - faster["q1"]) / faster["median"]
            ratios[f"{beside}: tokens per second"] = Ratio(faster["median"], "higher", spread)
            ratios[f"{beside}: peak memory"] = Ratio(figure["memory"], spread=0.0)
            ratios[f"{beside}: time to the first step"] = Ratio(figure["start"])
    return ratios


def of_statistics(figures: Mapping[str, Any]) -> Ratios:
    """Of what is ours: times that have a target, and peaks of memory."""
    others = ("plain", "vmap", "squares")
    times = {name: _of_quartiles(f) for name, f in figures["time"].items() if f["target"]}
    memory = {
        f"{name}, peak memory": Ratio(f["ratio"], spread=0.0)
        for name, f in figures["memory"].items()
        if not any(word in name for word in others)
    }
    return times | memory


def of_tests_cost(figures: Mapping[str, Any]) -> Ratios:
    """Steps with a test of ours over plain ones: a cost alone, what is above them, may be near 0."""
    return {
        f"{problem}: {test}, {way}": _of_quartiles(
            {"ratio": 1 + cost["cost"], "q1": 1 + cost["q1"], "q3": 1 + cost["q3"]}
        )
        for problem, found in figures.items()
        for test, figure in found["tests"].items()
        for way, cost in figure["costs"].items()
        if way != "vmap"
    }


def of_analysis(figures: Sequence[Mapping[str, Any]]) -> Ratios:
    """Speeds over that of wandb's reader; seconds over those of Python's json for the same rows."""
    files = [figure for figure in figures if "speed" in figure]
    sweep = [figure for figure in figures if "speed" not in figure]
    speeds = {f["what"]: Ratio(f["speed"], "higher") for f in files if f["target"]}
    return speeds | _over_floor(sweep, "the same rows with json and python", lambda f: f["seconds"])


def of_report(figures: Sequence[Mapping[str, Any]]) -> Ratios:
    timed = [figure for figure in figures if figure["unit"] == "s"]
    return _over_floor(timed, "the figures' data by json.dumps", lambda f: f["value"])


def of_sweep(figures: Sequence[Mapping[str, Any]]) -> Ratios:
    return _over_floor(figures, "compose, Hydra alone", lambda f: f["seconds"] / f["points"])


def of_projection(figures: Mapping[str, Any]) -> Ratios:
    """Predicted over measured, or the reverse: what is above 1."""
    return {
        f"steps on {error['ranks']} processes": Ratio(1 + abs(error["error"])) for error in figures["errors"]
    }


def of_simulate_sync(figures: Mapping[str, Any]) -> Ratios:
    """Those that papers report; nothing but the model changes them."""
    reported = [
        (setting, row)
        for setting, rows in figures.items()
        for row in rows
        if row["paper_wagma_over_it"] is not None
    ]
    return {
        f"{setting}, {r['ranks']} ranks: wagma over {r['method']}": Ratio(r["wagma_over_it"], "same", 0.0)
        for setting, r in reported
    }


def of_gpu(figures: Mapping[str, Any]) -> Ratios:
    """Of each kind of GPU its own."""
    ratios = {}
    for name, figure in figures.items():
        if "failed" in figure:
            continue
        ratios[f"{figure['device']}, {name}: statistics"] = _of_quartiles(figure["statistics"])
        if figure["mfu"] is not None:
            ratios[f"{figure['device']}, {name}: MFU"] = Ratio(figure["mfu"], "higher", 0.0)
    return ratios


def _of_quartiles(figure: Mapping[str, float], better: Better = "lower") -> Ratio:
    return Ratio(figure["ratio"], better, (figure["q3"] - figure["q1"]) / figure["ratio"])


def _over_floor(
    figures: Iterable[Mapping[str, Any]], floor: str, seconds: Callable[[Mapping[str, Any]], float]
) -> Ratios:
    """Without the floor none."""
    taken = {figure["what"]: seconds(figure) for figure in figures}
    least = taken.pop(floor, None)
    return {what: Ratio(s / least) for what, s in taken.items()} if least else {}


# --- running them


@dataclass(frozen=True)
class Benchmark:
    ratios: Callable[[Any], Ratios]
    arguments: tuple[str, ...] = ()  # for few rounds


BENCHMARKS = {
    "cli": Benchmark(of_cli),
    "sweep": Benchmark(of_sweep),
    "peers": Benchmark(of_peers, ("--starts", "1", "--layouts", "single", "ddp")),
    "step": Benchmark(of_step, ("--rounds", "6")),
    "statistics": Benchmark(of_statistics, ("--rounds", "4", "--accumulations", "1", "4")),
    "tests_cost": Benchmark(of_tests_cost, ("--rounds", "2")),
    "analysis": Benchmark(of_analysis, ("--repeat", "1")),
    "report": Benchmark(of_report),
    "projection": Benchmark(of_projection),
    "simulate_sync": Benchmark(of_simulate_sync),
    "gpu": Benchmark(of_gpu),
}


class Failed(RuntimeError):
    """A benchmark did not end as it should."""


def run(name: str) -> tuple[Ratios, bool]:
    """Its ratios, and whether it met its own targets. Its table goes to standard error."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *BENCHMARKS[name].arguments, "--json"]
    # A session of its own, so that its processes end with it.
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            printed, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            raise Failed(f"did not end within {LIMIT_S / 60:.0f} minutes") from None
        finally:
            with_its_children(process)
    if process.returncode not in (0, 1):
        raise Failed(f"ended with {process.returncode}")
    try:
        content = json.loads(printed)
    except json.JSONDecodeError:
        raise Failed("printed no figures") from None
    return BENCHMARKS[name].ratios(figures_in(content)), process.returncode == 0


def with_its_children(process: subprocess.Popen[str]) -> None:
    """Kills what is left of its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def figures_in(content: Any) -> Any:
    return content["figures"] if isinstance(content, dict) else content


# --- comparing


@dataclass(frozen=True)
class Entry:
    """Of the baseline."""

    ratio: float
    tolerance: float
    date: str | None  # None: not known
    hardware: str | None
    python: str | None
    torch: str | None


Baseline = dict[str, dict[str, Entry]]  # by benchmark and name


@dataclass(frozen=True)
class Comparison:
    name: str
    ratio: float | None  # None: not measured any more
    baseline: float | None  # None: new
    worse: float | None  # share; below 0 it is better
    tolerance: float | None

    @property
    def verdict(self) -> Literal["", "WORSE", "better", "new", "gone"]:
        if self.baseline is None:
            return "new"
        if self.worse is None or self.tolerance is None:
            return "gone"
        if self.worse > self.tolerance:
            return "WORSE"
        return "better" if self.worse < -self.tolerance else ""


def compare(found: Ratios, baseline: Mapping[str, Entry]) -> list[Comparison]:
    compared = []
    for name, ratio in found.items():
        if entry := baseline.get(name):
            worse = ratio.worse_than(entry.ratio)
            compared.append(Comparison(name, ratio.value, entry.ratio, worse, entry.tolerance))
        else:
            compared.append(Comparison(name, ratio.value, None, None, None))
    gone = [name for name in baseline if name not in found]
    return compared + [Comparison(name, None, baseline[name].ratio, None, None) for name in gone]


def better_of(first: Ratios, second: Ratios) -> Ratios:
    """Of each ratio the better one of two measurements."""
    return first | {
        name: ratio
        for name, ratio in second.items()
        if name not in first or ratio.worse_than(first[name].value) < 0
    }


def worsened(compared: Iterable[Comparison]) -> list[Comparison]:
    return [comparison for comparison in compared if comparison.verdict == "WORSE"]


def guard(name: str, baseline: Mapping[str, Entry]) -> tuple[Ratios, list[Comparison]]:
    """Runs a benchmark, a second time if something is worse."""
    print(f"--- {name}", flush=True)
    found, met = run(name)
    if worsened(compare(found, baseline)):
        print("worse than the baseline: once more", flush=True)
        again, met_again = run(name)
        found, met = better_of(found, again), met or met_again
    compared = compare(found, baseline)
    print(table(compared))
    if not met:
        print("(it missed targets of its own, see above)")
    print(flush=True)
    return found, compared


def table(compared: Sequence[Comparison]) -> str:
    if not compared:
        return "nothing to compare"
    width = max(len("against the baseline"), *(len(comparison.name) for comparison in compared))
    lines = [f"{'against the baseline':{width}}    ratio  baseline   worse by  tolerance"]
    for c in compared:
        ratio, baseline = (_or_blank(number, ".4g") for number in (c.ratio, c.baseline))
        worse, tolerance = _or_blank(c.worse, "+.1%"), _or_blank(c.tolerance, ".1%")
        lines.append(
            f"{c.name:{width}} {ratio:>8}  {baseline:>8}   {worse:>8}   {tolerance:>8}  {c.verdict}".rstrip()
        )
    return "\n".join(lines)


def _or_blank(number: float | None, form: str) -> str:
    return "" if number is None else f"{number:{form}}"


# --- the baseline


def read(path: Path) -> Baseline:
    content = json.loads(path.read_text()) if path.exists() else {}
    return {
        benchmark: {name: Entry(**entry) for name, entry in entries.items()}
        for benchmark, entries in content.items()
    }


def updated(baseline: Baseline, measured: Mapping[str, Ratios], conditions: Mapping[str, str]) -> Baseline:
    """With what was measured; the rest stays."""
    merged = dict(baseline)
    for benchmark, ratios in measured.items():
        entries = {
            name: Entry(float(f"{ratio.value:.4g}"), round(ratio.tolerance, 4), **conditions)
            for name, ratio in ratios.items()
        }
        if entries:
            merged[benchmark] = baseline.get(benchmark, {}) | entries
    return merged


def write(baseline: Baseline, path: Path) -> None:
    """A ratio a line, so that a change of one shows as one."""
    blocks = []
    for name, entries in baseline.items():
        lines = [
            f"  {json.dumps(key, ensure_ascii=False)}: {json.dumps(asdict(entry), ensure_ascii=False)}"
            for key, entry in entries.items()
        ]
        blocks.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS), metavar="NAME"
    )
    parser.add_argument("--update", action="store_true", help="take what is measured into the baseline")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    baseline = read(BASELINE)
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        print(f"load {load:.1f} on {cores} cores: other work disturbs the figures", file=sys.stderr)
    measured: dict[str, Ratios] = {}
    compared: dict[str, list[Comparison]] = {}
    failures: dict[str, str] = {}
    with beside_json(arguments.json):
        for name in arguments.only:
            try:
                measured[name], compared[name] = guard(name, baseline.get(name, {}))
            except Failed as failure:
                failures[name] = str(failure)
        if arguments.update:
            write(updated(baseline, measured, here()), BASELINE)
        print("\n".join(conclusions(compared, failures, arguments.update)))
    if arguments.json:
        told = {
            name: [asdict(comparison) | {"verdict": comparison.verdict} for comparison in found]
            for name, found in compared.items()
        }
        print_json(told, failures=failures)
    worse = any(worsened(found) for found in compared.values())
    return 1 if failures or (worse and not arguments.update) else 0


def conclusions(
    compared: Mapping[str, Sequence[Comparison]], failures: Mapping[str, str], accepted: bool
) -> list[str]:
    lines = [f"{name}: FAILED, {reason}" for name, reason in failures.items()]
    for name, found in compared.items():
        for c in found:
            if c.verdict == "WORSE":
                lines.append(
                    f"{name}, {c.name}: {c.ratio:.4g}, worse than {c.baseline:.4g} by {c.worse:.1%}; "
                    f"tolerance {c.tolerance:.1%}"
                )
            elif c.verdict == "gone":
                lines.append(f"{name}, {c.name}: not measured; if for good, delete it in {BASELINE.name}")
            elif c.verdict == "new" and not accepted:
                lines.append(f"{name}, {c.name}: new")
    accept = [name for name, found in compared.items() if any(c.verdict in ("WORSE", "new") for c in found)]
    if accepted:
        lines.append(f"taken into {BASELINE.relative_to(ROOT)}: {', '.join(compared)}")
    elif accept:
        lines.append(f"accept: python -m benchmarks.guard --only {' '.join(accept)} --update")
    count = sum(len(worsened(found)) for found in compared.values())
    total = sum(len(found) for found in compared.values())
    return [*lines, f"{total} ratios, {count} worse than the baseline"]


if __name__ == "__main__":
    sys.exit(main())
