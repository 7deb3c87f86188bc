"""The typed configuration of a run and every check that spans its fields.

Hydra composes YAML; `parse` turns the composed tree into the dataclasses below and refuses what does not
fit; `check` refuses values that fit but cannot work together. Defaults live in conf/config.yaml alone.
Nothing here imports torch: the command line, the preview and the launchers need this before a run starts.
"""

from __future__ import annotations

import difflib
import functools
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import pipeline.batch as batch_schedules
import pipeline.optim as optimizers
import pipeline.parallel as strategies
import pipeline.samples as labelled_samples
import pipeline.sync as sync_methods
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

_NUMBER_OF_WIDTHS = {"cnn": 2, "resnet18": 4}
TEXT_SOURCES = ("stdlib", "text")
BYTE_VOCABULARY = 257  # 256 bytes and the end-of-document token


class ConfigError(ValueError):
    """The request itself is wrong. Says what was given, what is allowed and the nearest valid value."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


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


# --- tree -> dataclasses ---------------------------------------------------------------------------------

T = TypeVar("T")


def typed(tree: DictConfig) -> Config:
    """The typed config of what Hydra composed. Raises ConfigError for unknown keys, missing and mistyped
    values: mistakes in the request, whatever the other settings are."""
    settings = tree
    if "hydra" in tree:
        settings = OmegaConf.masked_copy(tree, [str(key) for key in tree if key != "hydra"])
    try:
        plain = OmegaConf.to_container(settings, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException:
        if missing := sorted(OmegaConf.missing_keys(settings)):
            raise ConfigError(
                *(
                    f"{k}: needs a value. An option of its group sets it: {k.partition('.')[0]}=…"
                    for k in missing
                )
            ) from None
        raise
    assert isinstance(plain, dict)
    return parse(plain)  # type: ignore[arg-type]


def sweep_settings(tree: DictConfig) -> SweepConfig:
    """Those of the sweep itself, of a tree whose other settings may still be swept. Raises ConfigError."""
    return parse_group(SweepConfig, OmegaConf.to_container(tree.sweep, resolve=True), "sweep")


def parse_group(kind: type[T], tree: Any, path: str) -> T:
    """One group of settings, whose keys begin with `path`. Raises ConfigError with every misspelt key and
    wrong type."""
    problems: list[str] = []
    group = _convert(kind, tree, path, problems)
    if problems:
        raise ConfigError(*problems)
    return group


def parse(tree: Mapping[str, Any]) -> Config:
    """The typed config of a composed tree. Raises ConfigError with every misspelt key and wrong type, and
    when the one -1 of the mesh cannot be filled in."""
    config = parse_group(Config, tree, "")
    return replace(config, parallel=_whole_mesh(config.parallel, config.launch))


def to_tree(config: object) -> Any:
    """The inverse of `parse`: plain dicts, lists and scalars."""
    if is_dataclass(config):
        return {f.name: to_tree(getattr(config, f.name)) for f in fields(config)}
    return list(config) if isinstance(config, (list, tuple)) else config


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """The type of each field, with its marks. Kept, because reading them from text takes long."""
    return get_type_hints(kind, include_extras=True)


def forms_of(hint: Any) -> tuple[type, ...]:
    """The dataclasses that a group of settings may be, told apart by their `kind`; none for a plain value."""
    return tuple(
        form for form in (get_args(hint) or (hint,)) if isinstance(form, type) and is_dataclass(form)
    )


def known_keys(kind: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, groups included."""
    keys: dict[str, None] = {}
    for name, hint in hints_of(kind).items():
        keys[prefix + name] = None
        for form in forms_of(hint):
            keys |= dict.fromkeys(known_keys(form, f"{prefix}{name}."))
    return list(keys)


