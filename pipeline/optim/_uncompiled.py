"""torch's optimizers without its compiler.

torch keeps its compiler (torch._dynamo) from looking into some methods of an optimizer, by wrappers that
import it at their first call. That takes a second and more before a run's first step, and changes nothing
where nothing compiles the optimizer, as here: `parallel.compile` is for the model. Here are the methods
inside the wrappers.
"""

from __future__ import annotations

import functools
import inspect
from typing import TypeVar

import torch

Kind = TypeVar("Kind", bound=torch.optim.Optimizer)


class Uncompiled(torch.optim.Optimizer):
    """The base of optimizers that are this project's own."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


@functools.cache
def uncompiled(kind: type[Kind]) -> type[Kind]:
    """One of torch's: the same arithmetic, and an instance of `kind`. No gradient is recorded in its steps,
    which is what the wrapper of `step` sees to, for all optimizers that are not `differentiable`."""
    own = {"__module__": __name__, "step": torch.no_grad()(inspect.unwrap(kind.step))}
    made: type[Kind] = type(kind.__name__, (Uncompiled, kind), own)
    return made
