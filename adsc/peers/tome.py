"""Token merging (ToMe, Bolya et al., ICLR 2023, arXiv 2210.09461) of an image's vision tokens.

Bipartite soft matching: tokens are dealt out in turn into two sets, each of the first set looks for
its most similar one of the second (cosine of keys, mean over heads), and the r most similar pairs
merge: the second becomes the mean of both, weighted by how many tokens each stands for. One round
can merge half of the tokens, so rounds follow one another, each on what the one before left, until
the budget is met; the last has the r that is missing.

Keys are those of the decoder layer before which tokens are merged, without rotary positions.

Legend: n vision tokens of one image, t of them left in a round, m in the end, d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adsc.method import Budget, Method, Selection, as_whole
from adsc.peers.attention import content_keys

if TYPE_CHECKING:
    from adsc.costs.scoring import Sizes
    from adsc.dropping.choice import Scene


@dataclass(frozen=True, kw_only=True)
class ToMe(Method):
    """Merged tokens stand where their member of the second set stood."""

    name = "tome"

    @classmethod
    def fit(cls, budget: Budget, layer: int | None = None, positions: str | None = None) -> ToMe:
        """One cut before `layer`: 0, or the first layer that the family allows if that is later."""
        layer = budget.first if layer is None else as_whole("layer", layer, 0)
        return cls(stages=budget.cut(layer), positions=budget.positions(positions, "reindex"))

    def choose(self, scene: Scene, stage: int) -> list[Selection]:
        layer: Any = scene.layer
        if layer is None:  # the decoder's input
            layer = scene.call.decoder.layers[0]
        chosen = []
        for spot in range(len(scene.spots)):
            members = merge(scene.states(spot), scene.count(spot, stage), layer)
            keep = members.places.to(scene.device)
            chosen.append(Selection(keep, keep, members.weights))
        return chosen

    def scoring_macs(self, sizes: Sizes) -> int:
        decoder = sizes.decoder
        each, tokens, m = 0, sizes.tokens, sizes.counts[0]
        while tokens > m:
            each += tokens * decoder.hidden * decoder.kv_heads * decoder.head_dim
            each += -(-tokens // 2) * (tokens // 2) * decoder.head_dim
            tokens -= min(tokens // 2, tokens - m)
        return sizes.all_images * (each + m * sizes.tokens * decoder.hidden)


@dataclass(frozen=True, eq=False)
class Merged:
    """What is left of an image.

    Args:
        places: (m,) numbers of the tokens at whose places the merged ones stand, ascending.
        weights: (m, n) each as a mean over tokens.
    """

    places: Tensor
    weights: Tensor


def merge(states: Tensor, m: int, layer: Any) -> Merged:
    """The tokens with states (n, D), merged into m by the keys of a decoder layer."""
    n = len(states)
    places = torch.arange(n, device=states.device)
    # Which of the tokens that are left each token has become part of.
    owner = places
    while len(places) > m:
        keys = content_keys(layer, _means(states, owner, len(places)))
        target = _matched(keys, min(len(places) // 2, len(places) - m))
        left = (target == torch.arange(len(places), device=states.device)).nonzero().flatten()
        renumbered = torch.full_like(places, -1).index_copy(
            0, left, torch.arange(len(left), device=states.device)
        )
        owner = renumbered[target][owner]
        places = places[left]
    member = nn.functional.one_hot(owner, len(places)).T.float()
    return Merged(places, member / member.sum(1, keepdim=True))


def _means(states: Tensor, owner: Tensor, count: int) -> Tensor:
    """(count, D) the mean state of each owner's tokens, in which a token counts once."""
    total = states.new_zeros(count, states.shape[1], dtype=torch.float32)
    total = total.index_add(0, owner, states.float())
    size = torch.bincount(owner, minlength=count).unsqueeze(1)
    return (total / size).to(states)


def _matched(keys: Tensor, r: int) -> Tensor:
    """(t,) for tokens with these keys (t, d): the one that each goes to; itself, if it stays."""
    unit = nn.functional.normalize(keys.float(), dim=-1)
    first = torch.arange(0, len(keys), 2, device=keys.device)
    best, nearest = (unit[0::2] @ unit[1::2].T).max(dim=1)
    order = best.argsort(descending=True, stable=True)[:r]
    target = torch.arange(len(keys), device=keys.device)
    return target.index_copy(0, first[order], 2 * nearest[order] + 1)
