"""Units = single samples: exact norms, products with a direction, and variances of coordinates.

Hooks see the inputs a_i of each layer and the gradients δ_i of its outputs; from these follow the sums over
samples that tests need (layers.py), in the ordinary backward pass. Products ⟨g_i, d⟩ are due at the end of
the step, when its own mean gradient is known as well. Layers are linear in their parameters, so a product is
the sum over layers of ⟨δ_i, layer(a_i) with the parameters d⟩, with a_i and δ_i kept until then. A step that
has too many of them keeps the model's inputs alone, and the gradients of its logits: with J_i the Jacobian of
a sample's logits, ⟨∇ℓ_i, d⟩ = ⟨∂ℓ_i/∂logits, J_i d⟩, and one more pass, differentiated forwards, gives J_i d.

The penalty `l2`/2 ‖w‖² in the loss of every sample adds l2·w to every g_i: no variance, and its part of all
sums is known in closed form.

Cost, of ResNet-18 on a CPU: a third of a plain step for norms; as much for products, or a whole step where
layers are not kept.
Memory: at most KEPT_ELEMENTS for products, and a few million elements at a time. With variances of
coordinates: one more copy of the gradient, and its sum over ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.parallel import DistributedDataParallel

from pipeline.gradients.coordinates import SIZE, add_coordinates, coordinates_of
from pipeline.gradients.direction import Direction
from pipeline.gradients.layers import Layer, layers_of
from pipeline.gradients.norms import SquaredNorm, inner_products
from pipeline.gradients.statistics import GradientStatistics, SampleProducts
from pipeline.parallel._ranks import Ranks

KEPT_ELEMENTS = 2**27  # inputs of layers and gradients of their outputs, of one step on a rank: 512 MiB


@dataclass(frozen=True)
class _Unit:
    """What products with the gradients of one micro-batch's samples follow from."""

    inputs: Tensor  # of the model
    deltas: Tensor  # gradients of its outputs
    layers: list[tuple[nn.Module, Tensor, Tensor]]  # the same of all layers; none where there was no room
    scale: float  # what the loss of a sample was multiplied with


