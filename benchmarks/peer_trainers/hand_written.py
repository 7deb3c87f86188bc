"""A loop in one file, as nanoGPT's train.py, on a Llama in one file."""

from __future__ import annotations

import contextlib
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peer_trainers._llama import Llama
from benchmarks.peer_trainers._task import Record, Task


def main() -> None:
    task = Task.of_command_line()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        dist.init_process_group("gloo")
    llama = Llama(task.shape, task.sequence_length)
    llama.load_state_dict({name: torch.from_numpy(value) for name, value in task.parameters().items()})
    model: nn.Module = llama
    if task.layout == "ddp":
        model = DistributedDataParallel(llama, gradient_as_bucket_view=True)
    if task.layout == "fsdp":
        for block in llama.blocks:
            fully_shard(block)
        fully_shard(llama)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=task.lr,
        betas=task.betas,
        eps=task.eps,
        weight_decay=task.weight_decay,
        fused=True,
    )
    record = Record(task)
    accumulation = task.batch // (task.micro_batch * ranks)
    for step in range(task.steps):
        total = torch.zeros(())
        for index, read in enumerate(task.micro_batches(step, rank, ranks)):
            tokens, last = torch.from_numpy(read), index + 1 == accumulation
            if task.layout == "fsdp":
                model.set_is_last_backward(last)
            waits = task.layout == "ddp" and not last
            with model.no_sync() if waits else contextlib.nullcontext():
                loss = model(tokens[:, :-1], tokens[:, 1:]) / accumulation
                loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record.write(step + 1, total.item())


if __name__ == "__main__":
    main()
