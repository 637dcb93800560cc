"""True geometries of known checkpoints by name, as transformers configs: for costs and benchmarks
without a download.

Shapes only: no weights, no tokenizer, and no promise that other settings match the hub's. Each
factory's docstring names its checkpoint; a test compares the numbers of parameters.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3VisionConfig,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3VLConfig,
    SiglipVisionConfig,
)

from adsc.errors import CostError


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


def _llava_next_7b() -> LlavaNextConfig:
    """llava-hf/llava-v1.6-vicuna-7b-hf."""
    return LlavaNextConfig(
        vision_config=_clip_vit_l_336(),
        text_config=_vicuna("7b"),
        image_token_index=32000,
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        dtype="float16",
    )


def _qwen2_7b(vocabulary: int) -> Qwen2Config:
    """Qwen/Qwen2-7B and Qwen/Qwen2.5-7B, with the vocabulary of what was built on them."""
    return Qwen2Config(vocab_size=vocabulary, **_QWEN2_7B)


_QWEN2_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
}


def _llava_onevision_7b() -> LlavaOnevisionConfig:
    """llava-hf/llava-onevision-qwen2-7b-ov-hf: SigLIP without its last layer and its head."""
    sides = [384 * count for count in range(1, 7)]
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=26,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
            vision_use_head=False,
        ),
        text_config=_qwen2_7b(152128),
        image_token_index=151646,
        image_grid_pinpoints=[[height, width] for height in sides for width in sides],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        dtype="float16",
    )


def _qwen2_5_vl_7b() -> Qwen2_5_VLConfig:
    """Qwen/Qwen2.5-VL-7B-Instruct."""
    return Qwen2_5_VLConfig(
        text_config={**_QWEN2_7B, "vocab_size": 152064, "max_position_embeddings": 128000},
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        dtype="bfloat16",
    )


def _qwen3_vl_8b() -> Qwen3VLConfig:
    """Qwen/Qwen3-VL-8B-Instruct."""
    return Qwen3VLConfig(
        text_config={
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
        },
        vision_config={
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 4096,
            "patch_size": 16,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        dtype="bfloat16",
    )


def _internvl3_8b() -> InternVLConfig:
    """OpenGVLab/InternVL3-8B-hf: InternViT-300M and Qwen2.5-7B."""
    return InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            attention_bias=True,
            image_size=[448, 448],
            patch_size=[14, 14],
        ),
        text_config=_qwen2_7b(151674),
        image_token_id=151667,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def _smolvlm() -> Idefics3Config:
    """HuggingFaceTB/SmolVLM-Instruct (2.2 B): SigLIP and SmolLM2-1.7B in Idefics3's classes."""
    return Idefics3Config(
        vision_config=Idefics3VisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=49155,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=24,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=16384,
        ),
        image_token_id=49153,
        scale_factor=3,
        dtype="bfloat16",
    )


GEOMETRIES: dict[str, Callable[[], Any]] = {
    "internvl3-8b": _internvl3_8b,
    "llava-1.5-13b": lambda: _llava_1_5("13b"),
    "llava-1.5-7b": lambda: _llava_1_5("7b"),
    "llava-next-7b": _llava_next_7b,
    "llava-onevision-7b": _llava_onevision_7b,
    "qwen2.5-vl-7b": _qwen2_5_vl_7b,
    "qwen3-vl-8b": _qwen3_vl_8b,
    "smolvlm": _smolvlm,
}

HUB_IDS = {
    "OpenGVLab/InternVL3-8B-hf": "internvl3-8b",
    "llava-hf/llava-1.5-13b-hf": "llava-1.5-13b",
    "llava-hf/llava-1.5-7b-hf": "llava-1.5-7b",
    "llava-hf/llava-v1.6-vicuna-7b-hf": "llava-next-7b",
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": "llava-onevision-7b",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2.5-vl-7b",
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3-vl-8b",
    "HuggingFaceTB/SmolVLM-Instruct": "smolvlm",
}
"""Checkpoints on the hub whose geometry is known -> its name."""


def geometry(name: str) -> Any:
    """A fresh transformers config of the named geometry, or of a checkpoint in HUB_IDS.

    Raises:
        CostError: an unknown name; the message lists the known ones, the nearest first.

    >>> geometry("llava-1.5-7b").text_config.hidden_size
    4096
    """
    key = HUB_IDS.get(name, name).strip().lower().replace("_", "-")
    if key not in GEOMETRIES:
        ranked = difflib.get_close_matches(key, GEOMETRIES, n=len(GEOMETRIES), cutoff=0.0)
        raise CostError(f"geometry {name!r} is unknown; known, nearest first: {', '.join(ranked)}")
    return GEOMETRIES[key]()