def nearest(word: str, candidates: Sequence[str]) -> str | None:
    """The candidate a user most likely meant: closest in spelling as a whole, else in its last part."""
    if match := difflib.get_close_matches(word, candidates, n=1, cutoff=0.6):
        return match[0]
    leaf = word.rsplit(".", 1)[-1]
    leaves = {candidate.rsplit(".", 1)[-1]: candidate for candidate in reversed(candidates)}
    match = difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.75)
    return leaves[match[0]] if match else None


def did_you_mean(word: str, candidates: Sequence[str]) -> str:
    """The end of an error message; empty where nothing is near."""
    hint = nearest(word, candidates)
    return f" Did you mean {hint}?" if hint else ""


def unknown_key(key: str) -> str:
    if key.partition(".")[0] == "experiment":
        return "experiment: its file in conf/experiment/ must begin with the line `# @package _global_`"
    group, _, name = key.partition(".")
    for form in forms_of(hints_of(Config).get(group)):
        if name in hints_of(form):  # not of the one that was chosen
            kinds = "|".join(get_args(hints_of(form)["kind"]))
            return f"{key}: only a {group} of {group}.kind={kinds} has it"
    return f"{key}: no such setting." + did_you_mean(key, known_keys())


def _convert(kind: type[T], tree: Any, path: str, problems: list[str]) -> T:
    if not isinstance(tree, Mapping):
        problems.append(f"{path}: is a group of settings, not {_show(tree)}")
        return None  # type: ignore[return-value]
    prefix = f"{path}." if path else ""
    hints = hints_of(kind)  # type: ignore[arg-type]
    problems += [unknown_key(f"{prefix}{key}") for key in tree if key not in hints]
    values: dict[str, Any] = {}
    for name, hint in hints.items():
        key = f"{prefix}{name}"
        if name not in tree:
            problems.append(f"{key}: missing")
        elif forms := forms_of(hint):
            values[name] = _convert(_form(forms, tree[name]), tree[name], key, problems)
        else:
            try:
                values[name] = _value(hint, tree[name])
            except ValueError as error:
                problems.append(f"{key}={_show(tree[name])}: {error}")
    return kind(**{name: values.get(name) for name in hints})


def _form(forms: Sequence[type], tree: Any) -> type:
    """The one of these dataclasses that a tree of this `kind` is; the first where no other claims it."""
    kind = tree.get("kind") if isinstance(tree, Mapping) else None
    claiming = (form for form in forms if kind in get_args(hints_of(form).get("kind")))
    return next(claiming, forms[0])


