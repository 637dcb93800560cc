"""True geometries of known checkpoints by name: for costs and benchmarks without a download.

Shapes only: no weights, no tokenizer, and no promise that other settings match the hub's. The
comment beside each names its checkpoint; a test compares the numbers of parameters. Costs read the
numbers as they stand here, so counting needs no transformers; `geometry` makes a transformers
config of them.
"""

from __future__ import annotations

import difflib
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

from adsc.errors import CostError

# openai/clip-vit-large-patch14-336: 24 x 24 patches and a class token.
_CLIP_VIT_L_336: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def _vicuna(width: int, mlp: int, layers: int, heads: int) -> dict[str, Any]:
    """lmsys/vicuna-{7b,13b}-v1.5, with the vocabulary padded as in the llava-hf checkpoints."""
    return {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }


_VICUNA_7B = _vicuna(4096, 11008, 32, 32)
_VICUNA_13B = _vicuna(5120, 13824, 40, 40)


def _llava_1_5(decoder: dict[str, Any]) -> dict[str, Any]:
    """llava-hf/llava-1.5-{7b,13b}-hf."""
    return {
        "model_type": "llava",
        "vision_config": _CLIP_VIT_L_336,
        "text_config": decoder,
        "image_token_index": 32000,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "dtype": "float16",
    }


# llava-hf/llava-v1.6-vicuna-7b-hf.
_LLAVA_NEXT_7B: dict[str, Any] = {
    **_llava_1_5(_VICUNA_7B),
    "model_type": "llava_next",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}

# Qwen/Qwen2-7B and Qwen/Qwen2.5-7B; what was built on them has vocabularies of its own.
_QWEN2_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
}

_SIDES = [384 * count for count in range(1, 7)]

# llava-hf/llava-onevision-qwen2-7b-ov-hf: SigLIP without its last layer and its head.
_LLAVA_ONEVISION_7B: dict[str, Any] = {
    "model_type": "llava_onevision",
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "num_channels": 3,
        "image_size": 384,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "text_config": {**_QWEN2_7B, "vocab_size": 152128},
    "image_token_index": 151646,
    "image_grid_pinpoints": [[height, width] for height in _SIDES for width in _SIDES],
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "vision_aspect_ratio": "anyres_max_9",
    "dtype": "float16",
}

# Qwen/Qwen2.5-VL-7B-Instruct.
_QWEN2_5_VL_7B: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "text_config": {
        **_QWEN2_7B,
        "model_type": "qwen2_5_vl_text",
        "vocab_size": 152064,
        "max_position_embeddings": 128000,
    },
    "vision_config": {
        "model_type": "qwen2_5_vl_vision",
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "in_channels": 3,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "dtype": "bfloat16",
}

# Qwen/Qwen3-VL-8B-Instruct.
_QWEN3_VL_8B: dict[str, Any] = {
    "model_type": "qwen3_vl",
    "text_config": {
        "model_type": "qwen3_vl_text",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
    },
    "vision_config": {
        "model_type": "qwen3_vl_vision",
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 4096,
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "deepstack_visual_indexes": [8, 16, 24],
    },
    "dtype": "bfloat16",
}

# OpenGVLab/InternVL3-8B-hf: InternViT-300M and Qwen2.5-7B.
_INTERNVL3_8B: dict[str, Any] = {
    "model_type": "internvl",
    "vision_config": {
        "model_type": "internvl_vision",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "attention_bias": True,
        "num_channels": 3,
        "image_size": [448, 448],
        "patch_size": [14, 14],
    },
    "text_config": {**_QWEN2_7B, "vocab_size": 151674},
    "image_token_id": 151667,
    "downsample_ratio": 0.5,
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}

# HuggingFaceTB/SmolVLM-Instruct (2.2 B): SigLIP and SmolLM2-1.7B in Idefics3's classes.
_SMOLVLM: dict[str, Any] = {
    "model_type": "idefics3",
    "vision_config": {
        "model_type": "idefics3_vision",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_channels": 3,
        "image_size": 384,
        "patch_size": 14,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": 49155,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 16384,
    },
    "image_token_id": 49153,
    "scale_factor": 3,
    "dtype": "bfloat16",
}

GEOMETRIES: dict[str, dict[str, Any]] = {
    "internvl3-8b": _INTERNVL3_8B,
    "llava-1.5-13b": _llava_1_5(_VICUNA_13B),
    "llava-1.5-7b": _llava_1_5(_VICUNA_7B),
    "llava-next-7b": _LLAVA_NEXT_7B,
    "llava-onevision-7b": _LLAVA_ONEVISION_7B,
    "qwen2.5-vl-7b": _QWEN2_5_VL_7B,
    "qwen3-vl-8b": _QWEN3_VL_8B,
    "smolvlm": _SMOLVLM,
}
"""Name -> fields of its config, as in a config.json."""

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


class Shape(SimpleNamespace):
    """The numbers of a geometry under the names that they have in a transformers config."""

    def get_text_config(self) -> Any:
        """The decoder's."""
        return self.text_config


def shape(name: str) -> Shape:
    """The named geometry, or that of a checkpoint in HUB_IDS, for counting alone: no transformers.

    Raises:
        CostError: an unknown name; the message lists the known ones, the nearest first.

    >>> shape("llava-1.5-7b").text_config.hidden_size
    4096
    """
    sections = {
        key: SimpleNamespace(**value) if isinstance(value, dict) else value
        for key, value in _fields(name).items()
    }
    return Shape(**sections)


def geometry(name: str) -> Any:
    """The same as a fresh transformers config, from which a model can be built.

    Raises:
        CostError: an unknown name; the message lists the known ones, the nearest first.

    >>> geometry("llava-1.5-7b").text_config.hidden_size
    4096
    """
    fields = deepcopy(_fields(name))
    from transformers import AutoConfig

    return AutoConfig.for_model(**fields)


def _fields(name: str) -> dict[str, Any]:
    key = HUB_IDS.get(name, name).strip().lower().replace("_", "-")
    if key not in GEOMETRIES:
        ranked = difflib.get_close_matches(key, GEOMETRIES, n=len(GEOMETRIES), cutoff=0.0)
        raise CostError(f"geometry {name!r} is unknown; known, nearest first: {', '.join(ranked)}")
    return GEOMETRIES[key]
