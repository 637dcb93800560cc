"""What methods spend on choosing tokens: matmuls counted in MACs, as `cost` counts the rest.

Only arithmetic on numbers of a config; which matmuls a method does is written beside the method.

Legend: B rows, T text tokens of a row, n vision tokens of one image, Q tokens that enter a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adsc.costs.decoder import Decoder
from adsc.families.family import ImageInput


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """One prefill.

    Args:
        config: of the whole model.
        decoder: what its layers' costs depend on.
        rows: B; all alike.
        images: of one row.
        text: T.
        tokens: n.
        counts: tokens of one image after each stage.
        image: what the family needs to know of an image.
    """

    config: Any
    decoder: Decoder
    rows: int
    images: int
    text: int
    tokens: int
    counts: Sequence[int]
    image: ImageInput

    @property
    def all_images(self) -> int:
        return self.rows * self.images

    def entering(self, stage: int) -> int:
        """Q before a stage; stage 0 is the first."""
        each = self.tokens if stage == 0 else self.counts[stage - 1]
        return self.images * each + self.text

    def keys(self, stage: int) -> int:
        """Keys of all tokens of one layer before a stage."""
        d = self.decoder
        return self.rows * self.entering(stage) * d.hidden * d.kv_heads * d.head_dim

    def attention(self, stage: int, queries: int) -> int:
        """Queries of the batch, projected, against all keys of their row."""
        width = self.decoder.heads * self.decoder.head_dim
        return queries * (self.decoder.hidden * width + self.entering(stage) * width)
