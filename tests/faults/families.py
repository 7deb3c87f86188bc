"""All families, by import; and what a fault's process would otherwise import itself, for seconds."""

import torch._dynamo  # noqa: F401  # an optimizer's first step does

import pipeline.train  # noqa: F401
from tests.faults import (  # noqa: F401
    checkpoints,
    clocks,
    disks,
    files,
    killed,
    malice,
    numbers,
    requests,
    stopped,
    wandb_answers,
)
