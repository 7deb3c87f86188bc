"""How fast one GPU trains: speed, utilisation, memory, and what statistics and changes of the batch cost.

    python -m benchmarks.gpu [--models 300M,1B,3B] [--steps 12] [--json]

The pipeline's own trainer with bfloat16 matrix products and compiled blocks, on random tokens, each model in
a process of its own:

1. It warms up, with and without statistics, and compiles. From here on nothing may be compiled again.
2. The batch changes, as a schedule changes it: 1, 2 and 4 micro-batches a step.
3. Steps of 4 micro-batches without statistics: tokens in a second and model FLOPs utilisation as the trainer
   records them (medians), the peak of allocated memory.
4. Steps with and without statistics of every micro-batch in turns and in random order, of the one trainer,
   since two of them would not fit: the median of the ratios within a round, with quartiles. Without: also
   without the hooks, as in a run that needs no statistics.

Targets are those of an H200, and judged on one alone; that nothing is compiled again is judged everywhere.
Exit code 1 when one is missed, 0 where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch._dynamo.utils import counters

from benchmarks.printing import beside_json
from benchmarks.statistics import Steady, on_mesh, set_batch
from benchmarks.step import EVERY_STEP
from benchmarks.timing import in_turns, ratio
from pipeline.batch._interface import Needs
from pipeline.config import Config
from pipeline.data.corpus import Corpus
from pipeline.environment import environment
from pipeline.gradients.capture import capture_for
from pipeline.parallel._ranks import Ranks
from pipeline.store import RunDirectory
from pipeline.train import Trainer
from tests.support import config

ACCUMULATIONS = (1, 2, 4)
SEQUENCES = 4096  # of random tokens, which are read again and again
TARGETS_OF = "H200"
STATISTICS_TARGET = 1.01
COMMON = ["data.sequence_length=2048", "budget.tokens=10B", "parallel.precision=bfloat16"]
ON_GPU = [*COMMON, "parallel.compile=true", "launch.device=cuda"]


@dataclass(frozen=True)
class Case:
    model: str  # of conf/model
    micro_batch: int  # sequences
    mfu_target: float | None


CASES = {
    "300M": Case("microllama_300m", 8, 0.50),
    "1B": Case("tinyllama_1b", 8, 0.55),
    "3B": Case("openllama_3b", 4, None),
}


@dataclass(frozen=True)
class Figures:
    tokens_per_s: float
    mfu: float | None  # None: not known of this device
    peak_gib: float | None  # None: of a CPU
    peak_gib_statistics: float | None
    statistics: dict[str, float]  # over steps without them, as of benchmarks.timing.ratio
    accumulations: list[int]  # of the steps in which the batch changed
    compiled: int  # graphs, before
    compiled_again: int


class Switch:
    """A trainer's statistics of every step, on and off, with the hooks that take them."""

    def __init__(self, trainer: Trainer, composed: Config) -> None:
        needs = Needs("microbatch")
        self._trainer = trainer
        trainer.schedule = Steady(composed, needs)
        self._capture = capture_for(needs, trainer.model, trainer.optimizer, trainer.ranks)
        self._hooks = [(weight, weight._backward_hooks) for weight in trainer.parameters]

    def set(self, on: bool) -> None:
        self._trainer.capture = self._capture if on else None
        for weight, hooks in self._hooks:
            weight._backward_hooks = hooks if on else None


def train(ranks: Ranks, overrides: list[str], steps: int) -> Figures:
    """All parts of the measurement, in this process."""
    composed = config(*overrides)
    run = RunDirectory.of(composed)
    run.freeze(composed)
    with patch("pipeline.problem.prepare", return_value=random_corpus(composed)):
        trainer = Trainer(composed, run, 1, ranks)
    trainer.resume()
    switch = Switch(trainer, config(*overrides, *EVERY_STEP))

    def step(on: bool) -> None:
        switch.set(on)
        trainer.step()
        trainer.publish()

    def steps_of(accumulation: int, count: int, on: bool) -> slice:
        """Which rows they are of the record."""
        set_batch(trainer, accumulation * trainer.micro)
        first = trainer.progress.step
        for _ in range(count):
            step(on)
        return slice(first, first + count)

    for on in (False, True):
        steps_of(1, 2, on)
    compiled = compiled_graphs()
    changed = [steps_of(accumulation, 2, on=True) for accumulation in ACCUMULATIONS]
    plain, peak = _with_peak(ranks, lambda: steps_of(ACCUMULATIONS[-1], steps, on=False))
    _, peak_statistics = _with_peak(ranks, lambda: steps_of(ACCUMULATIONS[-1], 2, on=True))
    seconds = in_turns({"on": lambda: step(True), "off": lambda: step(False)}, steps, warm_up=1)
    compiled_again = compiled_graphs() - compiled
    trainer.close(0)

    rows = run.rows()
    mfu = [row["throughput/mfu"] for row in rows[plain] if "throughput/mfu" in row]
    return Figures(
        statistics.median(row["throughput/tokens_per_s"] for row in rows[plain]),
        statistics.median(mfu) if mfu else None,
        peak,
        peak_statistics,
        ratio(seconds["on"], seconds["off"]),
        [row["batch/accumulation"] for part in changed for row in rows[part]],
        compiled,
        compiled_again,
    )