def _value(hint: Any, value: Any) -> Any:
    """`value` as the type `hint`, or ValueError saying what is allowed."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        number = parse_tokens(value) if "tokens" in arguments else _value(arguments[0], value)
        if Positive in arguments and number <= 0 and not (Rest in arguments and number == -1):
            rest = ", or -1 for the rest of the ranks" if Rest in arguments else ""
            raise ValueError(f"must be above 0{rest}")
        if AboveOne in arguments and number <= 1:
            raise ValueError("must be above 1")
        return number
    if origin in (Union, types.UnionType):
        return None if value is None else _value(arguments[0], value)
    if origin is Literal:
        if value in arguments:
            return value
        hit = nearest(str(value), list(arguments))
        raise ValueError(f"one of {', '.join(arguments)}" + (f". Did you mean {hit}?" if hit else ""))
    if origin is list:
        nested = get_origin(arguments[0]) is list
        if not _is_list(value) or (nested and not all(_is_list(item) for item in value)):
            example = "[[a, b]]" if nested else "[a, b]"
            raise ValueError(f"a list of {_plural(arguments[0])} is needed, such as {example}")
        return [_value(arguments[0], item) for item in value]
    if origin is dict:  # whose values only its owner knows
        if not isinstance(value, Mapping):
            raise ValueError("a group of settings is needed")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        if hint is float and not math.isfinite(value):
            raise ValueError("a finite number is needed")
        return value
    given = next((one for kind, (one, _) in _NAMES.items() if type(value) is kind), "a group or list")
    given = "nothing" if value is None else given
    raise ValueError(f"{_NAMES[hint][0]} is needed, not {given}")


def _plural(hint: Any) -> str:
    if get_origin(hint) is list:
        return f"lists of {_plural(get_args(hint)[0])}"
    return "counts of tokens" if get_origin(hint) else _NAMES[hint][1]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


# One and several values of a type, in a user's words.
_NAMES = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("a text", "texts"),
}


def _unused_axes(parallel: ParallelConfig) -> list[str]:
    if parallel.strategy not in strategies.names():
        return []
    used = strategies.strategy_class(parallel.strategy).axes
    return [axis for axis in parallel.mesh if axis not in used]


def _whole_mesh(parallel: ParallelConfig, launch: LaunchConfig) -> ParallelConfig:
    """With the axis that is -1 filled in from the launch's ranks, so that the run's id names the mesh."""
    open_axes = [axis for axis, ranks in parallel.mesh.items() if ranks == -1]
    if not open_axes:
        return parallel
    axis, key = open_axes[0], f"parallel.{open_axes[0]}=-1"
    if axis in _unused_axes(parallel):
        raise ConfigError(f"{key}: parallel={parallel.strategy} does not use this axis; it must be 1")
    if len(open_axes) > 1:
        raise ConfigError(f"{key} and parallel.{open_axes[1]}=-1: only one axis can be the rest of the ranks")
    if launch.gpus_per_node is None:
        raise ConfigError(f"{key}: the rest of how many ranks? Set launch.gpus_per_node (and launch.nodes)")
    nodes = launch.nodes or 1
    ranks = nodes * launch.gpus_per_node
    others = math.prod(n for other, n in parallel.mesh.items() if other != axis)
    if ranks % others:
        raise ConfigError(
            f"{key}: launch.nodes={nodes} × launch.gpus_per_node={launch.gpus_per_node} = {ranks} "
            f"ranks cannot be divided by the other axes' {others}. Nearest number of ranks: "
            f"{nearest_multiples(ranks, others)}"
        )
    whole: dict[str, Any] = {axis: ranks // others}
    return replace(parallel, **whole)


def parse_tokens(value: object) -> int:
    """A token count: 300000, 300k, 2M, 1.5B. Raises ValueError for anything else."""
    units = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    if isinstance(value, str) and value[-1:] in units:
        try:
            tokens = float(value[:-1]) * units[value[-1]]
        except ValueError:
            tokens = math.nan
        if tokens == tokens and tokens.is_integer():
            value = int(tokens)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e6
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("a count of tokens is needed, such as 300000, 300k, 2M or 1.5B")
    return value


def _show(value: object) -> str:
    return "null" if value is None else str(value)


# --- checks across fields --------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Refuses a config that cannot run. Raises ConfigError with every problem found, numbers included."""
    if unknown := _one_of("optim.name", config.optim.name, optimizers.names()):
        raise ConfigError(*unknown)  # what fits depends on what the optimizer does
    inside = [name for name in optimizers.names() if not optimizers.wraps(name)]
    if optimizers.wraps(config.optim.name) and (unknown := _one_of("optim.base", config.optim.base, inside)):
        raise ConfigError(*unknown)
    batch_problems = _check_batch(config)
    problems = [
        *check_mesh(config),
        *_check_data(config),
        *batch_problems,
        *(
            [] if batch_problems else check_replicas(config)
        ),  # what fits depends on what the schedule measures
        *check_imbalance(config),
        *_check_optimisation(config),
        *_check_tracking(config),
        *_check_launch(config),
    ]
    if problems:
        raise ConfigError(*problems)


def check_mesh(config: Config) -> list[str]:
    """Problems of the model on the mesh, and of the mesh on the machine."""
    model, parallel = config.model, config.parallel
    if isinstance(model, LlamaConfig):
        problems = _check_llama(model, parallel, config.data)
    else:
        problems = _check_classifier(model, parallel)
    return [*problems, *_check_parallel(parallel, config.launch)]


