"""Optimizers made of others, with one state and one list of groups: a checkpoint sees one optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch

from pipeline.optim._evaluation import Evaluating, Evaluation


class Composite(Evaluating):
    """Several optimizers of different parameters that step one after the other."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            self.state.update(part.state)
        self._parts = parts

    def step(self, closure: Evaluation | None = None) -> None:
        groups = iter(self.param_groups)
        for part in self._parts:
            # Reading a checkpoint has put others in the place of both.
            part.param_groups = list(islice(groups, len(part.param_groups)))
            part.state = self.state
            if isinstance(part, Evaluating):
                part.step(closure)
            else:
                part.step()
