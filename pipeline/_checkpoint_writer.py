"""How tensors are written. Apart from checkpoint.py, which imports torch.distributed.checkpoint only when it
saves or loads."""

from __future__ import annotations

from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner


class Writer(dcp.FileSystemWriter):
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # When a disk is full, torch's archive writer complains of what this did to its bookkeeping.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