def nearest_multiples(value: int, divisor: int) -> str:
    """The multiples of `divisor` on both sides of `value`, for an error message."""
    below, above = value // divisor * divisor, -(-value // divisor) * divisor
    return f"{above}" if below == 0 else f"{below} or {above}"


def _divides(divisor_key: str, divisor: int, key: str, value: int) -> list[str]:
    if value % divisor == 0:
        return []
    return [
        f"{key}={value}: not divisible by {divisor_key} = {divisor}. "
        f"Nearest {key}: {nearest_multiples(value, divisor)}"
    ]


def _check_llama(model: LlamaConfig, parallel: ParallelConfig, data: DataConfig) -> list[str]:
    # Rotary embeddings turn pairs, so the width of a head is even.
    problems = [
        *_divides("2 × model.heads", 2 * model.heads, "model.width", model.width),
        *_divides("model.kv_heads", model.kv_heads, "model.heads", model.heads),
    ]
    if parallel.tensor > 1:
        divided = {f"model.{key}": getattr(model, key) for key in ("heads", "kv_heads", "ffn", "vocab")}
        divided["data.sequence_length"] = data.sequence_length
        tensor = parallel.tensor
        unfit = [p for key, n in divided.items() for p in _divides("parallel.tensor", tensor, key, n)]
        if unfit:
            common = math.gcd(*divided.values())
            largest = max(n for n in range(1, tensor) if common % n == 0)
            unfit.append(
                f"parallel.tensor={tensor}: the nearest that divides all of {', '.join(divided)} is {largest}"
            )
        problems += unfit
    if data.tokenizer == "bytes" and model.vocab < BYTE_VOCABULARY:
        problems.append(
            f"model.vocab={model.vocab}: byte tokens need {BYTE_VOCABULARY} (256 bytes and the end of a "
            f"document). Nearest multiple of 16: 272"
        )
    return problems


def _check_classifier(model: ClassifierConfig, parallel: ParallelConfig) -> list[str]:
    problems = []
    if model.l2 < 0:
        problems.append(f"model.l2={model.l2}: must not be negative")
    if model.l2 and model.loss == "auc":
        problems.append(
            f"model.l2={model.l2}: would also pull the saddle point's own parameters of model.loss=auc. Use "
            f"model.l2=0"
        )
    if any(width <= 0 for width in model.widths):
        problems.append(f"model.widths={model.widths}: each must be above 0")
    if model.kind == "logistic" and model.widths:
        problems.append(f"model.widths={model.widths}: model=logistic has no hidden layers; it must be []")
    if model.kind in _NUMBER_OF_WIDTHS and len(model.widths) != _NUMBER_OF_WIDTHS[model.kind]:
        problems.append(
            f"model.widths={model.widths}: model={model.kind} needs {_NUMBER_OF_WIDTHS[model.kind]} of them"
        )
    if parallel.tensor > 1:
        problems.append(
            f"parallel.tensor={parallel.tensor}: only a language model is split by matrix products. "
            f"Use parallel=ddp or parallel=fsdp with model={model.kind}"
        )
    if parallel.activation_checkpointing:
        problems.append(
            f"parallel.activation_checkpointing=true: only the blocks of a language model are recomputed. "
            f"Use false with model={model.kind}"
        )
    return problems


def _one_of(key: str, value: str, options: Sequence[str]) -> list[str]:
    if value in options:
        return []
    hit = nearest(value, options)
    return [f"{key}={value}: one of {', '.join(options)}" + (f". Did you mean {hit}?" if hit else "")]


