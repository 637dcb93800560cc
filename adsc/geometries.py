"""True geometries of known checkpoints by name, as transformers configs: for costs and benchmarks
without a download.

Shapes only: no weights, no tokenizer, and no promise that generation settings match the hub's. Each
number is from the `config.json` of the checkpoint named in the factory's docstring.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from adsc.cost_error import CostError


def _clip_vit_l_336() -> CLIPVisionConfig:
    """openai/clip-vit-large-patch14-336: 24 x 24 patches and a class token."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )


def _vicuna(size: str) -> LlamaConfig:
    """lmsys/vicuna-{7b,13b}-v1.5, with the vocabulary padded as in the llava-hf checkpoints."""
    shape = {
        "7b": {"hidden_size": 4096, "intermediate_size": 11008, "layers": 32, "heads": 32},
        "13b": {"hidden_size": 5120, "intermediate_size": 13824, "layers": 40, "heads": 40},
    }[size]
    return LlamaConfig(
        vocab_size=32064,
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )


def _llava_1_5(size: str) -> LlavaConfig:
    """llava-hf/llava-1.5-{7b,13b}-hf."""
    return LlavaConfig(
        vision_config=_clip_vit_l_336(),
        text_config=_vicuna(size),
        image_token_index=32000,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        dtype="float16",
    )


GEOMETRIES: dict[str, Callable[[], Any]] = {
    "llava-1.5-7b": lambda: _llava_1_5("7b"),
    "llava-1.5-13b": lambda: _llava_1_5("13b"),
}


def geometry(name: str) -> Any:
    """A fresh transformers config of the named geometry.

    Raises:
        CostError: an unknown name; the message lists the known ones, the nearest first.

    >>> geometry("llava-1.5-7b").text_config.hidden_size
    4096
    """
    key = name.strip().lower().replace("_", "-")
    if key not in GEOMETRIES:
        ranked = difflib.get_close_matches(key, GEOMETRIES, n=len(GEOMETRIES), cutoff=0.0)
        raise CostError(f"geometry {name!r} is unknown; known, nearest first: {', '.join(ranked)}")
    return GEOMETRIES[key]()
