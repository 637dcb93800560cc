"""What decoder layers cost: the matmuls of one layer, and what its KV cache keeps.

The arithmetic of one row, on numbers read from a transformers text config. Which tokens enter a
layer is the plan's business, and adding up is `cost`'s.

Legend: n tokens entering a layer, c (query, key) pairs in its attention, d hidden width, m MLP
width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adsc.errors import CostError

# Decoders whose layers are q, k, v, o and a gated MLP of three matrices, nothing else.
DECODERS = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "llama",
    "mistral",
    "qwen2",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
    "qwen3",
    "qwen3_vl_text",
)


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The numbers of a decoder that its cost depends on, read from a transformers text config."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    windows: tuple[int | None, ...]
    """Per layer: how many tokens a sliding-window layer keeps in its cache plus one; None where it
    keeps all."""

    @classmethod
    def from_config(cls, config: Any) -> Decoder:
        kind = getattr(config, "model_type", None)
        if kind not in DECODERS:
            raise CostError(
                f"no exact cost for decoder {kind!r}: supported are {', '.join(DECODERS)}"
            )
        heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            mlp=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
            windows=_cache_windows(config),
        )

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    def layer_macs(self, n: int, c: int) -> int:
        """n tokens pass one layer, and all of them together attend to c (query, key) pairs."""
        attention = self.heads * self.head_dim
        projections = 2 * self.hidden * attention + 2 * self.hidden * self.kv_heads * self.head_dim
        return n * (projections + 3 * self.hidden * self.mlp) + 2 * c * attention

    def formula_macs(self, n: int, c: int, mlp_matrices: int) -> int:
        """The published per-layer formula, which knows of no grouped-query attention."""
        d, m = self.hidden, self.mlp
        return 4 * n * d * d + 2 * c * d + mlp_matrices * n * d * m

    def kept_tokens(self, layer: int, n: int) -> int:
        """Tokens left in a layer's cache after n went in."""
        window = self.windows[layer]
        return n if window is None else min(n, window - 1)


def _cache_windows(config: Any) -> tuple[int | None, ...]:
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if (
        kinds is None
    ):  # transformers' DynamicCache: all layers slide where a window is set and no types are named
        return (window,) * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
