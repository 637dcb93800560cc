"""SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417): rank by the text that looks at the image.

Raters are the tokens of the question to which the vision tokens, at the decoder's input, point more
than to the mean of them. After layers 2, 6 and 15 (of 32) the vision tokens to which the raters
attend most in that layer stay. Of those that don't, the best 30 % are recycled: clustered by
density peaks (k nearest neighbours), a tenth as many clusters as tokens, each merged into its mean.

The published schedule of "192" is 300, 200 and 110 tokens, here scaled to the average, recycled
tokens included. The paper's rank of the attention matrix, from which it may set the number of
tokens image by image, is not used, as in the released code: there would be no fixed budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adsc.dropping.choice import top
from adsc.method import Budget, Method, Selection, as_layers
from adsc.peers.attention import BOTH_WAYS, WHY, probabilities

if TYPE_CHECKING:
    from adsc.costs.scoring import Sizes
    from adsc.dropping.choice import Scene

LAYERS, OF = (3, 7, 16), 32  # drops before these layers
SCHEDULE = tuple(Fraction(count, 576) for count in (300, 200, 110))


@dataclass(frozen=True, kw_only=True)
class SparseVLM(Method):
    """Scores from the layer before each drop.

    Args:
        recycle: whether tokens are merged; without it as many of the best stay instead.
    """

    name = "sparsevlm"
    reads_attention = True
    earliest = 1
    refuses = BOTH_WAYS
    why_refused = WHY
    recycle: bool = True

    @classmethod
    def fit(
        cls,
        budget: Budget,
        layers: Sequence[int] | None = None,
        recycle: bool = True,
        positions: str | None = None,
    ) -> SparseVLM:
        """layers: those before which tokens are dropped; by default 3, 7 and 16 of 32, as deep in
        other decoders."""
        if layers is None:
            layers, least = [], max(1, budget.first)
            for at in LAYERS:
                layers.append(max(round(at * budget.layers / OF), least))
                least = layers[-1] + 1
        layers = as_layers(layers)
        cls.check_earliest(layers)
        shares = [SCHEDULE[min(i, 2)] for i in range(len(layers))]
        # x = 1 keeps everything, 1/2 the published counts, 0 nothing.
        stages = budget.scaled(
            layers, lambda x: [2 * x * s if x <= 0.5 else s + (2 * x - 1) * (1 - s) for s in shares]
        )
        positions = budget.positions(positions, "reindex")
        return cls(stages=stages, positions=positions, recycle=bool(recycle))

    def watches(self) -> frozenset[int]:
        return frozenset([0, *(layer - 1 for layer, _ in self.stages)] if self.stages else [])

    def note(self, scene: Scene) -> dict[str, list[Any]]:
        """At layer 0 each image's raters; before a drop the scores of its tokens."""
        found: dict[str, list[Any]] = {}
        if scene.number == 0:
            found["raters"] = [self._raters(scene, spot) for spot in range(len(scene.spots))]
        if any(scene.number == layer - 1 for layer, _ in self.stages):
            raters = found.get("raters") or scene.notes[0]["raters"]
            found["scores"] = self._scores(scene, raters)
        return found

    def _raters(self, scene: Scene, spot: int) -> Tensor:
        """(T,) bool: which text tokens of an image's row rate it."""
        row = scene.spots[spot].row
        text = scene.choice.text[row].to(scene.device)
        candidates = torch.isin(text, scene.text(spot).to(scene.device))
        vectors = scene.hidden[row][scene.slot(row, text)]
        pointed = (scene.states(spot) @ vectors.T).float()
        pointed = pointed.masked_fill(~candidates, -torch.inf).softmax(-1).mean(0)
        mean = pointed.sum() / candidates.sum().clamp(min=1)
        return candidates & (pointed >= mean)

    def _scores(self, scene: Scene, raters: list[Tensor]) -> list[Tensor]:
        """For each image (n',): mean attention of its raters, mean over heads."""
        rows = sorted({spot.row for spot in scene.spots})
        text = [scene.slot(row, scene.choice.text[row]) for row in rows]
        slots = nn.utils.rnn.pad_sequence(text, batch_first=True)
        paid = probabilities(scene, torch.tensor(rows, device=scene.device), slots)
        scores = []
        for number, spot in enumerate(scene.spots):
            mine = paid[rows.index(spot.row)][: len(raters[number])]
            rating = raters[number].to(mine) / raters[number].sum().clamp(min=1)
            mine = mine[:, scene.slots(number)]
            scores.append((rating.unsqueeze(1) * mine).sum(0))
        return scores

    def choose(self, scene: Scene, stage: int) -> list[Selection]:
        scores = scene.notes[scene.number - 1]["scores"]
        return [self._cut(scene, spot, scores[spot], stage) for spot in range(len(scene.spots))]

    def _cut(self, scene: Scene, spot: int, scores: Tensor, stage: int) -> Selection:
        left, count = scene.left(spot), scene.count(spot, stage)
        kept, best, clusters = self.split(len(left), count)
        order = scores.argsort(descending=True, stable=True)
        if not clusters:
            return Selection(left[top(scores, count)])
        recycled = order[kept : kept + best]
        centers, members = cluster(scene.states(spot)[recycled], clusters)
        weights = scores.new_zeros(clusters, len(left))
        weights[:, recycled] = members / members.sum(1, keepdim=True)
        centers, rank = recycled[centers].sort()
        keep = torch.cat([order[:kept], centers]).sort().values
        return Selection(left[keep], left[centers], weights[rank])

    def split(self, n: int, count: int) -> tuple[int, int, int]:
        """How many of n tokens stay as they are, how many are recycled, into how many clusters."""
        if not self.recycle or count < 2 or count >= n:
            return count, 0, 0
        for kept in range(count - 1, 0, -1):
            best = int((n - kept) * 0.3) + 1
            if kept + best // 10 + 1 <= count:
                return kept, max(best, count - kept), count - kept
        return 1, n - 1, count - 1

    def scoring_macs(self, sizes: Sizes) -> int:
        d, n, macs = sizes.decoder.hidden, sizes.tokens, 0
        macs += sizes.all_images * n * sizes.text * d  # raters
        for stage, count in enumerate(sizes.counts):
            macs += sizes.keys(stage) + sizes.attention(stage, sizes.rows * sizes.text)
            _, best, clusters = self.split(n, count)
            if clusters:
                macs += sizes.all_images * (best * best * d + clusters * n * d)
            n = count
        return macs


def cluster(states: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Density peaks with `count` nearest neighbours: (count,) centers, (count, s) members as 0/1.

    A token's density falls with its mean squared distance to its nearest neighbours (itself one of
    them); centers have the largest product of density and distance to any denser token; the others
    join the nearest center.
    """
    states = states.float()
    squares = (states * states).sum(1)
    distance = squares[:, None] + squares[None] - 2 * (states @ states.T)
    distance = (distance.clamp(min=0) / states.shape[1]).sqrt()
    distance = distance.diagonal_scatter(torch.zeros_like(squares))
    nearest = distance.sort(1).values[:, :count]
    density = (-(nearest**2).mean(1)).exp()
    denser = density[None] > density[:, None]
    apart = distance.masked_fill(~denser, distance.max()).amin(1)
    centers = (apart * density).argsort(descending=True, stable=True)[:count]
    joined = distance[centers].argmin(0)
    joined = joined.index_put((centers,), torch.arange(count, device=centers.device))
    return centers, nn.functional.one_hot(joined, count).T.float()