def _check_parallel(parallel: ParallelConfig, launch: LaunchConfig) -> list[str]:
    if unknown := _one_of("parallel.strategy", parallel.strategy, strategies.names()):
        return unknown
    used = strategies.strategy_class(parallel.strategy).axes
    problems = [
        f"parallel.{axis}={ranks}: parallel={parallel.strategy} does not use this axis; it must be 1"
        for axis in _unused_axes(parallel)
        if (ranks := parallel.mesh[axis]) != 1
    ]
    if parallel.compile and "tensor" in used:
        problems.append(
            f"parallel.compile=true: not with parallel={parallel.strategy}. torch 2.13 compiles a block of "
            f"DTensors into wrong gradients or fails in the backward pass; use parallel.compile=false"
        )
    mesh = " × ".join(f"{axis} {n}" for axis, n in parallel.mesh.items())
    ranks, nodes, per_node = parallel.world_size, launch.nodes, launch.gpus_per_node
    if nodes and per_node and nodes * per_node != ranks:
        hint = f", or set parallel.{used[-1]}=-1 for all the rest" if used else ""
        problems.append(
            f"parallel: {mesh} = {ranks} ranks, but launch.nodes={nodes} × "
            f"launch.gpus_per_node={per_node} = {nodes * per_node}. Make them equal{hint}"
        )
    elif ranks % (nodes or 1) or (not nodes and per_node and ranks > per_node and ranks % per_node):
        where = f"launch.nodes={nodes}" if nodes else f"nodes of launch.gpus_per_node={per_node}"
        problems.append(
            f"parallel: {mesh} = {ranks} ranks cannot be spread equally over {where}. "
            f"Nearest number of ranks: {nearest_multiples(ranks, nodes or per_node or 1)}"
        )
    return problems


def _check_data(config: Config) -> list[str]:
    data, problems = config.data, []
    labelled = labelled_samples.names()
    if unknown := _one_of("data.source", data.source, [*TEXT_SOURCES, *labelled]):
        return unknown
    if isinstance(config.model, LlamaConfig) != (data.source in TEXT_SOURCES):
        of_text, classifiers = (
            isinstance(config.model, LlamaConfig),
            get_args(hints_of(ClassifierConfig)["kind"]),
        )
        fitting = "data=stdlib or data=text" if of_text else f"data={'|'.join(labelled)}"
        other = f"model={'|'.join(classifiers)}" if of_text else "a language model"
        problems.append(
            f"model={config.model.name} data={data.source}: a language model learns from text, the others "
            f"from labelled samples. Use {fitting} with this model, or {other} with these data"
        )
    elif data.source in labelled:
        if data.sequence_length != 1:
            problems.append(
                f"data.sequence_length={data.sequence_length}: a labelled sample counts as a sequence of one "
                f"token. Nearest: 1"
            )
        problems += labelled_samples.check(data)
    if data.source == "text" and not data.files:
        problems.append("data.files=[]: data=text needs at least one file or glob")
    if not 0 < data.validation_fraction < 1:
        problems.append(f"data.validation_fraction={data.validation_fraction}: must lie between 0 and 1")
    return problems


def _check_batch(config: Config) -> list[str]:
    batch, ranks, micro = config.batch, config.parallel.data_ranks, config.data.micro_batch
    unit, problems = config.batch_unit, []
    if batch.round_to:
        problems += _divides("ranks × data.micro_batch", unit, "batch.round_to", batch.round_to)
    if not 0 <= batch.ema < 1:
        problems.append(f"batch.ema={batch.ema}: must be at least 0 and below 1")
    if unknown := _one_of("batch.schedule", batch.schedule, batch_schedules.names()):
        return problems + unknown
    schedule = batch_schedules.schedule_class(batch.schedule)
    if "size" in schedule.settings and batch.size < unit:
        problems.append(
            f"batch.size={batch.size}: smaller than one micro-batch on every rank (ranks {ranks} × "
            f"data.micro_batch={micro} = {unit}). Nearest batch.size: {unit}"
        )
    problems += schedule.check(config)
    if not problems and config.trained_sequences < (first := schedule(config).start()[1].size):
        length = config.data.sequence_length
        budget, branch = config.budget, config.branch
        key = "budget.tokens" if budget.stop_tokens is None else "budget.stop_tokens"
        after = f" after branch.tokens={branch.tokens}" if branch.tokens else ""
        problems.append(
            f"{key}={budget.stop_tokens or budget.tokens}: less than one batch{after} (the first is {first} "
            f"sequences × data.sequence_length={length} = {first * length} tokens)"
        )
    return problems


