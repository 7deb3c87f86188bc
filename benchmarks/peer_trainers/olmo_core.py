"""OLMo-core's Trainer and its Llama."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict as state_dict
from olmo_core.data import DataLoaderBase
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.nn.attention import AttentionBackendName
from olmo_core.nn.feed_forward import FeedForwardConfig
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import AdamWConfig
from olmo_core.train import Duration, TrainerConfig, prepare_training_environment
from olmo_core.train.callbacks import Callback
from olmo_core.train.train_module import (
    TransformerDataParallelConfig,
    TransformerTrainModuleConfig,
)

from benchmarks.peer_trainers._task import Record, Task, renamed

NAMES = {
    "embedding": "embeddings",
    "norm": "lm_head.norm",
    "head": "lm_head.w_out",
    "attention.query": "attention.w_q",
    "attention.key": "attention.w_k",
    "attention.value": "attention.w_v",
    "attention.out": "attention.w_out",
    "ffn.gate": "feed_forward.w1",
    "ffn.down": "feed_forward.w2",
    "ffn.up": "feed_forward.w3",
    "attention_norm": "attention_norm",
    "ffn_norm": "feed_forward_norm",
}


class InOrder(DataLoaderBase):
    def __init__(self, task: Task, rank: int, ranks: int) -> None:
        tokens_of_batch = task.batch * task.sequence_length
        super().__init__(
            work_dir=task.directory, global_batch_size=tokens_of_batch, dp_world_size=ranks, dp_rank=rank
        )
        self._task = task

    @property
    def total_batches(self) -> int:
        return self._task.steps

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    def reshuffle(self, epoch: int | None = None, **_: Any) -> None:
        self._epoch = epoch or 1

    def _iter_batches(self) -> Iterator[dict[str, Any]]:
        for step in range(self._task.steps):
            yield self._batch(step)

    def _batch(self, step: int) -> dict[str, Any]:
        reads = self._task.micro_batches(step, self.dp_rank, self.dp_world_size)
        tokens = torch.cat([torch.from_numpy(read) for read in reads])
        return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}

    def get_mock_batch(self) -> dict[str, Any]:
        return self._batch(0)

    def global_num_tokens_in_batch(self, batch: dict[str, Any]) -> int:
        return self.global_batch_size


@dataclass
class Rows(Callback):
    record: Record | None = None

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        if self.record and "train/CE loss" in metrics:
            self.record.write(step, metrics["train/CE loss"])


def main() -> None:
    task = Task.of_command_line()
    shape, ranks = task.shape, 1 if task.layout == "single" else 2
    prepare_training_environment(backend="gloo" if ranks > 1 else None, shared_filesystem=True)
    rank = int(os.environ.get("RANK", 0))
    model = TransformerConfig.llama_like(
        d_model=shape.width,
        vocab_size=shape.vocab,
        n_layers=shape.layers,
        n_heads=shape.heads,
        n_kv_heads=shape.kv_heads,
        layer_norm_eps=shape.norm_eps,
        rope_theta=int(shape.rope_theta),
        feed_forward=FeedForwardConfig(hidden_size=shape.ffn, bias=False),
        attn_backend=AttentionBackendName.torch,
    ).build(init_device="cpu")
    data_parallel = None
    if ranks > 1:
        data_parallel = TransformerDataParallelConfig(name=DataParallelType(task.layout))
    module = TransformerTrainModuleConfig(
        rank_microbatch_size=task.micro_batch * task.sequence_length,
        max_sequence_length=task.sequence_length,
        optim=AdamWConfig(
            lr=task.lr, betas=task.betas, eps=task.eps, weight_decay=task.weight_decay, fused=True
        ),
        compile_model=False,
        dp_config=data_parallel,
        max_grad_norm=task.clip,
    ).build(model)
    weights = {
        renamed(name, NAMES, "blocks"): torch.from_numpy(value) for name, value in task.parameters().items()
    }
    whole = state_dict.StateDictOptions(full_state_dict=True)  # also where parameters are sharded
    state_dict.set_model_state_dict(module.model, weights, options=whole)
    TrainerConfig(
        save_folder=f"{task.directory}/checkpoints",
        work_dir=task.directory,
        max_duration=Duration.steps(task.steps),
        metrics_collect_interval=1,
        no_checkpoints=True,
        no_evals=True,
        callbacks={"rows": Rows(Record(task) if rank == 0 else None)},
    ).build(module, InOrder(task, rank, ranks)).fit()


if __name__ == "__main__":
    main()
