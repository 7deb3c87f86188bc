"""Every mesh that tests run on, by name, as Hydra overrides: all strategies, with and without each axis."""

MESHES = {
    "single": ["parallel=single"],
    "ddp2": ["parallel=ddp"],
    "ddp4": ["parallel=ddp", "parallel.replicate=4"],
    "fsdp1": ["parallel=fsdp", "parallel.shard=1"],
    "fsdp2": ["parallel=fsdp"],
    "fsdp2 whole gradients": ["parallel=fsdp", "parallel.shard_gradients=false"],
    "fsdp3": ["parallel=fsdp", "parallel.shard=3"],  # shards of unequal size, and padding
    "fsdp4": ["parallel=fsdp", "parallel.shard=4"],
    "hsdp2x2": ["parallel=hsdp"],
    "hsdp2x1": ["parallel=hsdp", "parallel.shard=1"],
    "tp1": ["parallel=tp", "parallel.tensor=1"],
    "tp2": ["parallel=tp"],
    "fsdp2 x tp2": ["parallel=fsdp_tp"],
    "replicas2 x tp2": ["parallel=fsdp_tp", "parallel.replicate=2", "parallel.shard=1"],
}