def check_replicas(config: Config) -> list[str]:
    """Problems of the way to agree, with whatever it must go together."""
    sync, parallel, batch = config.sync, config.parallel, config.batch
    if unknown := _one_of("sync.method", sync.method, sync_methods.names()):
        return unknown
    problems = [
        f"sync.{key}={value}: must not be negative"
        for key, value in (("warm_steps", sync.warm_steps), ("grace_ms", sync.grace_ms))
        if value < 0
    ]
    method = sync_methods.method_class(sync.method)
    if not method.replicas:
        return problems
    if config.branch.run:
        problems.append(
            f"branch.run={config.branch.run} sync={sync.method}: only one model can be branched off, of "
            f"a run with sync=allreduce and with it. Use branch.run=null branch.tokens=0"
        )
    if config.lr.batch_scaling == "adascale":
        problems.append(
            f"lr.batch_scaling=adascale: needs gradients compared in every step, which sync={sync.method} "
            f"does not do. Use sync=allreduce or another lr.batch_scaling"
        )
    if optimizers.one_model(config.optim):
        problems.append(
            f"optim={config.optim.name} sync={sync.method}: it evaluates one model of all ranks again, or "
            f"averages it, and replicas are models of their own. Use sync=allreduce or another optim"
        )
    needs = batch_schedules.schedule_class(batch.schedule)(config).needs
    if needs and not method.tests_batches:
        able = [name for name in sync_methods.names() if sync_methods.method_class(name).tests_batches]
        problems.append(
            f"batch={batch.schedule} sync={sync.method}: this method does not compare gradients. Use a "
            f"planned batch or one of sync={', '.join(able)}"
        )
    elif needs and needs.units != "worker":
        by_rank = ["batch.direction=in_sample"] if needs.direction in ("momentum", "previous") else []
        if needs.units == "sample" or not needs.direction:
            by_rank.append("batch.estimator=worker")
        problems.append(
            f"batch={batch.schedule} sync={sync.method}: replicas compare the gradients of their shares, "
            f"not of {'samples' if needs.units == 'sample' else 'micro-batches'}. Use {' '.join(by_rank)}"
        )
    if parallel.strategy != "ddp" or parallel.replicate < 2:
        return [
            *problems,
            f"sync={sync.method}: its replicas are ranks of parallel=ddp, at least 2, not of "
            f"parallel={parallel.strategy} parallel.replicate={parallel.replicate}. Use parallel=ddp and a "
            f"parallel.replicate of at least 2, or sync=allreduce",
        ]
    return problems + method.check(config)


def check_imbalance(config: Config) -> list[str]:
    """Problems of what makes ranks late."""
    imbalance, ranks = config.imbalance, config.parallel.data_ranks
    problems = [
        f"imbalance.{key}={value}: must not be negative"
        for key, value in (("delay_ms", imbalance.delay_ms), ("compute_ms", imbalance.compute_ms))
        if value < 0
    ]
    if imbalance.min_share > 1:
        problems.append(f"imbalance.min_share={imbalance.min_share}: must be at most 1")
    if imbalance.kind == "variable_length" and config.data.sequence_length == 1:
        problems.append(
            "imbalance=variable_length: a sequence of data.sequence_length=1 token has one length. Use "
            "imbalance=delay or imbalance=lognormal"
        )
    elif imbalance.kind == "variable_length" and config.parallel.tensor > 1:
        problems.append(
            f"imbalance=variable_length: parallel.tensor={config.parallel.tensor} ranks share each sequence. "
            f"Use parallel.tensor=1"
        )
    if imbalance.kind == "delay" and imbalance.ranks > ranks:
        problems.append(
            f"imbalance.ranks={imbalance.ranks}: of {ranks} data-parallel ranks. Nearest: {ranks}"
        )
    return problems