def _with_peak(ranks: Ranks, work: Callable[[], slice]) -> tuple[slice, float | None]:
    """What it returns, and the most memory in GiB that was allocated meanwhile; None on a CPU."""
    if ranks.device.type != "cuda":
        return work(), None
    torch.cuda.reset_peak_memory_stats(ranks.device)
    done = work()
    return done, torch.cuda.max_memory_allocated(ranks.device) / 2**30


def compiled_graphs() -> int:
    """So far, by torch.compile in this process: a guard that fails adds one."""
    return counters["stats"]["unique_graphs"]


def random_corpus(composed: Config) -> Corpus:
    """Tokens of the model's whole vocabulary, evenly: a byte text would leave most of the embedding alone."""
    vocab, length = composed.model.vocab, composed.data.sequence_length
    tokens = np.random.default_rng(0).integers(0, vocab, SEQUENCES * length + 1, dtype=np.uint16)
    return Corpus(tokens, tokens, "random", vocab, {})


# --- figures


def overrides_of(case: Case, more: Sequence[str]) -> list[str]:
    sizes = [f"data.micro_batch={case.micro_batch}", f"batch.size={case.micro_batch}"]
    return [f"model={case.model}", *sizes, *more]


def measured(case: Case, steps: int, more: Sequence[str]) -> Figures | str:
    """In a process of its own; a string says why there are none."""
    overrides = overrides_of(case, more)
    try:
        found: Figures = on_mesh(config(*overrides), train, overrides, steps)
        return found
    except torch.multiprocessing.ProcessRaisedException as error:
        if "OutOfMemoryError" not in str(error):
            raise
        return "does not fit into the memory of this GPU"


def verdicts(case: Case, found: Figures | str, device: str) -> dict[str, bool]:
    """Of each target that counts on this device: whether it is met."""
    judged: dict[str, bool] = {}
    if TARGETS_OF in device:
        if isinstance(found, str):
            return {"fits": False}
        judged["statistics"] = found.statistics["ratio"] <= STATISTICS_TARGET
        if case.mfu_target is not None:
            judged["MFU"] = found.mfu is not None and found.mfu >= case.mfu_target
    if isinstance(found, Figures):
        judged["compiled once"] = found.compiled_again == 0
    return judged


def describe(name: str, case: Case, found: Figures | str, device: str) -> str:
    if isinstance(found, str):
        return f"{name:5} {found}"
    judged = verdicts(case, found, device)

    def against(what: str, target: str) -> str:
        if what in judged:
            return f"target {target} {'met' if judged[what] else 'MISSED'}"
        return f"target for an {TARGETS_OF} {target}"

    mfu = "not known" if found.mfu is None else f"{found.mfu:.3f}"
    if case.mfu_target is not None:
        mfu += f" ({against('MFU', f'≥ {case.mfu_target:.2f}')})"
    memory = "not known of a CPU"
    if found.peak_gib is not None and found.peak_gib_statistics is not None:
        memory = f"{found.peak_gib:.1f} GiB, with statistics {found.peak_gib_statistics:.1f} GiB"
    beside = found.statistics
    again = "once" if found.compiled_again == 0 else f"AGAIN, {found.compiled_again} times"
    return "\n".join(
        (
            f"{name:5} {found.tokens_per_s:,.0f} tokens/s",
            f"      MFU {mfu}",
            f"      peak memory {memory}",
            f"      statistics {beside['ratio']:.4f}  [{beside['q1']:.4f}, {beside['q3']:.4f}]  "
            f"({against('statistics', f'≤ {STATISTICS_TARGET}')})",
            f"      {', '.join(map(str, ACCUMULATIONS))} micro-batches a step: compiled {again}",
        )
    )


def machine() -> dict[str, Any]:
    gpus = environment()["gpus"]
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "driver": gpus[0]["driver_version"] if gpus else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }


def content(cases: Mapping[str, Case], steps: int, more: Sequence[str] = ON_GPU) -> dict[str, Any]:
    """Everything that --json prints; the table as it comes."""
    here = machine()
    software = f"driver {here['driver']}, CUDA {here['cuda']}, torch {here['torch']}"
    print(f"{date.today()}  {here['device']}, {software}")
    figures: dict[str, Any] = {}
    for name, case in cases.items():
        found = measured(case, steps, more)
        print(describe(name, case, found, here["device"]), flush=True)
        told = {"failed": found} if isinstance(found, str) else asdict(found)
        met = verdicts(case, found, here["device"])
        figures[name] = {"device": here["device"], "settings": asdict(case), **told, "met": met}
    return {"date": str(date.today()), "machine": here, "figures": figures}


def names(text: str) -> list[str]:
    given = text.split(",")
    if unknown := [name for name in given if name not in CASES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: no such model; there are {', '.join(CASES)}")
    return given


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=names, default=list(CASES), help=f"default {','.join(CASES)}")
    parser.add_argument("--steps", type=int, default=12, help="of each measurement (default 12)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing is measured", file=sys.stderr)
        if arguments.json:
            print(json.dumps({"date": str(date.today()), "machine": machine(), "figures": {}}))
        return 0
    os.environ["WANDB_MODE"] = "disabled"
    with (
        tempfile.TemporaryDirectory() as directory,
        contextlib.chdir(directory),
        beside_json(arguments.json),
    ):
        os.environ["CRESCENDO_HOME"] = directory
        told = content({name: CASES[name] for name in arguments.models}, arguments.steps)
    if arguments.json:
        print(json.dumps(told, indent=1))
    return 0 if all(met for figure in told["figures"].values() for met in figure["met"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
