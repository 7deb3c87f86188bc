"""Seesaw (arXiv 2510.14717, ICLR 2026): grow the batch where the learning rate would be cut.

Where the reference schedule cuts the rate by α, Seesaw cuts it by √α and multiplies the batch by α: α√β of
(cut α, growth β) stays what it was, which leaves the risk of normalised SGD, and of Adam, unchanged while the
gradient is mostly noise. What is left of the steps is the mean of the reference's decay: half for a cosine to
0. (The 36 % that the paper's theory saves, 1 − 2/π, is what a quarter wave cos(πt/2) gives.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.batch._caps import cap_below_start, largest_reached
from pipeline.batch._interface import Planned, StepDone
from pipeline.optim._learning_rate import cuts

if TYPE_CHECKING:
    from pipeline.config import Config


class Schedule(Planned):
    """b(t) = size · α^k(t), where the reference has been cut k(t) times by α = `lr.cut_factor`.

    The rate needs no rule of its own: `lr.batch_scaling=sqrt` makes it α^−k · √(b/b₀), also where the cap
    or rounding lets the batch grow less than asked.
    """

    settings = frozenset({"size", "max_size", "round_to"})

    def __init__(self, config: Config) -> None:
        self._config, self.multiple = config, config.batch_multiple
        self.largest = largest_reached(config, self.batch_at(StepDone(0, config.budget_tokens, 0, 0)))

    @classmethod
    def check(cls, config: Config) -> list[str]:
        problems, lr = cap_below_start(config), config.lr
        if lr.cut_factor is None:
            problems.append(
                "lr.cut_factor=null: batch.schedule=seesaw grows the batch where the rate is cut, by this "
                "factor. The paper's: 1.1"
            )
        if lr.batch_scaling != "sqrt":
            problems.append(
                f"lr.batch_scaling={lr.batch_scaling}: batch.schedule=seesaw is defined with sqrt, which "
                f"gives back a root of each cut"
            )
        if lr.min_ratio == 0 and config.batch.max_size is None:
            problems.append(
                f"batch.max_size=null: with lr.min_ratio=0 the batch would grow without end. "
                f"A usual choice: {16 * config.batch.size}; or lr.min_ratio=0.1"
            )
        return problems

    def batch_at(self, done: StepDone) -> float:
        factor = self._config.lr.cut_factor
        assert factor
        return float(self._config.batch.size * factor ** cuts(self._config, done.tokens))