class SampleCapture:
    """Σ‖g_i‖² over the samples of one step, Σ⟨g_i, d⟩ and Σ⟨g_i, d⟩², and Σ g_i² of every coordinate."""

    whole = None

    def __init__(
        self,
        model: nn.Module,
        ranks: Ranks,
        l2: float = 0.0,
        direction: Direction | None = None,
        coordinates: bool = False,
        continues: bool = False,
    ) -> None:
        """`continues`: a step may go on after its sums; what products need is kept until the next."""
        assert not (coordinates and continues), "their sums over ranks are not continued"
        self._continues = continues
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._ranks, self._l2, self._direction = ranks, l2, direction
        self._parameters = list(self._model.parameters())
        self._norm = SquaredNorm(self._parameters, 1, ranks.device)
        self._sum_sq_norm = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self._squares: dict[Tensor, Tensor] | None = None  # Σ_i of each coordinate, by parameter
        if coordinates:
            self._squares = {
                parameter: torch.zeros_like(parameter.detach()) for parameter in self._parameters
            }
        self._recording = False  # what goes through the layers
        self._active = False  # a unit's gradients
        self._waiting: set[nn.Module] = set()  # layers that have not seen theirs
        self._of_layers: list[tuple[nn.Module, Tensor, Tensor]] = []  # in this unit
        self._kept: list[_Unit] = []  # of this step, for products
        self._room = 0  # elements of layers that it may still keep
        self._layers = layers_of(self._model)
        for module, layer in self._layers.items():
            module.register_forward_hook(self._seeing(layer))
        self._model.register_forward_hook(self._keep)

    @property
    def saved(self) -> Mapping[str, Tensor]:
        """What a checkpoint must hold of it."""
        return self._direction.saved if self._direction else {}

    # --- in both passes

    def _seeing(self, layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def forward(module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
            if not self._recording:
                return
            own_inputs = inputs[0].detach()

            @torch.no_grad()
            def backward(deltas: Tensor) -> None:
                if self._active:
                    # A layer that is used twice has the sum of two parts as its gradient.
                    assert module in self._waiting, "a layer received two gradients"
                    self._waiting.remove(module)
                    self._add(module, layer, own_inputs, deltas)

            outputs.register_hook(backward)

        return forward

    def _add(self, module: nn.Module, layer: Layer, inputs: Tensor, deltas: Tensor) -> None:
        if self._direction and self._room > 0:
            self._room -= inputs.numel() + deltas.numel()
            self._of_layers.append((module, inputs, deltas))
        if self._squares is None:
            self._sum_sq_norm += layer.sum_sq_norm(inputs, deltas)
            return
        squares = layer.sum_squares(inputs, deltas)
        for parameter, added in zip(module.parameters(recurse=False), squares, strict=True):
            self._squares[parameter] += added

    def _keep(self, model: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        if not (self._recording and self._direction):
            return

        def backward(deltas: Tensor) -> None:
            if self._active:
                self._of_model = inputs[0], deltas

        outputs.register_hook(backward)

    # --- one step

    def start_step(self, counts: Sequence[int]) -> None:
        """`counts`: samples of each micro-batch of the step, over all ranks."""
        self._sum_sq_norm.zero_()
        self._kept.clear()
        self._room = KEPT_ELEMENTS
        for squares in (self._squares or {}).values():
            squares.zero_()
        self._begin(counts)

    def continue_step(self, counts: Sequence[int]) -> None:
        """`counts`: of the whole step, with what it has had."""
        before = self._scale
        self._begin(counts)
        self._sum_sq_norm *= (self._scale / before) ** 2

    def _begin(self, counts: Sequence[int]) -> None:
        self._counts, self._samples = counts, sum(counts)
        # What the loss of a sample is multiplied with.
        self._scale = self._ranks.loss_scale(1, of=self._samples)
        self._recording = True

    @contextlib.contextmanager
    def unit(self, index: int) -> Iterator[None]:
        """Around the backward pass of micro-batch `index` of the step, of its share of the mean loss."""
        # At the end of the budget this rank may have no share in the last micro-batches.
        self._active = index < len(self._counts) and self._counts[index] > 0
        self._waiting, self._of_layers = set(self._layers), []
        try:
            yield
            assert not (self._active and self._waiting), "a layer received no gradient"
            if self._active and self._direction:
                layers = self._of_layers if self._room > 0 else []
                self._kept.append(_Unit(*self._of_model, layers, self._scale))
        finally:
            self._active, self._of_layers = False, []

    @torch.no_grad()
    def sums(self) -> Tensor:
        """This rank's part of what `statistics` needs, float64; to be summed over all ranks. Called when
        `.grad` is complete and before it is clipped."""
        self._recording = False
        parts = [self._whole_sq_norm().view(1)]
        if self._squares is not None:
            parts.append(self._coordinate_sums(self._squares))
        if self._direction:
            parts.append(self._product_sums(self._direction))
            self._direction.step_done()
        if not self._continues:
            self._kept.clear()
        return torch.cat(parts)

    def _whole_sq_norm(self) -> Tensor:
        """Σ‖g_i‖² of this rank's samples."""
        of_losses = self._sum_sq_norm
        if self._squares is not None:
            of_losses = torch.stack([own.sum(dtype=torch.float64) for own in self._squares.values()]).sum()
        of_losses = of_losses / self._scale**2
        if not self._l2:
            return of_losses
        # Σ‖∇ℓ_i + l2 w‖² = Σ‖∇ℓ_i‖² + n (2 l2 ⟨g, w⟩ − l2² ‖w‖²), once over all ranks
        means = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        product, squared = self._product(self._parameters, means), self._norm(self._parameters)
        gained = 2 * self._l2 * product - self._l2**2 * squared
        return of_losses + self._samples / self._ranks.world_size * gained

    def _product(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        """⟨·, ·⟩ of two vectors like the model's parameters: float64 scalar."""
        pairs = zip(ours, theirs, strict=True)
        return torch.cat([inner_products(a.reshape(1, -1), b.reshape(-1)) for a, b in pairs]).sum()

    def _product_sums(self, direction: Direction) -> Tensor:
        """‖d‖², Σ⟨g_i, d⟩ and Σ⟨g_i, d⟩²; all 0 while there is no direction."""
        if not direction.known:
            return torch.zeros(3, dtype=torch.float64, device=self._ranks.device)
        parts = direction.parts()
        by_parameter = dict(zip(self._parameters, parts, strict=True))
        shift = self._l2 * self._product(self._parameters, parts) if self._l2 else 0.0
        sums = torch.zeros(3, dtype=torch.float64, device=self._ranks.device)
        sums[0] = self._norm(parts) / self._ranks.world_size
        for unit in self._kept:
            of_losses = self._by_layers if unit.layers else self._by_jacobian
            products = of_losses(unit, by_parameter).double() / unit.scale + shift
            sums[1] += products.sum()
            sums[2] += products.square().sum()
        return sums

    def _by_layers(self, unit: _Unit, direction: Mapping[Tensor, Tensor]) -> Tensor:
        """⟨∇ℓ_i, d⟩, scaled as the loss was, [n]."""
        products = torch.zeros(len(unit.inputs), dtype=torch.float64, device=self._ranks.device)
        for module, inputs, deltas in unit.layers:
            own = {name: direction[parameter] for name, parameter in module.named_parameters()}
            products += (functional_call(module, own, (inputs,)) * deltas).flatten(1).sum(1)
        return products

    def _by_jacobian(self, unit: _Unit, direction: Mapping[Tensor, Tensor]) -> Tensor:
        """The same without the layers."""

        def logits(weights: dict[str, Tensor]) -> Tensor:
            outputs: Tensor = functional_call(self._model, weights, (unit.inputs,))
            return outputs

        named = dict(self._model.named_parameters())
        weights = {name: parameter.detach() for name, parameter in named.items()}
        tangents = {name: direction[parameter] for name, parameter in named.items()}
        moved = jvp(logits, (weights,), (tangents,))[1]
        products: Tensor = (unit.deltas * moved).sum(1)
        return products

    def _coordinate_sums(self, squares: Mapping[Tensor, Tensor]) -> Tensor:
        """Of the squares of all ranks, which rank 0 sums."""
        sums = torch.zeros(SIZE, dtype=torch.float64, device=self._ranks.device)
        for parameter, own in squares.items():
            if self._ranks.world_size > 1:
                dist.reduce(own, dst=0)
            if self._ranks.is_main and parameter.grad is not None:
                mean = parameter.grad.flatten().double()
                of_losses = mean - self._l2 * parameter.flatten()  # the mean of what varies
                squares_of_losses = own.flatten().double() / self._scale**2
                variance = (squares_of_losses - self._samples * of_losses**2) / (self._samples - 1)
                add_coordinates(sums, variance.clamp_(min=0), mean, torch.ones_like(variance))
        return sums

    def statistics(self, sums: Sequence[float], mean_sq_norm: float | None) -> GradientStatistics:
        assert mean_sq_norm is not None, "of one model"
        sum_sq_norm, *rest = sums
        coordinates = along = None
        if self._squares is not None:
            coordinates, rest = coordinates_of(rest[:SIZE]), rest[SIZE:]
        if self._direction and rest[0] > 0:
            sq_norm, total, squares = rest
            along = SampleProducts(self._samples, total, squares, sq_norm)
        return GradientStatistics(
            units=self._samples,
            sequences=self._samples,
            sum_weighted_sq_norm=sum_sq_norm,
            sum_sq_norm=sum_sq_norm,
            mean_sq_norm=mean_sq_norm,
            along=along,
            coordinates=coordinates,
        )
