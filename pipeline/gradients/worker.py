"""Units = data-parallel ranks: the gradient that each has accumulated over the step, before the average.

All of it follows from the exchange (exchange.py): norms, all inner products, variances of coordinates. Cost:
the bytes of the reduction that it replaces (and once more between replicas, under HSDP), J slices of memory,
and J²·n multiplications; gradients stay whole on each rank until the last micro-batch of a measured step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.gradients.coordinates import SIZE, add_coordinates, coordinates_of
from pipeline.gradients.dtensor import is_fully_sharded, mesh_axis, shares
from pipeline.gradients.exchange import (
    BucketExchange,
    Layer,
    ReplicaExchange,
    ShardExchange,
    exchange,
    padded,
)
from pipeline.gradients.leaves import leaves
from pipeline.gradients.statistics import GradientStatistics, WorkerProducts
from pipeline.parallel._ranks import Ranks

COLUMNS = 2**18  # of the rows that are worked on at a time
PRODUCT_COLUMNS = 2**12  # of one inner product in float32: the variance is a difference of such sums


class WorkerCapture:
    """The Gram matrix of the ranks' gradients in one step and, if asked, variances of coordinates."""

    whole = True
    saved: Mapping[str, torch.Tensor] = {}

    def __init__(self, model: nn.Module, ranks: Ranks, coordinates: bool = False) -> None:
        self._ranks = ranks
        self._replicas: dist.ProcessGroup | None = None  # to fetch the rows of other replicas from
        self._column_shares: list[torch.Tensor | None] = []
        self._exchange: BucketExchange | ReplicaExchange | ShardExchange
        if isinstance(model, DistributedDataParallel):
            self._exchange = BucketExchange(model, self._see)
        elif not is_fully_sharded(model):
            self._exchange = ReplicaExchange(model.parameters(), self._see)
        else:
            replica_axis = mesh_axis(next(model.parameters()), "replicate")
            if replica_axis and replica_axis.size() > 1:
                self._replicas = replica_axis.get_group()
            by_name = leaves(model)
            of_leaves = shares(by_name.values(), ranks.tensor_ranks)
            self._exchange = ShardExchange(model, by_name, self._see_layer)
            self._column_shares = [self._shares_of(layer, of_leaves) for layer in self._exchange.layers]
        count = ranks.data_ranks
        self._gram = torch.zeros(count, count, dtype=torch.float64, device=ranks.device)
        self._coordinates: torch.Tensor | None = None
        if coordinates:
            self._coordinates = torch.zeros(SIZE, dtype=torch.float64, device=ranks.device)

    def _shares_of(self, layer: Layer, of_leaves: list[float]) -> torch.Tensor | None:
        """What each column counts for: tensor-parallel ranks have copies of some. None: all for 1."""
        if self._ranks.tensor_ranks == 1:
            return None
        by_parameter = torch.tensor([of_leaves[index] for index in layer.parameters])
        return by_parameter.repeat_interleave(torch.tensor(layer.columns)).to(self._ranks.device)

    # --- in the backward pass

    def _see_layer(self, layer: int, rows: torch.Tensor) -> None:
        column_shares = self._column_shares[layer]
        if self._replicas is None:
            self._see(rows, column_shares)
            return
        # Each replica takes a part of the columns and gets them from all others: [replicas, shards, part].
        replicas = self._replicas.size()
        wide = padded(rows, replicas)
        mine = wide.view(len(rows), replicas, -1).transpose(0, 1).contiguous()
        parts = exchange(mine.view(-1), self._replicas)
        if column_shares is not None:
            column_shares = padded(column_shares, replicas).view(replicas, -1)[self._replicas.rank()]
        self._see(parts.view(replicas * len(rows), -1), column_shares)

    @torch.no_grad()
    def _see(self, rows: torch.Tensor, column_shares: torch.Tensor | None = None) -> None:
        """The same coordinates of every worker's accumulated gradient, [J, columns]."""
        for start in range(0, rows.shape[1], COLUMNS):
            part = slice(start, start + COLUMNS)
            gradients = rows[:, part] / self._scales
            counted = None if column_shares is None else column_shares[part]
            self._gram += gram_matrix(gradients, counted)
            if self._coordinates is not None:
                self._add_coordinates(gradients, counted)

    def _add_coordinates(self, gradients: torch.Tensor, column_shares: torch.Tensor | None) -> None:
        assert self._coordinates is not None
        mean = self._weights @ gradients / self._weights.sum()
        variance = self._weights @ (gradients - mean).square_() / (len(gradients) - 1)
        count = torch.ones_like(mean) if column_shares is None else column_shares
        add_coordinates(self._coordinates, variance, mean, count)

    # --- one step

    def start_step(self, counts: Sequence[int]) -> None:
        """`counts`: sequences of each micro-batch of the step, over all ranks."""
        ranks = self._ranks.data_ranks
        self._sequences = tuple(sum(counts[rank::ranks]) for rank in range(ranks))
        assert min(self._sequences) > 0, "a rank without sequences has no gradient to compare"
        self._step_sequences = sum(counts)
        self._weights = torch.tensor(self._sequences, dtype=torch.float32, device=self._ranks.device)
        scales = [self._ranks.loss_scale(count, of=self._step_sequences) for count in self._sequences]
        self._scales = torch.tensor(scales, device=self._ranks.device).view(-1, 1)
        self._gram.zero_()
        if self._coordinates is not None:
            self._coordinates.zero_()
        self._exchange.active = True

    def continue_step(self, counts: Sequence[int]) -> None:
        raise NotImplementedError("what ranks have accumulated is averaged by now")

    def unit(self, index: int) -> contextlib.AbstractContextManager[None]:
        """Around the backward pass of micro-batch `index` of the step, of its share of the mean loss."""
        return contextlib.nullcontext()

    def sums(self) -> torch.Tensor:
        """This rank's part of what `statistics` needs, float64; to be summed over all ranks."""
        if isinstance(self._exchange, ReplicaExchange):
            self._exchange.show()
        self._exchange.active = False
        parts = [self._gram.flatten()]
        if self._coordinates is not None:
            parts.append(self._coordinates)
        return torch.cat(parts)

    def statistics(self, sums: Sequence[float], mean_sq_norm: float | None) -> GradientStatistics:
        count = len(self._sequences)
        gram = np.array(sums[: count**2]).reshape(count, count)
        coordinates = None
        if self._coordinates is not None:
            coordinates = coordinates_of(sums[count**2 :], count)
        workers = WorkerProducts(self._sequences, gram)
        return GradientStatistics(
            units=count,
            sequences=self._step_sequences,
            sum_weighted_sq_norm=float(np.array(self._sequences) @ np.diag(gram)),
            sum_sq_norm=float(np.trace(gram)),
            mean_sq_norm=workers.mean_sq_norm if mean_sq_norm is None else mean_sq_norm,
            workers=workers,
            coordinates=coordinates,
        )


def gram_matrix(rows: torch.Tensor, column_shares: torch.Tensor | None) -> torch.Tensor:
    """The Gram matrix of rows [J, columns], each column counted by its share: float64 [J, J]."""
    parts = padded(rows, PRODUCT_COLUMNS).view(len(rows), -1, PRODUCT_COLUMNS).transpose(0, 1)
    weighted = parts
    if column_shares is not None:
        weighted = parts * padded(column_shares, PRODUCT_COLUMNS).view(-1, 1, PRODUCT_COLUMNS)
    return torch.bmm(weighted, parts.mT).sum(0, dtype=torch.float64)
