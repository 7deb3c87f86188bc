"""Lightning Fabric around the same Llama in one file."""

from __future__ import annotations

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

from benchmarks.peer_trainers._llama import Llama
from benchmarks.peer_trainers._task import Record, Task


def sharded(model: nn.Module, mesh: object) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


def main() -> None:
    task = Task.of_command_line()
    strategies = {
        "single": lambda: "auto",
        "ddp": lambda: DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True),
        "fsdp": lambda: ModelParallelStrategy(
            sharded, data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
        ),
    }
    devices = 1 if task.layout == "single" else 2
    fabric = Fabric(
        accelerator="cpu", strategy=strategies[task.layout](), devices=devices, precision="32-true"
    )
    fabric.launch()
    llama = Llama(task.shape, task.sequence_length)
    llama.load_state_dict({name: torch.from_numpy(value) for name, value in task.parameters().items()})
    model = fabric.setup_module(llama)
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(
            model.parameters(),
            lr=task.lr,
            betas=task.betas,
            eps=task.eps,
            weight_decay=task.weight_decay,
            fused=True,
        )
    )
    record = Record(task)
    accumulation = task.batch // (task.micro_batch * fabric.world_size)
    for step in range(task.steps):
        total = torch.zeros(())
        for index, read in enumerate(task.micro_batches(step, fabric.global_rank, fabric.world_size)):
            tokens, last = torch.from_numpy(read), index + 1 == accumulation
            with fabric.no_backward_sync(model, enabled=not last and task.layout == "ddp"):
                loss = model(tokens[:, :-1], tokens[:, 1:]) / accumulation
                fabric.backward(loss)
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record.write(step + 1, total.item())


if __name__ == "__main__":
    main()
