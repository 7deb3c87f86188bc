"""Which runs can share a job array: those whose jobs ask for the same resources. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.config import Config

T = TypeVar("T")


@dataclass(frozen=True)
class Shape:
    """The resources of one job: `pack` runs side by side."""

    nodes: int
    ranks_per_node: int  # of one run
    gpus_per_node: int  # of one run; 0: trains on CPUs
    cpus_per_task: int | None
    mem_gb: float | None
    minutes: int
    warning_s: int
    partition: str | None
    qos: str | None
    account: str | None
    constraint: str | None
    setup: tuple[str, ...]
    sbatch: tuple[str, ...]
    pack: int

    @classmethod
    def of(cls, config: Config) -> Shape:
        launch, ranks = config.launch, config.ranks_per_node
        return cls(
            nodes=config.nodes,
            ranks_per_node=ranks,
            gpus_per_node=0 if launch.device == "cpu" else ranks,
            cpus_per_task=launch.cpus_per_task,
            mem_gb=launch.mem_gb,
            minutes=launch.minutes,
            warning_s=launch.warning_s,
            partition=launch.partition,
            qos=launch.qos,
            account=launch.account,
            constraint=launch.constraint,
            setup=tuple(launch.setup),
            sbatch=tuple(launch.sbatch),
            pack=launch.pack,
        )

    @property
    def devices(self) -> int:
        """GPUs of one run, or its ranks where it uses none."""
        return self.nodes * (self.gpus_per_node or self.ranks_per_node)

    @property
    def device_hours(self) -> float:
        """Of one run, until its time limit."""
        return self.devices * self.minutes / 60

    def __str__(self) -> str:
        """`2 × 8 GPUs, 120 min, partition main`."""
        kind, count = "GPU" if self.gpus_per_node else "rank", self.gpus_per_node or self.ranks_per_node
        words = [f"{self.nodes} × {count} {kind}{'s' * (count > 1)}", f"{self.minutes} min"]
        words += [f"{key} {value}" for key in ("partition", "qos") if (value := getattr(self, key))]
        words += [f"{self.pack} in a job"] if self.pack > 1 else []
        return ", ".join(words)

    def parameters(self) -> dict[str, Any]:
        """For submitit's executor."""
        # Slurm 22.05 to 23.02 do not hand --cpus-per-task on to srun by themselves.
        cpus = ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"] if self.cpus_per_task else []
        given = {
            "nodes": self.nodes,
            "ntasks_per_node": self.ranks_per_node * self.pack,
            "gpus_per_node": self.gpus_per_node * self.pack or None,
            "cpus_per_task": self.cpus_per_task,
            "mem": f"{round(self.mem_gb * self.pack * 1024)}MB" if self.mem_gb else None,
            "time": self.minutes,
            "signal_delay_s": self.warning_s,
            "partition": self.partition,
            "qos": self.qos,
            "account": self.account,
            "constraint": self.constraint,
            "setup": [*cpus, *self.setup],
            # A rank that dies ends its job. Runs that share one end each by themselves, none for the others.
            "srun_args": [f"--kill-on-bad-exit={int(self.pack == 1)}", "--wait=0"],
            "additional_parameters": {"requeue": True, **dict(map(_parameter, self.sbatch))},
        }
        return {key: value for key, value in given.items() if value is not None}


def _parameter(text: str) -> tuple[str, str | bool]:
    """`--reservation=name` or `exclusive`, the dashes at will."""
    name, equals, value = text.lstrip("-").partition("=")
    return name, value if equals else True


def by_shape(points: Sequence[tuple[T, Config]]) -> dict[Shape, list[T]]:
    """In the order in which the shapes come first."""
    shapes: dict[Shape, list[T]] = {}
    for point, config in points:
        shapes.setdefault(Shape.of(config), []).append(point)
    return shapes


def gpu_hours(shapes: Mapping[Shape, Sequence[object]]) -> float:
    """Until the time limits of all jobs; runs without GPUs count nothing."""
    return sum(len(runs) * shape.device_hours for shape, runs in shapes.items() if shape.gpus_per_node)


def grouped(items: Sequence[T], size: int) -> list[list[T]]:
    """In order, `size` at a time."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def shares(limit: int | None, sizes: Sequence[int]) -> list[int]:
    """How many jobs of each array may run at a time: in proportion to their sizes, together at most `limit`
    (but one for each in any case), because SLURM limits single arrays alone."""
    if limit is None:
        return list(sizes)
    given = [1] * len(sizes)
    while sum(given) < min(limit, sum(sizes)):
        open_ones = (i for i, size in enumerate(sizes) if given[i] < size)
        given[min(open_ones, key=lambda i: given[i] / sizes[i])] += 1
    return given
