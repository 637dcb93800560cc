"""Tiny models of every family with pictures of known size, for what `estimate_cost` counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf

IMAGE_TOKEN = 90
DECODER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 512,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
TOKENS = {"image_token_id": IMAGE_TOKEN, "video_token_id": 91}
TOKENS |= {"vision_start_token_id": 92, "vision_end_token_id": 93}


@dataclass
class Case:
    """A tiny model, and the inputs of `images` pictures of `size` pixels."""

    model: type
    config: Callable[[], Any]
    tokens: int
    pictures: Callable[[int, int], dict[str, Any]]
    size: tuple[int, int] | None = None
    most_images: int = 2
    extra: dict[str, Any] = field(default_factory=dict)


def plain(side: int = 28) -> Callable[[int, int], dict[str, Any]]:
    return lambda rows, images: {"pixel_values": torch.randn(rows * images, 3, side, side)}


def stacked(rows: int, images: int) -> dict[str, Any]:
    """Idefics3 keeps the images of a row together, and drops those that are all zero."""
    return {"pixel_values": torch.randn(rows, images, 3, 28, 28)}


def tiled(tiles: int, size: tuple[int, int], *, onevision: bool = False) -> Callable[..., Any]:
    def pictures(rows: int, images: int) -> dict[str, Any]:
        cut = tiles if images == 1 or not onevision else 1
        inputs = {
            "pixel_values": torch.randn(rows * images, cut, 3, 28, 28),
            "image_sizes": torch.tensor([size] * (rows * images)),
        }
        return inputs | ({"batch_num_images": torch.tensor([images] * rows)} if onevision else {})

    return pictures


def patches(grid: tuple[int, int], patch: int) -> Callable[[int, int], dict[str, Any]]:
    """Flattened patches of the Qwen-VL processors: two frames of three channels."""

    def pictures(rows: int, images: int) -> dict[str, Any]:
        count = rows * images * grid[0] * grid[1]
        return {
            "pixel_values": torch.randn(count, 3 * 2 * patch * patch),
            "image_grid_thw": torch.tensor([[1, *grid]] * (rows * images)),
        }

    return pictures


ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84], [112, 112]]


def clip_llava_next() -> Any:
    return tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**TOWER),
        text_config=tf.LlamaConfig(**DECODER),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=PINPOINTS,
    )


def onevision(most: int) -> Any:
    return tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=tf.Qwen2Config(**DECODER),
        image_token_index=IMAGE_TOKEN,
        video_token_index=91,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio=f"anyres_max_{most}",
    )


def qwen2_vl() -> Any:
    return tf.Qwen2VLConfig(
        text_config=DECODER | {"rope_parameters": ROPE},
        vision_config={"depth": 3, "embed_dim": 32, "hidden_size": 64, "num_heads": 4}
        | {"mlp_ratio": 3, "patch_size": 4},
        **TOKENS,
    )


def qwen2_5_vl() -> Any:
    return tf.Qwen2_5_VLConfig(
        text_config=DECODER | {"rope_parameters": ROPE},
        vision_config={"depth": 4, "hidden_size": 32, "intermediate_size": 40, "num_heads": 4}
        | {"out_hidden_size": 64, "patch_size": 4, "window_size": 16}
        | {"fullatt_block_indexes": [1, 3]},
        **TOKENS,
    )


def qwen3_vl() -> Any:
    return tf.Qwen3VLConfig(
        text_config=DECODER | {"head_dim": 16, "rope_parameters": ROPE},
        vision_config={"depth": 4, "hidden_size": 32, "intermediate_size": 40, "num_heads": 4}
        | {"out_hidden_size": 64, "patch_size": 4, "num_position_embeddings": 16}
        | {"deepstack_visual_indexes": [0, 2]},
        **TOKENS,
    )


def internvl() -> Any:
    return tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(**TOWER),
        text_config=tf.Qwen2Config(**DECODER),
        image_token_id=IMAGE_TOKEN,
    )


def smolvlm() -> Any:
    return tf.SmolVLMConfig(
        vision_config=tf.SmolVLMVisionConfig(**TOWER).to_dict(),
        text_config=tf.LlamaConfig(**DECODER),
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
        pad_token_id=0,
    )


def idefics3() -> Any:
    return tf.Idefics3Config(
        vision_config=tf.Idefics3VisionConfig(**TOWER).to_dict(),
        text_config=tf.LlamaConfig(**DECODER),
        image_token_id=IMAGE_TOKEN,
        scale_factor=4,
        pad_token_id=0,
    )


def gemma3() -> Any:
    layers = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    return tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(**TOWER | {"image_size": 56}, vision_use_head=False),
        text_config=tf.Gemma3TextConfig(
            **DECODER | {"head_dim": 24}, sliding_window=12, layer_types=layers
        ),
        mm_tokens_per_image=16,
        image_token_index=IMAGE_TOKEN,
    )


def paligemma(text: type, **changes: Any) -> Any:
    return tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(
            **TOWER, vision_use_head=False, projection_dim=64
        ).to_dict()
        | {"projection_dim": 64},
        text_config=text(**DECODER | {"head_dim": 16} | changes),
        image_token_index=IMAGE_TOKEN,
        projection_dim=64,
    )


def types(rows_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"token_type_ids": (rows_ids == IMAGE_TOKEN).long()}


QWEN2, QWEN25 = tf.Qwen2VLForConditionalGeneration, tf.Qwen2_5_VLForConditionalGeneration
QWEN3, NEXT = tf.Qwen3VLForConditionalGeneration, tf.LlavaNextForConditionalGeneration
ONE = tf.LlavaOnevisionForConditionalGeneration
CASES = {
    # 56 x 56 is 2 x 2 tiles of 4 x 4; the whole image has 16 tokens more, rows end with one.
    "llava_next, square": Case(NEXT, clip_llava_next, 16 + 8 * 9, tiled(5, (56, 56)), (56, 56)),
    "llava_next, default size": Case(NEXT, clip_llava_next, 16 + 8 * 9, tiled(5, (56, 56))),
    "llava_next, padded": Case(NEXT, clip_llava_next, 16 + 6 * 9, tiled(5, (40, 56)), (40, 56)),
    "llava_next, wide": Case(NEXT, clip_llava_next, 16 + 2 * 13, tiled(4, (20, 82)), (20, 82)),
    "llava_onevision": Case(
        ONE, lambda: onevision(9), 16 + 8 * 9, tiled(5, (56, 56), onevision=True), (56, 56), 1
    ),
    "llava_onevision, shrunk": Case(
        ONE, lambda: onevision(4), 16 + 8 * 9, tiled(17, (112, 112), onevision=True), (112, 112), 1
    ),
    "qwen2_vl": Case(QWEN2, qwen2_vl, 24, patches((8, 12), 4), (32, 48)),
    "qwen2_vl, rounded": Case(QWEN2, qwen2_vl, 24, patches((8, 12), 4), (35, 45)),
    # Windows of 2 x 2 merged patches over 3 x 5: cut at both edges.
    "qwen2_5_vl": Case(QWEN25, qwen2_5_vl, 15, patches((6, 10), 4), (24, 40)),
    "qwen2_5_vl, whole windows": Case(QWEN25, qwen2_5_vl, 16, patches((8, 8), 4), (32, 32)),
    "qwen2_5_vl, default size": Case(QWEN25, qwen2_5_vl, 576, patches((48, 48), 4), most_images=1),
    "qwen3_vl": Case(QWEN3, qwen3_vl, 15, patches((6, 10), 4), (24, 40)),
    "internvl": Case(tf.InternVLForConditionalGeneration, internvl, 4, plain()),
    "smolvlm": Case(tf.SmolVLMForConditionalGeneration, smolvlm, 4, stacked),
    "idefics3": Case(tf.Idefics3ForConditionalGeneration, idefics3, 1, stacked),
    "gemma3": Case(tf.Gemma3ForConditionalGeneration, gemma3, 16, plain(56)),
    "paligemma": Case(
        tf.PaliGemmaForConditionalGeneration, lambda: paligemma(tf.GemmaConfig), 16, plain()
    ),
    "paligemma 2, sliding": Case(
        tf.PaliGemmaForConditionalGeneration,
        lambda: paligemma(tf.Gemma2Config, sliding_window=20),
        16,
        plain(),
    ),
}


def ids(tokens: int, images: int, rows: int, text: int) -> torch.Tensor:
    row = [5]
    for _ in range(images):
        row += [92] + [IMAGE_TOKEN] * tokens + [93]
    row += [6] * (text - 1 - 2 * images)
    return torch.tensor([row] * rows)
