"""FastV (Chen et al., ECCV 2024, arXiv 2403.06764): drop what the last token hardly attends to.

After layer K - 1 each image keeps the tokens with the largest attention, mean over heads, that the
last token of the question pays them in that layer; layers K.. see no others. K = 2 counts from 0:
two layers see all tokens, so the "192" of the published tables is 216 on average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adsc.dropping.choice import top
from adsc.method import Budget, Method, Selection, as_whole
from adsc.peers.attention import BOTH_WAYS, WHY, probabilities

if TYPE_CHECKING:
    from adsc.costs.scoring import Sizes
    from adsc.dropping.choice import Scene


@dataclass(frozen=True, kw_only=True)
class FastV(Method):
    """Scores from layer K - 1, one drop before layer K = `stages[0][0]`."""

    name = "fastv"
    reads_attention = True
    earliest = 1
    refuses = BOTH_WAYS
    why_refused = WHY

    @classmethod
    def fit(cls, budget: Budget, layer: int | None = None, positions: str | None = None) -> FastV:
        """layer: K; 2, or the first that the family allows if that is later."""
        layer = max(2, budget.first) if layer is None else as_whole("layer", layer, 1)
        return cls(stages=budget.cut(layer), positions=budget.positions(positions, "keep"))

    def watches(self) -> frozenset[int]:
        return frozenset(layer - 1 for layer, _ in self.stages)

    def note(self, scene: Scene) -> list[Tensor]:
        return last_attention(scene)

    def choose(self, scene: Scene, stage: int) -> list[Selection]:
        scores = scene.notes[scene.number - 1]
        return [
            Selection(top(scores[spot], scene.count(spot, stage)))
            for spot in range(len(scene.spots))
        ]

    def scoring_macs(self, sizes: Sizes) -> int:
        return sizes.keys(0) + sizes.attention(0, sizes.all_images)


def last_attention(scene: Scene) -> list[Tensor]:
    """For each image (n',): what its query pays its tokens, mean over heads."""
    spots = scene.spots
    rows = torch.tensor([spot.row for spot in spots], device=scene.device)
    slots = [scene.slot(spot.row, torch.tensor([spot.query])) for spot in spots]
    paid = probabilities(scene, rows, torch.stack(slots))
    return [paid[spot, 0, scene.slots(spot)] for spot in range(len(spots))]
