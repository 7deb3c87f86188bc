"""Units = micro-batches: a hook on each autograd leaf sees one rank's gradient of one micro-batch.

It runs before the gradient is accumulated, averaged over ranks or divided, under every strategy. Cost: one
read of each gradient, and one float32 number per matrix row. With tensor parallel alone also one all-reduce
a step, of the norm weights' gradients of each micro-batch, (2·layers + 1)·width elements: each rank has the
part of its tokens, and parts of a vector do not tell its norm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from pipeline.gradients.direction import Direction
from pipeline.gradients.dtensor import is_partial, is_spread, local, mesh_axis, shares
from pipeline.gradients.leaves import leaves
from pipeline.gradients.norms import SquaredNorm, write_row_norms
from pipeline.gradients.projections import LeafProjections, ShardProjections
from pipeline.gradients.statistics import GradientStatistics, Projections
from pipeline.parallel._ranks import Ranks


class MicrobatchCapture:
    """Sums Σ n_j‖g_j‖² and Σ‖g_j‖² over micro-batches of one optimizer step, and products with a direction.

    `limit`: only the first so many micro-batches of a step are measured, whichever rank has them.
    """

    def __init__(
        self, model: nn.Module, ranks: Ranks, limit: int | None = None, direction: Direction | None = None
    ) -> None:
        by_name = leaves(model)
        self._leaves = list(by_name.values())
        # Ranks that share matrix products hold parts of a leaf's gradient, or all the whole.
        self._shares = shares(self._leaves, ranks.tensor_ranks)
        self._ranks, self._limit = ranks, limit
        self._norm = SquaredNorm(self._leaves, ranks.tensor_ranks, ranks.device)
        self._seen = [False] * len(self._leaves)
        self._partial: list[torch.Tensor] = []  # gradients of this unit whose sum over ranks is still open
        self._open: list[tuple[int, torch.Tensor]] = []  # the same of each unit of the step, flat
        self._active = False
        self._counts: Sequence[int] = []
        self._projecting: LeafProjections | ShardProjections | None = None  # in this step
        self._sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)

        parameters = list(model.parameters())
        shard_axis, tensor_axis = mesh_axis(parameters[0], "shard"), mesh_axis(parameters[0], "tensor")
        self._sums_partial_here = shard_axis is None  # FSDP2 needs them summed at once
        self._tensor_group = tensor_axis.get_group() if tensor_axis else None
        self._direction = direction
        self._projections: LeafProjections | ShardProjections | None = None
        if direction:
            if shard_axis and shard_axis.size() > 1:
                self._projections = ShardProjections(model, by_name, direction, self._shares, ranks.device)
            else:
                self._projections = LeafProjections(direction, ranks.device)
            self._direction_norm = SquaredNorm(parameters, ranks.world_size, ranks.device)
        for index, leaf in enumerate(self._leaves):
            leaf.register_hook(self._hook(index, leaf))

    @property
    def saved(self) -> Mapping[str, torch.Tensor]:
        """What a checkpoint must hold of it."""
        return self._direction.saved if self._direction else {}

    @property
    def whole(self) -> bool | None:
        """Whether ranks must keep their gradients whole until the step's last micro-batch, or must not."""
        return self._projecting.whole if self._projecting else None

    # --- in the backward pass

    def _hook(self, index: int, leaf: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor | None]:
        layout = leaf.placements if is_spread(leaf) else None

        def see(gradient: torch.Tensor) -> torch.Tensor | None:
            if not self._active:
                return None
            # Two gradients of one leaf in one backward pass would each be a part of it.
            assert not self._seen[index], "a parameter received two partial gradients"
            self._seen[index] = True
            if is_partial(gradient) and self._sums_partial_here:
                own = local(gradient.detach())
                self._partial.append(own)
                if self._projecting:
                    self._projecting.see(index, own, 1.0)  # a product is linear: its parts add up
                return None
            if not is_spread(gradient) or gradient.placements == layout:
                self._see(index, gradient)
                return None
            gradient = gradient.redistribute(placements=layout)
            self._see(index, gradient)
            return gradient  # FSDP2 would redistribute it again

        return see

    def _see(self, index: int, gradient: torch.Tensor) -> None:
        own = local(gradient.detach())
        write_row_norms(own, self._norm.rows[index])
        if self._projecting:
            self._projecting.see(index, own, self._shares[index])

    # --- one step

    def start_step(self, counts: Sequence[int]) -> None:
        """`counts`: sequences of each micro-batch of the step, over all ranks."""
        self._sums.zero_()
        self.continue_step(counts)
        known = self._direction is not None and self._direction.known
        self._projecting = self._projections if known else None
        if self._projecting:
            self._projecting.start_step(-(-len(counts) // self._ranks.data_ranks) * self._ranks.data_ranks)

    def continue_step(self, counts: Sequence[int]) -> None:
        """`counts`: of the whole step, with what it has had. Sums are of gradients without their scale. (Of
        products with a direction none are continued.)"""
        self._counts = counts[: self._limit]
        self._step_sequences = sum(counts)

    @contextlib.contextmanager
    def unit(self, index: int) -> Iterator[None]:
        """Around the backward pass of micro-batch `index` of the step, of its share of the mean loss."""
        first_of_round = index - self._ranks.data_rank
        projecting = self._projecting if first_of_round < len(self._counts) else None
        if projecting:  # on all ranks alike: the exchange takes all of them
            projecting.start_unit(index)
        # At the end of the budget this rank may have no share in the last micro-batches.
        self._active = index < len(self._counts) and self._counts[index] > 0
        try:
            yield
            if self._active:
                self._add(index)
        finally:
            self._active = False
            if projecting:
                projecting.end_unit()

    def _add(self, index: int) -> None:
        assert all(self._seen), "a parameter received no gradient"
        self._seen = [False] * len(self._seen)
        if self._partial:
            self._open.append((index, torch.cat([part.flatten() for part in self._partial])))
            self._partial.clear()
        self._add_squared(index, self._norm.total())

    def _add_squared(self, index: int, squared: torch.Tensor) -> None:
        squared = squared / self._scale(index) ** 2
        self._sums += torch.stack([self._counts[index] * squared, squared])

    def _close_sums(self) -> None:
        """Completes over tensor-parallel ranks what was left open, of all units at once."""
        if not self._open:
            return
        whole = torch.stack([parts for _, parts in self._open])
        dist.all_reduce(whole, group=self._tensor_group)
        for (index, _), gradient in zip(self._open, whole, strict=True):
            self._add_squared(index, gradient.double().square().sum() / self._ranks.tensor_ranks)
        self._open.clear()

    def _scale(self, index: int) -> float:
        """What the mean loss of a micro-batch was multiplied with."""
        return self._ranks.loss_scale(self._counts[index], of=self._step_sequences)

    def sums(self) -> torch.Tensor:
        """This rank's part of what `statistics` needs, float64; to be summed over all ranks. Called when
        `.grad` is complete and before it is clipped."""
        self._close_sums()
        parts = [self._sums]
        if self._projecting and self._direction:
            parts += [self._direction_norm(self._direction.parts()).view(1), self._projecting.products]
        if self._direction:
            self._direction.step_done()
        return torch.cat(parts)

    def statistics(self, sums: Sequence[float], mean_sq_norm: float | None) -> GradientStatistics:
        assert mean_sq_norm is not None, "of one model"
        measured = [(i, count) for i, count in enumerate(self._counts) if count]
        along = None
        if self._projecting and sums[2] > 0:
            sq_norm, *products = sums[2:]
            along = Projections(
                sequences=tuple(count for _, count in measured),
                products=tuple(products[i] / self._scale(i) for i, _ in measured),
                sq_norm=sq_norm,
            )
        return GradientStatistics(
            units=len(measured),
            sequences=self._step_sequences,
            measured_sequences=sum(self._counts),
            sum_weighted_sq_norm=sums[0],
            sum_sq_norm=sums[1],
            mean_sq_norm=mean_sq_norm,
            along=along,
        )
