"""A uniform random subset of each image's tokens, before the decoder.

The draw of an image depends on the seed, on the token ids of its row up to its query, and on which
image of the row it is: the same on every device, in every batch and at every run, and another for
every question. Numbers come from integer hashing (splitmix64, Steele et al. 2014), not from torch's
generators, whose streams differ between devices. Calls that bring embeddings instead of ids draw by
seed and place alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adsc.method import Budget, Method, Selection, as_whole

if TYPE_CHECKING:
    from adsc.costs.scoring import Sizes
    from adsc.dropping.choice import Scene


@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """The m tokens with the largest random numbers stay, in their order.

    Args:
        seed: of the draws.
    """

    name = "random"
    seed: int = 0

    @classmethod
    def fit(cls, budget: Budget, seed: int = 0, positions: str | None = None) -> Random:
        return cls(
            stages=budget.cut(0),
            positions=budget.positions(positions, "reindex"),
            seed=as_whole("seed", seed, 0),
        )

    def choose(self, scene: Scene, stage: int) -> list[Selection]:
        chosen = []
        for number, spot in enumerate(scene.spots):
            state = mix(torch.tensor(self.seed, device=scene.device) + 1)
            if scene.choice.ids is not None:
                ids = scene.choice.ids[spot.row, : spot.query + 1].to(scene.device)
                if scene.choice.valid is not None:
                    ids = ids[scene.choice.valid[spot.row, : spot.query + 1].to(scene.device)]
                places = torch.arange(1, len(ids) + 1, device=scene.device)
                state = mix(state ^ (mix(places) * (2 * ids + 1)).sum())
            state = mix(state + spot.number)
            draws = mix(state + torch.arange(spot.tokens, device=scene.device))
            order = draws.argsort(stable=True)
            chosen.append(Selection(order[: scene.count(number, stage)].sort().values))
        return chosen

    def scoring_macs(self, sizes: Sizes) -> int:
        return 0


def mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer on int64, whose arithmetic wraps around."""
    x = (x ^ _shifted(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shifted(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right without the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
