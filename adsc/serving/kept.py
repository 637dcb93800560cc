"""Which tokens of a request reach which part of the decoder: prefix sums, no tensors of the model.

Made from the plan and the places of a request's images alone, so whoever needs it (scheduler and
each worker) makes it for itself, and nothing has to be undone at preemption or recomputation.

Legend: P parts of the decoder, K tokens up to the end of the last image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adsc.serving.settings import ServedPlan

Span = tuple[int, int]
"""Start and length of an image in its request's prompt."""


class Kept:
    """One request with images; all tokens behind its last image are kept.

    Args:
        served: the request's plan.
        images: where each image lies, in order; each has as many tokens as the plan's images.
    """

    def __init__(self, served: ServedPlan, images: Sequence[Span]):
        self.served, self.images = served, tuple(images)
        self.known = max(start + length for start, length in images)
        self.gone: np.ndarray = np.zeros((served.parts, self.known), dtype=bool)
        """(P, K) which tokens are gone in each part."""
        for start, length in images:
            self.gone[:, start : start + length] = served.gone
        self.before: np.ndarray = np.zeros((served.parts, self.known + 1), dtype=np.int64)
        """(P, K + 1) how many of the tokens before each are gone."""
        np.cumsum(self.gone, axis=1, out=self.before[:, 1:])

    @property
    def first(self) -> int:
        """Where the first image starts: up to there all parts hold the same tokens."""
        return min(start for start, _ in self.images)

    def dropped(self, part: int, tokens: int) -> int:
        """How many of the first `tokens` tokens don't reach a part."""
        return int(self.before[part, min(tokens, self.known)])

    def left(self, part: int, tokens: int) -> int:
        """How many of the first `tokens` tokens reach a part."""
        return tokens - self.dropped(part, tokens)

    def last_whole(self, start: int, tokens: int) -> int:
        """The most of `tokens` tokens from `start` on that cut no image in two.

        >>> from adsc.families.family import Image
        >>> kept = Kept(ServedPlan("1:1/4;pool=tiles", 2, Image(4, (2, 2)), (1,)), [(3, 4), (7, 4)])
        >>> [kept.last_whole(0, n) for n in (2, 3, 5, 7, 9, 11, 20)]
        [2, 3, 3, 7, 7, 11, 20]
        """
        end = start + tokens
        for first, length in self.images:
            if first < end < first + length:
                return max(0, first - start)
        return tokens
