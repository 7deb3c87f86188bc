"""⟨g_j, d⟩ of every micro-batch j with a direction d, wherever d's parts lie.

Both ways fill a vector with one product for each unit of the step. Each rank adds what its part of d
contributes, to its own unit or to those of others; a sum over all ranks makes the products whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.gradients.direction import Direction
from pipeline.gradients.exchange import ShardExchange
from pipeline.gradients.norms import inner_products


class LeafProjections:
    """Every rank has the direction as it has the gradient (one process, DDP, TP): a product in each hook.
    Cost: one more read of the gradient, and one of d."""

    whole = None

    def __init__(self, direction: Direction, device: torch.device) -> None:
        self._direction, self._device = direction, device
        self.products = torch.zeros(0, dtype=torch.float64, device=device)

    def start_step(self, units: int) -> None:
        self.products = torch.zeros(units, dtype=torch.float64, device=self._device)
        self._parts = self._direction.parts()

    def start_unit(self, unit: int) -> None:
        self._unit = unit

    def end_unit(self) -> None:
        pass

    def see(self, index: int, gradient: torch.Tensor, share: float) -> None:
        """This rank's gradient of the parameter `index`, of the unit that has started."""
        product = inner_products(gradient.reshape(1, -1), self._parts[index].reshape(-1))
        self.products[self._unit] += product[0] * share


class ShardProjections:
    """Each rank has a shard of the direction (FSDP2, HSDP, with tensor parallel too): the exchange shows it
    that shard of every gradient. Cost: one product of each layer's rows with d; nothing is copied."""

    whole = False  # gradients must be exchanged at every micro-batch

    def __init__(
        self,
        model: nn.Module,
        leaves: dict[str, torch.Tensor],
        direction: Direction,
        shares: Sequence[float],
        device: torch.device,
    ) -> None:
        self._direction, self._shares, self._device = direction, shares, device
        self._exchange = ShardExchange(model, leaves, self._see_rows)
        self.products = torch.zeros(0, dtype=torch.float64, device=device)

    def start_step(self, units: int) -> None:
        self.products = torch.zeros(units, dtype=torch.float64, device=self._device)
        self._parts = self._direction.parts()

    def start_unit(self, unit: int) -> None:
        self._first_unit = unit - self._exchange.position  # of the ranks that exchange with this one
        self._exchange.active = True

    def end_unit(self) -> None:
        self._exchange.active = False

    def see(self, index: int, gradient: torch.Tensor, share: float) -> None:
        pass

    def _see_rows(self, number: int, rows: torch.Tensor) -> None:
        units = slice(self._first_unit, self._first_unit + len(rows))
        layer = self._exchange.layers[number]
        for index, columns in zip(layer.parameters, rows.split(layer.columns, dim=1), strict=True):
            part = self._parts[index].reshape(-1)  # without the padding, which is at the end of the columns
            self.products[units] += inner_products(columns[:, : len(part)], part) * self._shares[index]
