"""PyramidDrop (Xing et al., CVPR 2025, arXiv 2410.17247): the image in four stages, each smaller.

Before layers L/4, L/2 and 3L/4 each image keeps the share `ratio` of the tokens that are left:
those to which the last token of the instruction attends most, by the query and key projections of
the layer that comes next, mean over heads. The paper's ratio is 1/2, 270 of 576 on average; here
it is solved for the average. With these layers no ratio goes below a quarter of the tokens: the
published 128 and 64 need earlier ones, which their authors don't name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from adsc.dropping.choice import top
from adsc.method import Budget, Method, Selection, as_layers
from adsc.peers.attention import BOTH_WAYS, WHY
from adsc.peers.fastv import last_attention

if TYPE_CHECKING:
    from adsc.costs.scoring import Sizes
    from adsc.dropping.choice import Scene


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Method):
    """Scores from the very layers before which tokens are dropped."""

    name = "pyramiddrop"
    reads_attention = True
    earliest = 1
    refuses = BOTH_WAYS
    why_refused = WHY
    hint = "; layers='earlier' reaches less than a quarter of the tokens"

    @classmethod
    def fit(
        cls,
        budget: Budget,
        layers: str | Sequence[int] = "quarters",
        positions: str | None = None,
    ) -> PyramidDrop:
        """layers: `quarters`; `earlier`, the steps k, 2k, 3k whose ratio is nearest to 1/2; or
        the layers themselves."""
        quarter = max(1, budget.layers // 4)
        positions = budget.positions(positions, "reindex")
        if layers == "quarters":
            published = tuple(number * budget.layers // 4 for number in (1, 2, 3))
            possible = published[0] >= max(1, budget.first)
            chosen = published if possible else _steps(budget, quarter)
            return cls(stages=_stages(budget, chosen), positions=positions)
        if layers == "earlier":
            each = [_stages(budget, _steps(budget, step)) for step in range(1, quarter + 1)]
            half = Fraction(1, 2)
            best = min(each, key=lambda stages: abs(stages[0][1] - half) if stages else 0)
            return cls(stages=best, positions=positions)
        numbers = as_layers(layers, "'quarters', 'earlier' or ")
        cls.check_earliest(numbers)
        return cls(stages=_stages(budget, numbers), positions=positions)

    def choose(self, scene: Scene, stage: int) -> list[Selection]:
        chosen = []
        for spot, scores in enumerate(last_attention(scene)):
            best = top(scores, scene.count(spot, stage))
            chosen.append(Selection(scene.left(spot)[best]))
        return chosen

    def scoring_macs(self, sizes: Sizes) -> int:
        return sum(
            sizes.keys(stage) + sizes.attention(stage, sizes.all_images)
            for stage in range(len(self.stages))
        )


def _steps(budget: Budget, step: int) -> tuple[int, ...]:
    """Three drops a step apart, the first where the family allows one."""
    start = max(step, budget.first)
    return (start, start + step, start + 2 * step)


def _stages(budget: Budget, layers: Sequence[int]) -> tuple[tuple[int, Fraction], ...]:
    return budget.scaled(layers, lambda x: [x ** (i + 1) for i in range(len(layers))])
