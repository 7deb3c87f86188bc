"""What a model makes of held-out samples."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.config import Config
from pipeline.parallel._ranks import Ranks
from pipeline.parallel._strategy import Strategy
from pipeline.problem import Problem
from pipeline.units import Units


@torch.no_grad()
def evaluated(
    config: Config, problem: Problem, model: nn.Module, strategy: Strategy, units: Units, ranks: Ranks
) -> dict[str, float]:
    """By metric (`val/loss`, …): means over the targets of the first `eval.sequences` held-out sequences, the
    same on all ranks, which all call it."""
    total = min(config.eval.sequences, problem.held_out.sequences_per_epoch)
    sums = torch.zeros(problem.sums, dtype=torch.float64, device=ranks.device)
    for start, count in units.of_shares(0, total, (ranks.data_rank,)):
        with strategy.loss(), strategy.autocast():
            # Also without a share: sharded parameters are gathered by all ranks together.
            batch = problem.tensors(problem.held_out.read(start, max(count, 1)), ranks.device)
            unit_sums = problem.evaluate(model, *batch)
        sums += unit_sums if count else 0
    strategy.release(model)
    totals = torch.tensor(ranks.sum(sums / ranks.tensor_ranks), dtype=torch.float64)
    return problem.metrics(totals, total * config.data.sequence_length)
