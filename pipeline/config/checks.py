"""Values that fit their types but cannot work together."""

from __future__ import annotations

import math
from typing import get_args

import pipeline.batch as batch_schedules
import pipeline.optim as optimizers
import pipeline.parallel as strategies
import pipeline.samples as labelled_samples
import pipeline.sync as sync_methods
from pipeline.config.errors import ConfigError, nearest_multiples, one_of, shown
from pipeline.config.parsing import hints_of
from pipeline.config.schema import (
    BYTE_VOCABULARY,
    TEXT_SOURCES,
    ClassifierConfig,
    Config,
    DataConfig,
    LaunchConfig,
    LlamaConfig,
    ParallelConfig,
)

_NUMBER_OF_WIDTHS = {"cnn": 2, "resnet18": 4}


def check(config: Config) -> None:
    """Refuses a config that cannot run. Raises ConfigError with every problem found, numbers included."""
    if unknown := _unknown("optim.name", config.optim.name, optimizers.names()):
        raise ConfigError(*unknown)  # what fits depends on what the optimizer does
    inside = [name for name in optimizers.names() if not optimizers.wraps(name)]
    if optimizers.wraps(config.optim.name) and (unknown := _unknown("optim.base", config.optim.base, inside)):
        raise ConfigError(*unknown)
    batch_problems = _check_batch(config)
    problems = [
        *check_mesh(config),
        *_check_data(config),
        *batch_problems,
        # What fits depends on what the schedule measures.
        *([] if batch_problems else check_replicas(config)),
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


def _unknown(key: str, value: str, options: list[str]) -> list[str]:
    return [] if value in options else [f"{key}={value}: {one_of(value, options)}"]


def _check_parallel(parallel: ParallelConfig, launch: LaunchConfig) -> list[str]:
    if unknown := _unknown("parallel.strategy", parallel.strategy, strategies.names()):
        return unknown
    used = strategies.strategy_class(parallel.strategy).axes
    problems = [
        f"parallel.{axis}={ranks}: parallel={parallel.strategy} does not use this axis; it must be 1"
        for axis in parallel.unused_axes()
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
    if unknown := _unknown("data.source", data.source, [*TEXT_SOURCES, *labelled]):
        return unknown
    if isinstance(config.model, LlamaConfig) != (data.source in TEXT_SOURCES):
        of_text = isinstance(config.model, LlamaConfig)
        classifiers = get_args(hints_of(ClassifierConfig)["kind"])
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
    if unknown := _unknown("batch.schedule", batch.schedule, batch_schedules.names()):
        return problems + unknown
    schedule = batch_schedules.schedule_class(batch.schedule)
    if "size" in schedule.settings and batch.size < unit:
        problems.append(
            f"batch.size={batch.size}: smaller than one micro-batch on every rank (ranks {ranks} × "
            f"data.micro_batch={micro} = {unit}). Nearest batch.size: {unit}"
        )
    if "sizes" in schedule.settings and batch.sizes and min(batch.sizes) < unit:
        problems.append(
            f"batch.sizes={batch.sizes}: {min(batch.sizes)} is smaller than one micro-batch on every rank "
            f"({ranks} ranks × data.micro_batch={micro}). Nearest: {unit}"
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
    if unknown := _unknown("sync.method", sync.method, sync_methods.names()):
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
            f"lr.warmup_tokens={shown(lr.warmup_tokens)} lr.warmup_steps={shown(lr.warmup_steps)}: "
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
            f"branch.run={shown(config.branch.run)} branch.tokens={config.branch.tokens}: a branch needs "
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
