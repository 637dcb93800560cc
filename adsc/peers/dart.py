"""DART (Wen et al., EMNLP 2025, arXiv 2502.11494): drop tokens that duplicate a few pivots.

Pivots are the vision tokens and the text tokens of the question whose keys in layer K - 1 have the
largest L1 norm, 4 of each. Pivot by pivot, the vision tokens that resemble it least (cosine of the
normed hidden states that enter layer K) are retained, an equal share for each pivot, until the
budget is full. K = 2; there are no attention scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adsc.dropping.choice import top
from adsc.method import Budget, Method, Selection, as_whole
from adsc.peers.attention import keys

if TYPE_CHECKING:
    from adsc.costs.scoring import Sizes
    from adsc.dropping.choice import Scene


@dataclass(frozen=True, kw_only=True)
class DART(Method):
    """Keys from layer K - 1, one drop before layer K = `stages[0][0]`.

    Args:
        image_pivots: vision tokens among the pivots; they stay.
        text_pivots: text tokens among them, fewer where the question has fewer.
    """

    name = "dart"
    reads_attention = True
    earliest = 1
    image_pivots: int = 4
    text_pivots: int = 4

    @classmethod
    def fit(
        cls,
        budget: Budget,
        layer: int | None = None,
        image_pivots: int = 4,
        text_pivots: int = 4,
        positions: str | None = None,
    ) -> DART:
        """layer: K; 2, or the first that the family allows if that is later."""
        layer = max(2, budget.first) if layer is None else as_whole("layer", layer, 1)
        return cls(
            stages=budget.cut(layer),
            positions=budget.positions(positions, "keep"),
            image_pivots=as_whole("image_pivots", image_pivots, 1),
            text_pivots=as_whole("text_pivots", text_pivots, 0),
        )

    def watches(self) -> frozenset[int]:
        return frozenset(layer - 1 for layer, _ in self.stages)

    def note(self, scene: Scene) -> Tensor:
        """(B, Q) L1 norm of each token's key, all heads together."""
        return keys(scene.replace(rotary=unshifted(scene))).float().abs().sum((1, 3))

    def choose(self, scene: Scene, stage: int) -> list[Selection]:
        norms, norm = scene.notes[scene.number - 1], scene.call.decoder.norm
        chosen = []
        for number, spot in enumerate(scene.spots):
            count, row = scene.count(number, stage), norms[spot.row]
            text = scene.slot(spot.row, scene.text(number))
            images = row[scene.slots(number)].argsort(descending=True, stable=True)
            images = images[: min(self.image_pivots, count)]
            text = text[row[text].argsort(descending=True, stable=True)[: self.text_pivots]]
            states = norm(scene.states(number))
            pivots = torch.cat([states[images], norm(scene.hidden[spot.row][text])])
            chosen.append(Selection(least_alike(states, pivots, images, count)))
        return chosen

    def scoring_macs(self, sizes: Sizes) -> int:
        pivots = min(self.image_pivots, sizes.counts[0]) + min(self.text_pivots, sizes.text)
        return sizes.keys(0) + sizes.all_images * pivots * sizes.tokens * sizes.decoder.hidden


def unshifted(scene: Scene) -> Any:
    """(cos, sin) counted from 0 without padding: turning a key changes its L1 norm, so a row's
    pivots would depend on its padding. Positions of several axes don't count padding anyway."""
    call, width = scene.call, scene.hidden.shape[1]
    if call.family.axes > 1 or call.samples is not None:
        return scene.rotary
    if call.seen is None:
        past = 0 if scene.cache is None else int(scene.cache.get_seq_length(scene.number))
        numbers = torch.arange(past, past + width, device=scene.device).unsqueeze(0)
    else:
        numbers = (call.seen.cumsum(1) - 1).clamp(min=0)[:, -width:].to(scene.device)
    if call.family.rotary_by_layer_type:
        kind = call.decoder.config.layer_types[scene.number]
        return call.decoder.rotary_emb(scene.hidden, numbers, kind)
    return call.decoder.rotary_emb(scene.hidden, numbers)


def least_alike(states: Tensor, pivots: Tensor, retained: Tensor, count: int) -> Tensor:
    """(count,) tokens, ascending: `retained` and, pivot after pivot, those least like it.

    Args:
        states: (n, D).
        pivots: (P, D), in the order in which they choose.
        retained: the tokens among the pivots.
        count: at least as many.
    """
    unit, pivots = (nn.functional.normalize(x.float(), dim=-1) for x in (states, pivots))
    alike = pivots @ unit.T
    taken = torch.zeros(len(states), dtype=torch.bool, device=states.device)
    taken = taken.index_fill(0, retained, True)
    left = count - len(retained)
    for pivot, row in enumerate(alike):
        share = (pivot + 1) * left // len(alike) - pivot * left // len(alike)
        order = row.masked_fill(taken, torch.inf).argsort(stable=True)
        taken = taken.index_fill(0, order[:share], True)
    return top(taken.int(), count)
