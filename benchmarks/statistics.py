"""What gradient statistics cost: time, memory and bytes moved, on every mesh, beside what others do for them.

    python -m benchmarks.statistics [--rounds 12] [--json] [--only time memory single ddp fsdp tp]
        [--accumulations 1 4 16]

Time: variants of a trainer that differ in what they measure take turns, one step each and in random order, as
in benchmarks.step: medians of the ratios to the plain one within a round, with quartiles. Beside them the
ratios of processor time and of the fastest steps, which other work on the machine disturbs less. A step of 4
or 16 micro-batches is an average already and gets a half or a quarter of the rounds.

Memory: the peak of a fresh process for each variant; on a CPU its resident size, to which the interpreter and
its libraries add a third of a GiB in all variants alike. What is judged is the difference, in MiB. Only for
this, malloc is told to give back what is freed. The bound for inner products is one shard-sized buffer for
each unit: J slices of the largest layer, which is its flat gradient (of DDP's largest bucket, 25 MiB).

Bytes: what a rank sends in a step if collectives are rings, from the collectives that PyTorch's dispatcher
sees. It sees those of DDP's reducer and of tensor parallel too, which do not pass through torch.distributed.

Two ways in use today are measured beside it: gradients of single sequences by vmap on a copy of the model
(the code of AdAdaGrad, Lau et al. 2024), and a second reduce-scatter, of squared gradients (the code of
Naganuma et al. 2026).

Processes have one thread each on a CPU, or one GPU each; meshes for which there are too few GPUs are skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import peak_mib
from benchmarks.printing import beside_json, print_json
from benchmarks.step import COMMON, EVERY_STEP
from benchmarks.timing import Seconds, in_turns, ratio
from pipeline.batch import norm_test
from pipeline.batch._interface import Decision, Needs
from pipeline.config import Config
from pipeline.gradients.capture import capture_for
from pipeline.gradients.exchange import reduce_scatter
from pipeline.model.llama import Llama
from pipeline.parallel._ranks import Ranks, process_group
from pipeline.store import RunDirectory, home
from pipeline.train import Trainer
from tests.support import config

PARTS = ("time", "memory")
MESHES = ("single", "ddp", "fsdp", "tp")
ACCUMULATIONS = (1, 4, 16)
MEMORY_ACCUMULATION = 4
NAME_WIDTH = 48
NORM_TARGET, INNER_PRODUCT_TARGET = 1.02, 1.10
BUCKET_MIB = 25  # of DDP's gradients, its default


class Steady(norm_test.Schedule):
    """The norm test at every step, always passed, from whatever statistics; no `needs`: from none at all."""

    def __init__(self, composed: Config, needs: Needs | None) -> None:
        super().__init__(composed)
        self.needs = needs


# --- what people do today


class SequenceGradients:
    """The gradient of every sequence by vmap, on a copy of the model that is made for each step."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._loss = trainer, trainer._loss
        trainer._loss = self._see  # type: ignore[method-assign]
        with torch.device("meta"):
            self._model = Llama(trainer.config.model)

    def step(self) -> None:
        named = self._trainer.model.named_parameters()
        self._copy = {name: _whole(parameter.detach()).clone() for name, parameter in named}
        self._sum = torch.zeros(1, dtype=torch.float64, device=self._trainer.device)
        self._trainer.step()
        self._trainer.ranks.sum(self._sum)

    def _see(self, inputs: Tensor, targets: Tensor) -> Tensor:
        # Attention's fast kernels have no rule for vmap.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            gradient = torch.func.vmap(torch.func.grad(self._loss_of_one), (None, 0, 0))
            gradients = gradient(self._copy, inputs, targets)
        for of_sequences in gradients.values():
            self._sum += of_sequences.square().sum()
        return self._loss(inputs, targets)

    def _loss_of_one(self, weights: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        logits = torch.func.functional_call(self._model, weights, (inputs[None],))
        return torch.nn.functional.cross_entropy(logits[0], targets)


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


class SquaredGradients:
    """A second reduce-scatter in each layer and micro-batch, of the squares of what the first one sums."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._sum = torch.zeros(1, dtype=torch.float64, device=trainer.device)
        for module in trainer.model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(self)

    def step(self) -> None:
        self._sum.zero_()
        self._trainer.step()
        self._trainer.ranks.sum(self._sum)

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp,
        async_op: bool = False,
    ) -> dist.Work | None:
        squares = torch.empty_like(output_tensor)
        reduce_scatter(squares, input_tensor.square(), op, group)
        self._sum += squares.sum()
        return reduce_scatter(output_tensor, input_tensor, op, group, async_op)


# --- variants


@dataclass(frozen=True)
class Variant:
    needs: Callable[[int], Needs | None] = lambda units: None  # by the micro-batches of a step
    target: float | None = None  # of the ratio of step times
    meshes: tuple[str, ...] = MESHES
    accumulations: tuple[int, ...] = ACCUMULATIONS
    overrides: tuple[str, ...] = ()
    instead: type[SequenceGradients] | type[SquaredGradients] | None = None  # of the pipeline's statistics


WORKERS = ("ddp", "fsdp")
VARIANTS = {
    "plain": Variant(),
    "norm": Variant(lambda units: Needs("microbatch"), NORM_TARGET),
    "norm, first quarter": Variant(
        lambda units: Needs("microbatch", measured_units=max(1, units // 4)),
        NORM_TARGET,
        accumulations=(4, 16),
    ),
    "products with momentum": Variant(
        lambda units: Needs("microbatch", direction="momentum"), INNER_PRODUCT_TARGET
    ),
    "products of workers": Variant(lambda units: Needs("worker"), INNER_PRODUCT_TARGET, WORKERS),
    "products, coordinates": Variant(
        lambda units: Needs("worker", coordinates=True), None, WORKERS, accumulations=(1, 4)
    ),
    "plain, whole gradients": Variant(
        meshes=("fsdp",), accumulations=(4,), overrides=("parallel.shard_gradients=false",)
    ),
    "vmap on a copy": Variant(meshes=("single", "fsdp"), accumulations=(1, 4), instead=SequenceGradients),
    "squares scattered too": Variant(meshes=("fsdp",), accumulations=(1, 4), instead=SquaredGradients),
}


def variants_of(mesh: str, accumulation: int) -> list[str]:
    return [name for name, v in VARIANTS.items() if mesh in v.meshes and accumulation in v.accumulations]


def build(
    ranks: Ranks, overrides: list[str], accumulation: int, name: str
) -> tuple[Trainer, Callable[[], None]]:
    """The trainer of a variant and its step."""
    variant = VARIANTS[name]
    composed = config(*overrides, *EVERY_STEP, *variant.overrides)
    run = RunDirectory(
        home() / "runs" / f"{composed.model.name} {composed.parallel.strategy} {accumulation} {name}"
    )
    trainer = Trainer(config(*overrides, *variant.overrides), run, 1, ranks)
    units = ranks.data_ranks * accumulation
    schedule = Steady(composed, variant.needs(units))
    trainer.schedule = schedule
    if schedule.needs:
        trainer.capture = capture_for(schedule.needs, trainer.model, trainer.optimizer, ranks)
    set_batch(trainer, units * trainer.micro)
    return trainer, variant.instead(trainer).step if variant.instead else trainer.step


def set_batch(trainer: Trainer, sequences: int) -> None:
    state, _ = trainer.schedule.start()
    trainer.progress.schedule = replace(state, requested=sequences)
    trainer.progress.next_batch = Decision(sequences, sequences, "scheduled", {})


# --- one process per rank


def on_mesh(composed: Config, function: Callable[..., Any], *arguments: object) -> Any:
    """What `function(ranks, *arguments)` returns on rank 0, in fresh processes for all ranks of the mesh."""
    with tempfile.TemporaryDirectory() as directory, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        result = Path(directory) / "result"
        torch.multiprocessing.spawn(
            _rank, (port, result, composed, function, arguments), nprocs=composed.parallel.world_size
        )
        return torch.load(result, weights_only=False)


def _rank(
    rank: int, port: int, result: Path, composed: Config, function: Callable[..., Any], arguments: Any
) -> None:
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what training reports is not part of the figures
    torch.set_num_threads(1)
    world_size = composed.parallel.world_size
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with process_group(composed) as ranks:
        returned = function(ranks, *arguments)
        if ranks.is_main:
            torch.save(returned, result)


# --- time


def step_times(
    ranks: Ranks, mesh: str, overrides: list[str], rounds: int, accumulations: Sequence[int]
) -> dict[int, Seconds]:
    """Of each accumulation."""
    times = {}
    for accumulation in accumulations:
        names = variants_of(mesh, accumulation)
        built = {name: build(ranks, overrides, accumulation, name) for name in names}
        _warm_up(built)
        steps = {name: step for name, (_, step) in built.items()}
        times[accumulation] = in_turns(steps, max(3, rounds // math.isqrt(accumulation)), warm_up=0)
        for trainer, _ in built.values():
            trainer.close(0)
    return times


def _warm_up(built: dict[str, tuple[Trainer, Callable[[], None]]]) -> None:
    """Two steps of one micro-batch: memory is allocated, and the optimizer has its moments."""
    for trainer, step in built.values():
        batch = trainer.progress.next_batch.size
        set_batch(trainer, trainer.ranks.data_ranks * trainer.micro)
        step()
        step()
        set_batch(trainer, batch)


# --- memory and bytes


@dataclass(frozen=True)
class Footprint:
    peak_mib: float
    sent_mib: float  # by one rank in one step


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank sends in collectives of all ranks, by the ring algorithms."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.bytes = 0.0
        passed = (world_size - 1) / world_size  # of what is gathered or reduced
        self._share = {
            "c10d::allreduce_": 2 * passed,
            "c10d::_reduce_scatter_base_": passed,
            "c10d::_allgather_base_": passed,
            "c10d::alltoall_base_": passed,
            "c10d::broadcast_": 1.0,
            "_c10d_functional::all_reduce": 2 * passed,
            "_c10d_functional::all_reduce_": 2 * passed,
            "_c10d_functional::reduce_scatter_tensor": passed,
            "_c10d_functional::all_gather_into_tensor": world_size * passed,  # its argument is one part
            "_c10d_functional::all_to_all_single": passed,
        }

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # shows the operations on its parts instead
        if function.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
            largest = max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0)
            self.bytes += largest * self._share_of(function)
        return function(*args, **(kwargs or {}))

    def _share_of(self, function: Any) -> float:
        name = function.name().split(".")[0]
        if name.endswith(("wait_tensor", "_wrap_tensor_autograd", "barrier")):
            return 0.0
        return self._share[name]


def footprint(ranks: Ranks, overrides: list[str], accumulation: int, name: str) -> Footprint:
    trainer, step = build(ranks, overrides, accumulation, name)
    step()
    step()
    if ranks.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(ranks.device) / 2**20
    else:
        peak = peak_mib()
    with Sent(ranks.world_size) as sent:
        step()
    trainer.close(0)
    return Footprint(peak, sent.bytes / 2**20)


# --- figures

Figures = dict[str, dict[str, Any]]  # of each variant of a mesh, by what it measures
# glibc: without these what is freed stays with the process, as much as chance will have it.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def mesh_overrides(mesh: str) -> list[str]:
    return [*COMMON, f"parallel={mesh}"]


def too_few_gpus(mesh: str) -> bool:
    wanted, found = config(*mesh_overrides(mesh)).parallel.world_size, torch.cuda.device_count()
    return 0 < found < wanted


def time_figures(mesh: str, rounds: int, accumulations: Sequence[int]) -> Figures:
    overrides = mesh_overrides(mesh)
    figures: Figures = {}
    measured_times = on_mesh(config(*overrides), step_times, mesh, overrides, rounds, accumulations)
    for accumulation, seconds in measured_times.items():
        plain = seconds.pop("plain")
        for name, measured in seconds.items():
            figure: dict[str, Any] = {**ratio(measured, plain), "target": VARIANTS[name].target}
            figure["met"] = figure["target"] is None or figure["ratio"] <= figure["target"]
            figure |= {"rounds": len(plain), "plain_s": statistics.median(wall for wall, _ in plain)}
            figures[f"{mesh}, accumulation {accumulation}: {name}"] = figure
    return figures


def memory_figures(mesh: str) -> Figures:
    overrides = mesh_overrides(mesh)
    composed, names = config(*overrides), variants_of(mesh, MEMORY_ACCUMULATION)
    with patch.dict(os.environ, GIVE_BACK):
        footprints = {
            name: on_mesh(composed, footprint, overrides, MEMORY_ACCUMULATION, name) for name in names
        }
    figures: Figures = {}
    for name, measured in footprints.items():
        extra = measured.peak_mib - footprints[_beside(mesh, name)].peak_mib
        bound = bound_mib(composed) if VARIANTS[name].target == INNER_PRODUCT_TARGET else None
        figures[f"{mesh}: {name}"] = {
            **asdict(measured),
            "ratio": measured.peak_mib / footprints["plain"].peak_mib,
            "extra_mib": extra,
            "bound_mib": bound,
            "met": bound is None or extra <= bound,
        }
    return figures


def _beside(mesh: str, name: str) -> str:
    """The plain variant that tells the statistic's own memory. Those of workers keep gradients whole under
    FSDP2, as a plain step may, too: what that takes has a row of its own."""
    needs = VARIANTS[name].needs(1)
    keeps_whole = mesh == "fsdp" and needs is not None and needs.units == "worker"
    return "plain, whole gradients" if keeps_whole else "plain"


def bound_mib(composed: Config) -> float:
    """The largest flat gradient that is reduced at a time: of a layer, or of DDP's bucket."""
    if composed.parallel.strategy == "ddp":
        return BUCKET_MIB
    with torch.device("meta"):
        model = Llama(composed.model)
    layers = [model.embedding, *model.blocks, model.head]
    elements = max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    return elements * 4 / composed.parallel.tensor / 2**20


# --- what is printed


def show(figures: Figures, describe: Callable[[dict[str, Any]], str]) -> None:
    for name, figure in figures.items():
        print(f"{name:{NAME_WIDTH}}  {describe(figure)}", flush=True)


def of_time(figure: dict[str, Any]) -> str:
    target = f"  target ≤ {figure['target']}  {_verdict(figure)}" if figure["target"] else ""
    return (
        f"{figure['ratio']:.3f}  [{figure['q1']:.3f}, {figure['q3']:.3f}]  "
        f"processor time {figure['processor']:.3f}  fastest {figure['fastest']:.3f}{target}"
    )


def of_memory(figure: dict[str, Any]) -> str:
    bound = f"  bound {figure['bound_mib']:.1f}  {_verdict(figure)}" if figure["bound_mib"] else ""
    return (
        f"peak {figure['peak_mib']:6.1f} MiB, ratio {figure['ratio']:.3f}  "
        f"sent {figure['sent_mib']:6.2f} MiB  extra {figure['extra_mib']:+6.1f} MiB{bound}"
    )


def _verdict(figure: dict[str, Any]) -> str:
    return "met" if figure["met"] else "MISSED"


def measure(
    parts: Sequence[str], meshes: Sequence[str], rounds: int, accumulations: Sequence[int]
) -> dict[str, Figures]:
    """The figures of each part, printed as they come."""
    figures: dict[str, Figures] = {part: {} for part in parts}
    for mesh in meshes:
        if too_few_gpus(mesh):
            print(f"{mesh}: skipped, needs a GPU for each rank", file=sys.stderr)
            continue
        for part, measured, describe in (
            ("time", lambda mesh: time_figures(mesh, rounds, accumulations), of_time),
            ("memory", memory_figures, of_memory),
        ):
            if part in parts:
                found = measured(mesh)
                figures[part] |= found
                show(found, describe)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    names = (*PARTS, *MESHES)
    parser.add_argument(
        "--only", nargs="+", default=names, choices=names, metavar="NAME", help=" ".join(names)
    )
    parser.add_argument(
        "--accumulations",
        nargs="+",
        type=int,
        default=ACCUMULATIONS,
        choices=ACCUMULATIONS,
        help="of the time",
    )
    arguments = parser.parse_args()
    parts = [part for part in PARTS if part in arguments.only] or PARTS
    meshes = [mesh for mesh in MESHES if mesh in arguments.only] or MESHES
    os.environ["WANDB_MODE"] = "disabled"
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        os.environ["CRESCENDO_HOME"] = directory
        with beside_json(arguments.json):
            figures = measure(parts, meshes, arguments.rounds, arguments.accumulations)
    if arguments.json:
        print_json(figures, device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    return 0 if all(figure["met"] for part in figures.values() for figure in part.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
