"""What a run is: a dataclass for each group of settings, and what follows from them. Defaults live in
conf/config.yaml alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pipeline.batch as batch_schedules
import pipeline.parallel as strategies
from pipeline.batch import BatchPlan

Positive = "above 0"  # marks fields that must be
Tokens = Annotated[int, "tokens"]  # accepts 300k, 2M, 1.5B
PositiveTokens = Annotated[int, "tokens", Positive]
PositiveInt = Annotated[int, Positive]
PositiveFloat = Annotated[float, Positive]
AboveOne = "above 1"
Rest = "-1: the rest"
Factor = Annotated[float, AboveOne]
MeshSize = Annotated[int, Positive, Rest]

TEXT_SOURCES = ("stdlib", "text")
BYTE_VOCABULARY = 257  # 256 bytes and the end-of-document token


@dataclass(frozen=True)
class BudgetConfig:
    tokens: PositiveTokens
    stop_tokens: PositiveTokens | None


@dataclass(frozen=True)
class BranchConfig:
    run: str | None
    tokens: Tokens


@dataclass(frozen=True)
class LlamaConfig:
    """A language model."""

    kind: Literal["llama"]
    name: str
    layers: PositiveInt
    width: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    ffn: PositiveInt
    vocab: PositiveInt
    tied: bool
    rope_theta: PositiveFloat
    norm_eps: PositiveFloat

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def parameters(self) -> int:
        attention = 2 * self.width**2 + 2 * self.width * self.kv_heads * self.head_width
        block = attention + 3 * self.width * self.ffn + 2 * self.width
        embeddings = self.vocab * self.width * (1 if self.tied else 2)
        return self.layers * block + embeddings + self.width

    def flops_per_token(self, sequence_length: int) -> float:
        """Of the forward and the backward pass: 6 per parameter outside the embedding, and 12·L·T·D for
        attention scores (Chowdhery et al. 2022, PaLM, appendix B)."""
        matrices = self.parameters - (0 if self.tied else self.vocab * self.width)
        return 6.0 * matrices + 12.0 * self.layers * self.width * sequence_length


@dataclass(frozen=True)
class ClassifierConfig:
    """A model of labelled samples; their shape and the number of classes are those of the data."""

    kind: Literal["logistic", "mlp", "cnn", "resnet18"]
    name: str
    loss: Literal["cross_entropy", "binary", "auc"]
    l2: float
    widths: list[int]


ModelConfig = LlamaConfig | ClassifierConfig


@dataclass(frozen=True)
class DataConfig:
    source: str
    files: list[str]
    field: str
    tokenizer: str
    samples: PositiveInt
    features: PositiveInt | None
    standardise: bool
    sequence_length: PositiveInt
    micro_batch: PositiveInt
    distribution: Literal["shared", "by_rank"]
    validation_fraction: float
    seed: int
    workers: PositiveInt | None
    fingerprint: str | None


@dataclass(frozen=True)
class ParallelConfig:
    strategy: str
    replicate: MeshSize
    shard: MeshSize
    tensor: MeshSize
    reshard_after_forward: bool
    shard_gradients: bool
    precision: Literal["float32", "bfloat16"]
    compile: bool
    activation_checkpointing: bool

    @property
    def mesh(self) -> dict[str, int]:
        """Ranks along each axis, the outermost first."""
        return {"replicate": self.replicate, "shard": self.shard, "tensor": self.tensor}

    @property
    def data_ranks(self) -> int:
        """Ranks that read different sequences."""
        return self.replicate * self.shard

    @property
    def world_size(self) -> int:
        return self.data_ranks * self.tensor

    def unused_axes(self) -> list[str]:
        """Axes of the mesh that the strategy does not divide anything along; none of an unknown strategy."""
        if self.strategy not in strategies.names():
            return []
        used = strategies.strategy_class(self.strategy).axes
        return [axis for axis in self.mesh if axis not in used]


@dataclass(frozen=True)
class BatchConfig:
    schedule: str
    size: PositiveInt
    max_size: PositiveInt | None
    round_to: PositiveInt | None
    sizes: list[int] | None
    fractions: list[float] | None
    ramp_tokens: PositiveTokens | None
    measured_tokens: list[Tokens] | None
    measured_sizes: list[float] | None
    eta: PositiveFloat
    theta: PositiveFloat | None
    nu: PositiveFloat | None
    epsilon: PositiveFloat | None
    c: PositiveFloat
    share: float
    estimator: Literal["microbatch", "worker", "paper", "sample"]
    direction: Literal["momentum", "previous", "in_sample"]
    norm: Literal["l2", "l1"]
    form: Literal["norm", "inner_product"]
    measured_units: PositiveInt | None
    averaged_steps: PositiveInt | None
    averaged_ratio: PositiveFloat
    signal: Literal["plain", "debiased"]
    interval: PositiveInt
    start_tokens: Tokens
    ema: float
    confirmations: PositiveInt
    growth_cap: Factor
    hold_tokens: Tokens
    monotone: bool
    own: dict[str, Any]


@dataclass(frozen=True)
class SyncConfig:
    method: str
    period: PositiveInt
    warm_steps: int
    sample_steps: PositiveInt
    delay_steps: int
    group_size: PositiveInt | None
    grace_ms: float
    neighbours: PositiveInt
    block_share: PositiveFloat
    detach: float
    quorum: Literal["solo", "majority"]
    redundancy: PositiveInt
    consensus: bool


@dataclass(frozen=True)
class ImbalanceConfig:
    kind: Literal["none", "delay", "lognormal", "variable_length"]
    ranks: PositiveInt
    delay_ms: float
    sigma: PositiveFloat
    min_share: PositiveFloat
    compute_ms: float
    seed: int

    @property
    def read(self) -> list[str]:
        """The settings that can change anything."""
        of_kind = {
            "none": [],
            "delay": ["ranks", "delay_ms", "seed"],
            "lognormal": ["delay_ms", "sigma", "seed"],
            "variable_length": ["min_share", "seed"],
        }
        read = [*of_kind[self.kind], *(["compute_ms"] if self.compute_ms else [])]
        return ["kind", *read] if read else []


@dataclass(frozen=True)
class OptimConfig:
    name: str
    lr: PositiveFloat
    weight_decay: float
    betas: list[float]
    momentum: float
    eps: PositiveFloat
    clip: PositiveFloat | None
    delta: PositiveFloat
    decay_ratio: float
    accumulator: PositiveFloat
    per_row: bool
    delayed: bool
    regulariser: Literal["none", "l1", "l2", "elastic_net", "box", "simplex"]
    l1: float
    l2: float
    lower: float | None
    upper: float | None
    base: str
    rho: PositiveFloat
    average_start: float
    average_interval_tokens: PositiveTokens | None
    average_restart_tokens: PositiveTokens | None
    stage_tokens: PositiveTokens
    stage_growth: Factor
    proximity: PositiveFloat


@dataclass(frozen=True)
class LearningRateConfig:
    schedule: Literal["cosine", "warmup_stable_decay"]
    warmup_tokens: Tokens | None
    warmup_steps: int | None
    min_ratio: float
    decay_fraction: float
    cut_factor: Factor | None
    batch_scaling: Literal["none", "sqrt", "linear", "adascale"]


@dataclass(frozen=True)
class EvalConfig:
    interval_tokens: PositiveTokens | None
    sequences: PositiveInt


@dataclass(frozen=True)
class CheckpointConfig:
    interval_tokens: PositiveTokens | None
    interval_minutes: PositiveFloat | None
    keep: PositiveInt


@dataclass(frozen=True)
class TrackConfig:
    mode: Literal["offline", "online", "disabled"]
    project: str
    entity: str | None
    group: str | None
    tags: list[str]
    every: PositiveInt
    exact_gradient: bool


@dataclass(frozen=True)
class LaunchConfig:
    device: Literal["auto", "cpu", "cuda"]
    nodes: PositiveInt | None
    gpus_per_node: PositiveInt | None
    cpus_per_task: PositiveInt | None
    max_parallel: PositiveInt | None
    mem_gb: PositiveFloat | None
    minutes: PositiveInt
    warning_s: PositiveInt
    partition: str | None
    qos: str | None
    account: str | None
    constraint: str | None
    setup: list[str]
    sbatch: list[str]
    pack: PositiveInt
    confirm_gpu_hours: float


@dataclass(frozen=True)
class SweepConfig:
    name: str | None
    strict: bool
    zip: list[list[str]]
    exclude: list[str]


@dataclass(frozen=True)
class Config:
    seed: int
    budget: BudgetConfig
    branch: BranchConfig
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig
    batch: BatchConfig
    sync: SyncConfig
    imbalance: ImbalanceConfig
    optim: OptimConfig
    lr: LearningRateConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    track: TrackConfig
    launch: LaunchConfig
    sweep: SweepConfig

    @property
    def unit(self) -> str:
        """What budgets count, in words: a labelled sample counts as one token."""
        return "tokens" if isinstance(self.model, LlamaConfig) else "samples"

    @property
    def planned_sequences(self) -> int:
        """What schedules of the batch and of the rate are stretched over, wherever the run stops."""
        return self.budget.tokens // self.data.sequence_length

    @property
    def planned_tokens(self) -> int:
        return self.planned_sequences * self.data.sequence_length

    @property
    def budget_sequences(self) -> int:
        """Where the run ends: the last whole sequence inside the token budget, or where it is to stop."""
        return (
            min(self.budget.tokens, self.budget.stop_tokens or self.budget.tokens)
            // self.data.sequence_length
        )

    @property
    def budget_tokens(self) -> int:
        """Tokens seen when the run ends, at most `budget.tokens`."""
        return self.budget_sequences * self.data.sequence_length

    @property
    def first_sequence(self) -> int:
        """Of the stream, that the run reads: not 0 where it branches off another."""
        return self.branch.tokens // self.data.sequence_length

    @property
    def first_token(self) -> int:
        return self.first_sequence * self.data.sequence_length

    @property
    def trained_sequences(self) -> int:
        """What the run itself trains on."""
        return self.budget_sequences - self.first_sequence

    @property
    def trained_tokens(self) -> int:
        return self.trained_sequences * self.data.sequence_length

    @property
    def nodes(self) -> int:
        """Machines that the ranks are spread over, equally."""
        per_node = self.launch.gpus_per_node or self.parallel.world_size
        return self.launch.nodes or -(-self.parallel.world_size // per_node)

    @property
    def ranks_per_node(self) -> int:
        return self.parallel.world_size // self.nodes

    @property
    def batch_unit(self) -> int:
        """Sequences of one micro-batch on every data-parallel rank."""
        return self.parallel.data_ranks * self.data.micro_batch

    @property
    def batch_multiple(self) -> int:
        """Applied batch sizes are multiples of this many sequences."""
        return self.batch.round_to or self.batch_unit

    def batch_plan(self) -> BatchPlan:
        """The batch of every step, or their range where measurements decide."""
        return batch_schedules.plan(self)


def common_unit(units: Iterable[str]) -> str:
    """What runs whose budgets count these count together: of a mixture tokens, of which a labelled sample is
    one."""
    found = set(units)
    return found.pop() if len(found) == 1 else "tokens"
