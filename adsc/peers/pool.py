"""Average pooling of the vision tokens on their grid, before the decoder.

An h x w lattice is cut into h' bands of whole rows, and each band into runs of whole columns, m
cells in all, as square and as equal as whole numbers allow; a cell becomes the mean of its tokens.
Where m = h' w' with h' | h and w' | w that is plain average pooling with kernel = stride. Tokens
without a lattice (LLaVA-NeXT's crops with their row ends) are pooled in runs of reading order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from adsc.method import Budget, Method, Selection

if TYPE_CHECKING:
    from adsc.choice import Scene
    from adsc.scoring_cost import Sizes


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
            cells = cells_of(spot.lattice or (1, spot.tokens), scene.count(number, stage))
            weights = torch.zeros(len(cells), spot.tokens)
            for cell, tokens in enumerate(cells):
                weights[cell, tokens] = 1 / len(tokens)
            middle = torch.tensor([tokens[len(tokens) // 2] for tokens in cells])
            keep, order = middle.to(scene.device).sort()
            chosen.append(Selection(keep, keep, weights.to(scene.device)[order]))
        return chosen

    def scoring_macs(self, sizes: Sizes) -> int:
        return sizes.all_images * sizes.counts[0] * sizes.tokens * sizes.decoder.hidden


def cells_of(lattice: tuple[int, int], m: int) -> list[list[int]]:
    """The tokens of each of m cells, in reading order within a cell."""
    height, width = lattice
    # At least so many bands that none has more cells than columns, at most one band a row.
    bands = max(-(-m // width), min(height, m, round((m * height / width) ** 0.5) or 1))
    cells = []
    for band in range(bands):
        rows = range(band * height // bands, (band + 1) * height // bands)
        count = (band + 1) * m // bands - band * m // bands
        for cell in range(count):
            columns = range(cell * width // count, (cell + 1) * width // count)
            cells.append([row * width + column for row in rows for column in columns])
    return cells
