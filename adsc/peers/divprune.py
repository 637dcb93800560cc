"""DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175): the most diverse subset, before layer 0.

Tokens are picked one by one so that the smallest cosine distance within the subset stays as large
as it can (a greedy solution of the max-min diversity problem): first the token that is farthest
from its nearest neighbour, then always the one that is farthest from what has been picked. Features
are those that enter the decoder; text is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adsc.method import Budget, Method, Selection

if TYPE_CHECKING:
    from adsc.costs.scoring import Sizes
    from adsc.dropping.choice import Scene


@dataclass(frozen=True, kw_only=True)
class DivPrune(Method):
    """One drop before layer 0."""

    name = "divprune"

    @classmethod
    def fit(cls, budget: Budget, positions: str | None = None) -> DivPrune:
        return cls(stages=budget.cut(0), positions=budget.positions(positions, "reindex"))

    def choose(self, scene: Scene, stage: int) -> list[Selection]:
        return [
            Selection(most_diverse(scene.states(spot), scene.count(spot, stage)).sort().values)
            for spot in range(len(scene.spots))
        ]

    def scoring_macs(self, sizes: Sizes) -> int:
        return sizes.all_images * sizes.tokens**2 * sizes.decoder.hidden


def most_diverse(features: Tensor, count: int) -> Tensor:
    """(count,) tokens of features (n, D) in the order in which they are picked."""
    unit = nn.functional.normalize(features.float(), dim=-1)
    distance = 1 - unit @ unit.T
    far = torch.full_like(distance.diagonal(), torch.inf)
    picks = [distance.diagonal_scatter(far).amin(0).argmax()]
    nearest = distance[picks[0]]
    for _ in range(count - 1):
        nearest = nearest.index_fill(0, picks[-1], -torch.inf)  # and so it stays
        picks.append(nearest.argmax())
        nearest = torch.minimum(nearest, distance[picks[-1]])
    return torch.stack(picks)