def _check_optimisation(config: Config) -> list[str]:
    lr, optim, problems = config.lr, config.optim, []
    if (lr.warmup_tokens is None) == (lr.warmup_steps is None):
        problems.append(
            f"lr.warmup_tokens={_show(lr.warmup_tokens)} lr.warmup_steps={_show(lr.warmup_steps)}: "
            f"set one and leave the other null"
        )
    if lr.warmup_tokens is not None and lr.warmup_tokens > config.budget.tokens:
        problems.append(
            f"lr.warmup_tokens={lr.warmup_tokens}: longer than the run (budget.tokens={config.budget.tokens})"
        )
    if lr.warmup_steps is not None and lr.warmup_steps < 0:
        problems.append(f"lr.warmup_steps={lr.warmup_steps}: must not be negative")
    if not 0 <= lr.min_ratio <= 1:
        problems.append(f"lr.min_ratio={lr.min_ratio}: must lie between 0 and 1")
    if not 0 < lr.decay_fraction <= 1:
        problems.append(f"lr.decay_fraction={lr.decay_fraction}: must be above 0 and at most 1")
    stop = config.budget.stop_tokens
    if stop is not None and stop > config.budget.tokens:
        problems.append(f"budget.stop_tokens={stop}: beyond budget.tokens={config.budget.tokens}")
    if (config.branch.run is None) != (config.branch.tokens == 0):
        problems.append(
            f"branch.run={_show(config.branch.run)} branch.tokens={config.branch.tokens}: a branch needs "
            f"both, the run and the tokens of its checkpoint"
        )
    if not 0 <= optim.momentum < 1:
        problems.append(f"optim.momentum={optim.momentum}: must be at least 0 and below 1")
    if lr.batch_scaling not in (defined := optimizers.batch_scalings(optim)):
        problems.append(
            f"lr.batch_scaling={lr.batch_scaling}: is not defined for optim={optim.name}, which has "
            f"{' and '.join(defined)}"
        )
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        problems.append(f"optim.betas={optim.betas}: two numbers, each at least 0 and below 1")
    if optim.weight_decay < 0:
        problems.append(f"optim.weight_decay={optim.weight_decay}: must not be negative")
    return problems + optimizers.check(config)


def _check_tracking(config: Config) -> list[str]:
    if config.track.exact_gradient and isinstance(config.model, LlamaConfig):
        return [
            f"track.exact_gradient=true model={config.model.name}: the gradient over a whole corpus would "
            f"take longer than the run. Use track.exact_gradient=false, or labelled samples, such as "
            f"model=logistic data=digits"
        ]
    return []


def _check_launch(config: Config) -> list[str]:
    launch, problems = config.launch, []
    if 2 * launch.warning_s > 60 * launch.minutes:
        problems.append(
            f"launch.warning_s={launch.warning_s}: takes more than half of launch.minutes={launch.minutes}. "
            f"Nearest launch.warning_s: {30 * launch.minutes}"
        )
    if launch.pack > 1 and config.nodes > 1:
        problems.append(
            f"launch.pack={launch.pack}: runs share one node, but this one needs {config.nodes}. "
            f"Use launch.pack=1"
        )
    room = (launch.gpus_per_node or 0) // max(1, config.ranks_per_node)
    if 1 <= room < launch.pack:
        problems.append(
            f"launch.pack={launch.pack}: runs of {config.ranks_per_node} ranks on a node of "
            f"launch.gpus_per_node={launch.gpus_per_node}. Nearest launch.pack: {room}"
        )
    if launch.confirm_gpu_hours < 0:
        problems.append(f"launch.confirm_gpu_hours={launch.confirm_gpu_hours}: must not be negative")
    return problems
