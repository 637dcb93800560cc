"""Average pooling of the vision tokens on their grid, before the decoder.

An h x w lattice is cut into h' bands of whole rows, and each band into runs of whole columns, m
cells in all, as square and as equal as whole numbers allow; a cell becomes the mean of its tokens.
Where m = h' w' with h' | h and w' | w that is plain average pooling with kernel = stride. Tokens
without a lattice (LLaVA-NeXT's crops with their row ends) are pooled in runs of reading order. The
partition is `adsc.tiles`', ragged for every m.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from adsc.method import Budget, Method, Selection
from adsc.tiles import Region, cut, ragged_counts

if TYPE_CHECKING:
    from adsc.costs.scoring import Sizes
    from adsc.dropping.choice import Scene


@dataclass(frozen=True, kw_only=True)
class Pool(Method):
    """Each cell's mean stands where the cell's middle token stood (`positions='keep'`), or is
    numbered through (`reindex`, the default where positions have one axis)."""

    name = "pool"

    @classmethod
    def fit(cls, budget: Budget, positions: str | None = None) -> Pool:
        return cls(stages=budget.cut(0), positions=budget.positions(positions, "reindex"))

    def choose(self, scene: Scene, stage: int) -> list[Selection]:
        chosen = []
        for number, spot in enumerate(scene.spots):
            height, width = spot.lattice or (1, spot.tokens)
            sheet = Region(height, width, 0, width).sheet()
            bands = cut(sheet, ragged_counts(sheet, scene.count(number, stage)))
            cells = [cell for band in bands for cell in band]
            weights = torch.zeros(len(cells), spot.tokens)
            for cell, tokens in enumerate(cells):
                weights[cell, list(tokens)] = 1 / len(tokens)
            middle = torch.tensor([tokens[len(tokens) // 2] for tokens in cells])
            keep, order = middle.to(scene.device).sort()
            chosen.append(Selection(keep, keep, weights.to(scene.device)[order]))
        return chosen

    def scoring_macs(self, sizes: Sizes) -> int:
        return sizes.all_images * sizes.counts[0] * sizes.tokens * sizes.decoder.hidden
