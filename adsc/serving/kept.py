"""Which tokens of a request reach which part of the decoder: prefix sums, no tensors of the model.

Made from the plan and the places of a request's images alone, so whoever needs it (scheduler and
each worker) makes it for itself, and nothing has to be undone at preemption or recomputation.

Legend: P parts of the decoder, K tokens up to the end of the last image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adsc.families.family import Image
from adsc.serving.settings import ServedPlan

Placed = tuple[int, Image]
"""Where an image starts in its request's prompt, and what it is."""


class Kept:
    """One request with images; all tokens behind its last image are kept.

    Args:
        served: the request's plan.
        images: in order.
    """

    def __init__(self, served: ServedPlan, images: Sequence[Placed]):
        self.served = served
        self.images = tuple((start, image.tokens, served.layout(image)) for start, image in images)
        """Start, length and layout of each."""
        self.known = max(start + length for start, length, _ in self.images)
        self.gone: np.ndarray = np.zeros((served.parts, self.known), dtype=bool)
        """(P, K) which tokens are gone in each part."""
        for start, length, layout in self.images:
            self.gone[:, start : start + length] = layout.gone
        self.before: np.ndarray = np.zeros((served.parts, self.known + 1), dtype=np.int64)
        """(P, K + 1) how many of the tokens before each are gone."""
        np.cumsum(self.gone, axis=1, out=self.before[:, 1:])

    @property
    def first(self) -> int:
        """Where the first image starts: up to there all parts hold the same tokens."""
        return min(start for start, *_ in self.images)

    def dropped(self, part: int, tokens: int) -> int:
        """How many of the first `tokens` tokens don't reach a part."""
        return int(self.before[part, min(tokens, self.known)])

    def left(self, part: int, tokens: int) -> int:
        """How many of the first `tokens` tokens reach a part."""
        return tokens - self.dropped(part, tokens)

    def last_whole(self, start: int, tokens: int) -> int:
        """The most of `tokens` tokens from `start` on that cut no image in two.

        >>> image = Image(4, (2, 2))
        >>> kept = Kept(ServedPlan("1:1/4;pool=tiles", 2, image, (1,)), [(3, image), (7, image)])
        >>> [kept.last_whole(0, n) for n in (2, 3, 5, 7, 9, 11, 20)]
        [2, 3, 3, 7, 7, 11, 20]
        """
        end = start + tokens
        for first, length, _ in self.images:
            if first < end < first + length:
                return max(0, first - start)
        return tokens
