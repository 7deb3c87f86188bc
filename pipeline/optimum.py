"""The least value of the objective of a convex problem, F*: `exact/gap` is what a run lies above it.

Newton's method in float64: the exact Hessian while it is small, else conjugate gradients on its products.
With the h of a proximal optimizer, of F + h, by accelerated proximal gradients. A value is found once for a
problem and kept in home()/optima/<key>.json.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import samples
from pipeline.config import ClassifierConfig, Config, OptimConfig
from pipeline.data.fingerprint import fingerprint
from pipeline.identity import identity_fields
from pipeline.optim._proximal import penalty, proximal
from pipeline.store import home, write_atomically

VERSION = 1  # raise it when the same key begins to mean another value
TOLERANCE = 1e-10  # of ‖∇F‖, relative to its value at w = 0
SETTLED = 1e-3  # a Newton step at a minimum changes no logit by more than this …
RECEDING = 0.5  # … and one towards a minimum at infinity changes some logit by about 1, for ever
MOST_STEPS = 200
MOST_PROXIMAL_STEPS = 100_000
WHOLE_HESSIAN = 2_000  # parameters
MOST_NUMBERS = 2**28  # of the inputs, which are held in float64: 2 GiB

SEPARABLE = "the training samples can be separated, so that no finite weights minimise it. Use model.l2"

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Minimum:
    """`loss`: F*, over the training samples, with model.l2. None where there is none, and `why`."""

    loss: float | None
    why: str = ""
    relative_gradient: float | None = None  # ‖∇F‖ there over ‖∇F(0)‖
    steps: int = 0


def minimum(config: Config) -> Minimum | None:
    """Of this problem; None where it is not known to be convex. Of several processes that ask at once one
    computes, and the others wait."""
    model = config.model
    if not isinstance(model, ClassifierConfig) or model.kind != "logistic" or model.loss == "auc":
        return None
    path = home() / "optima" / f"{_key(config, model)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(OSError, ValueError, TypeError):  # not there, or damaged: it is found again
            return Minimum(**json.loads(path.read_text(encoding="utf-8")))
        found = _found(config, model)
        write_atomically(path, json.dumps(asdict(found), indent=1) + "\n")
    return found


def _key(config: Config, model: ClassifierConfig) -> str:
    """Of the samples and of the objective, whatever order the samples are read in."""
    order = ("seed", "micro_batch", "distribution", "sequence_length", "fingerprint")
    data = {key: value for key, value in identity_fields(config)["data"].items() if key not in order}
    samples_read = config.data.fingerprint or fingerprint(config.data)
    parts = [VERSION, samples_read, data, model.kind, model.loss, model.l2]
    if (optim := config.optim).regulariser != "none":
        parts += [optim.regulariser, optim.l1, optim.l2, optim.lower, optim.upper]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _found(config: Config, model: ClassifierConfig) -> Minimum:
    split = samples.read(config.data)
    numbers = len(split.train_indices) * int(np.prod(split.train.shape))
    if numbers > MOST_NUMBERS:
        return Minimum(
            None, f"its {numbers:,} inputs are more than the {MOST_NUMBERS:,} that are held at once"
        )
    inputs, labels = split.train.at(split.train_indices)
    classes = split.train.classes if model.loss == "cross_entropy" else 1
    flat = inputs.reshape(len(inputs), -1)
    if config.optim.regulariser != "none":
        return minimise_composite(flat, labels, classes, model.l2, config.optim)
    return minimise(flat, labels, classes, model.l2)


def minimise(inputs: NDArray[Any], labels: NDArray[np.int64], outputs: int, l2: float) -> Minimum:
    """Least (1/n) Σ ℓ(Wx_i + b, y_i) + l2/2 ‖(W, b)‖² of `inputs` [n, d] with `labels` [n].

    `outputs` 1: ℓ is the log loss of two classes, labels 0 and 1; else cross entropy of so many classes.
    Without l2 there may be no minimum: where W and b separate the samples, F goes on falling with their
    length (Albert and Anderson 1984, Biometrika 71). A separating iterate proves that; where only some
    samples can be separated, it shows in Newton steps that do not get shorter.
    """
    problem = _Logistic(inputs, labels, outputs, l2)
    weights = np.zeros((problem.inputs.shape[1], outputs))
    loss, gradient = problem.loss(weights), problem.gradient(weights)
    first = relative = float(np.linalg.norm(gradient)) or 1.0
    for steps in range(MOST_STEPS):
        relative = float(np.linalg.norm(gradient)) / first
        step = problem.newton_step(weights, gradient, relative)
        reach = problem.reach(step)
        if relative <= TOLERANCE and reach <= SETTLED:
            return Minimum(min(loss, problem.loss(weights + step)), "", relative, steps)
        if not l2 and (problem.separated(weights) or (relative <= TOLERANCE and reach >= RECEDING)):
            return Minimum(None, SEPARABLE)
        weights, loss = problem.descend(weights, step, loss, gradient)
        gradient = problem.gradient(weights)
    return Minimum(None, f"it was not found in {MOST_STEPS} Newton steps", relative, MOST_STEPS)


def minimise_composite(
    inputs: NDArray[Any], labels: NDArray[np.int64], outputs: int, l2: float, regularised: OptimConfig
) -> Minimum:
    """The same with the h of `optim.regulariser`, which is of W alone: FISTA (Beck and Teboulle 2009) with
    steps of 1/L, whose momentum begins anew where it points uphill (O'Donoghue and Candès 2015). It ends
    where the gradient mapping L(y − prox(y − ∇F(y)/L)) is small; `relative_gradient` is of that."""
    problem = _Logistic(inputs, labels, outputs, l2)
    operator, value = proximal(regularised), penalty(regularised)
    lipschitz = problem.lipschitz()

    def moved(y: Array) -> Array:
        stepped = y - problem.gradient(y) / lipschitz
        weights = operator(torch.from_numpy(stepped[:-1]), 1 / lipschitz).numpy()
        return np.concatenate([weights, stepped[-1:]])

    def objective(x: Array) -> float:
        return problem.loss(x) + value(torch.from_numpy(x[:-1])).item()

    x = y = moved(np.zeros((problem.inputs.shape[1], outputs)))
    momentum, first, relative = 1.0, 0.0, 1.0
    for steps in range(MOST_PROXIMAL_STEPS):
        after = moved(y)
        mapping = float(np.linalg.norm(y - after))
        first = first or mapping or 1.0
        if (relative := mapping / first) <= TOLERANCE:
            return Minimum(min(objective(x), objective(after)), "", relative, steps)
        if ((y - after) * (after - x)).sum() > 0:
            momentum = 1.0
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        x, y, momentum = after, after + (momentum - 1) / following * (after - x), following
    why = f"it was not found in {MOST_PROXIMAL_STEPS:,} proximal steps; without model.l2 there may be none"
    return Minimum(None, why, relative, MOST_PROXIMAL_STEPS)


class _Logistic:
    """Weights are [d + 1, outputs]; the last row is the bias."""

    def __init__(self, inputs: NDArray[Any], labels: NDArray[np.int64], outputs: int, l2: float) -> None:
        self.inputs: Array = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1, dtype=np.float64)
        self.labels, self.l2, self.binary = labels, l2, outputs == 1
        positive = np.array([1]) if self.binary else np.arange(outputs)
        self.targets: Array = (labels[:, None] == positive).astype(np.float64)  # [n, outputs]

    def loss(self, weights: Array) -> float:
        logits = self.inputs @ weights
        if self.binary:
            each = np.logaddexp(0, logits) - self.targets * logits
        else:
            each = np.logaddexp.reduce(logits, axis=1) - (self.targets * logits).sum(1)
        return float(each.mean() + self.l2 / 2 * np.square(weights).sum())

    def probabilities(self, weights: Array) -> Array:
        logits = self.inputs @ weights
        if self.binary:
            return np.exp(-np.logaddexp(0, -logits))
        return np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))

    def gradient(self, weights: Array) -> Array:
        residuals = (self.probabilities(weights) - self.targets) / len(self.inputs)
        found: Array = self.inputs.T @ residuals + self.l2 * weights
        return found

    def lipschitz(self) -> float:
        """Of ∇F: no curvature of the log loss is above 1/4, and none of cross entropy above 1/2."""
        n, width = self.inputs.shape
        gram = self.inputs.T @ self.inputs if width <= n else self.inputs @ self.inputs.T
        largest = float(np.linalg.eigvalsh(gram)[-1])
        bound: float = largest * (0.25 if self.binary else 0.5) / n + self.l2
        return bound

    def separated(self, weights: Array) -> bool:
        """Whether every sample is on its side of every boundary."""
        logits = self.inputs @ weights
        if self.binary:
            return bool(((2 * self.targets - 1) * logits > 0).all())
        own = logits[np.arange(len(logits)), self.labels]
        return bool((own > np.where(self.targets > 0, -np.inf, logits).max(1)).all())

    def reach(self, step: Array) -> float:
        """How far it moves a logit of a sample, at most; those of all classes together move nothing."""
        moved = self.inputs @ step
        return float(np.abs(moved if self.binary else moved - moved.mean(1, keepdims=True)).max())

    def newton_step(self, weights: Array, gradient: Array, relative: float) -> Array:
        """−H⁻¹∇F; by conjugate gradients only as far as `relative`, the progress so far, pays."""
        p = self.probabilities(weights)
        if weights.size > WHOLE_HESSIAN:
            return _conjugate_gradients(
                lambda v: self._hessian_times(p, v), self._diagonal(p), -gradient, min(0.1, relative**0.5)
            )
        hessian = self._hessian(p)
        scale = 1 / np.sqrt(np.where(np.diag(hessian) > 0, np.diag(hessian), 1.0))  # features have units
        scaled = scale[:, None] * hessian * scale
        right = -scale * gradient.T.ravel()
        if self.l2:
            solved = np.linalg.solve(scaled, right)
        else:  # adding one vector to the weights of all classes changes nothing: it is singular
            solved = np.linalg.pinv(scaled, rcond=1e-13, hermitian=True) @ right
        found: Array = (scale * solved).reshape(weights.T.shape).T
        return found

    def _hessian(self, p: Array) -> Array:
        """[weights, weights], class by class."""
        n, width = self.inputs.shape
        outputs = p.shape[1]
        found = np.zeros((outputs, width, outputs, width))
        for a in range(outputs):
            for b in range(a, outputs):
                curvature = p[:, a] * ((a == b) - p[:, b]) / n
                found[a, :, b] = found[b, :, a] = self.inputs.T @ (curvature[:, None] * self.inputs)
        whole: Array = found.reshape(outputs * width, outputs * width) + self.l2 * np.eye(outputs * width)
        return whole

    def _hessian_times(self, p: Array, vector: Array) -> Array:
        moved = self.inputs @ vector
        moved = p * (moved - (p * moved).sum(1, keepdims=True)) / len(self.inputs)
        found: Array = self.inputs.T @ moved + self.l2 * vector
        return found

    def _diagonal(self, p: Array) -> Array:
        found: Array = np.square(self.inputs).T @ (p * (1 - p)) / len(self.inputs) + self.l2
        return np.where(found > 0, found, 1.0)

    def descend(self, weights: Array, step: Array, loss: float, gradient: Array) -> tuple[Array, float]:
        """Along the step, halved until it lowers the loss as Armijo asks, to rounding."""
        slope, rounding, length = float((gradient * step).sum()), 1e-15 * abs(loss), 1.0
        while (found := self.loss(weights + length * step)) > loss + 1e-4 * length * slope + rounding:
            length /= 2
        return weights + length * step, found


def _conjugate_gradients(
    product: Callable[[Array], Array], diagonal: Array, right: Array, tolerance: float
) -> Array:
    """x with product(x) = right, to this share of `right`; preconditioned with the diagonal."""
    x, residual = np.zeros_like(right), right
    direction = preconditioned = residual / diagonal
    for _ in range(10 * right.size):
        if np.linalg.norm(residual) <= tolerance * np.linalg.norm(right):
            break
        moved = product(direction)
        curvature, energy = float((direction * moved).sum()), float((residual * preconditioned).sum())
        if curvature <= 0:  # of a singular matrix, what is left is rounding
            break
        length = energy / curvature
        x, residual = x + length * direction, residual - length * moved
        preconditioned = residual / diagonal
        direction = preconditioned + float((residual * preconditioned).sum()) / energy * direction
    return x
