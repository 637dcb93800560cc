"""Checkpoints of families that cut a picture into crops by its size, and pictures of many sizes;
and a LLaVA-1.5 of their parts.

Towers are small: a crop has 4 x 4 tokens, so an image has 17 to 190.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import transformers as hf
from PIL import Image

from tests.adsc.serving.engine.cases import BASE, SIDE, picture, spread

FAMILIES = ("llava_next", "llava_onevision")
SIZES = ((96, 96), (190, 100), (60, 200), (192, 192), (40, 31), (300, 150), (380, 400), (97, 96))
"""Widths and heights."""
PINPOINTS = [[96, 192], [192, 96], [192, 192], [96, 288], [288, 96]]
BESIDES = [[384, 384]]
"""Of LLaVA-OneVision: more crops than its bound allows, so they shrink."""
PATCH = 24
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}


@cache
def sized_picture(number: int) -> Image.Image:
    return picture(number).resize(SIZES[number % len(SIZES)])


def anyres_checkpoint(family: str, folder: Path) -> Path:
    """One with random weights; its tokenizer and the decoder's shape are the base's."""
    tokenizer = hf.AutoTokenizer.from_pretrained(BASE)
    known = hf.AutoConfig.from_pretrained(BASE)
    known.text_config.max_position_embeddings = 2048
    made = {"llava": _plain, "llava_next": _next, "llava_onevision": _onevision}
    config, processor = made[family](tokenizer, known)
    model: Any = hf.AutoModelForImageTextToText.from_config(config)
    spread(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _next(tokenizer: Any, known: Any) -> tuple[Any, Any]:
    """A CLIP tower, a LLaMA."""
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**SHAPE, projection_dim=64),
        text_config=known.text_config,
        image_token_index=known.image_token_index,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    images = hf.LlavaNextImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
    )
    return config, hf.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _onevision(tokenizer: Any, known: Any) -> tuple[Any, Any]:
    """A SigLIP tower, a Qwen2."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    pinpoints = PINPOINTS + BESIDES
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**SHAPE),
        text_config=_qwen2(known, len(tokenizer)),
        image_token_index=known.image_token_index,
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=False,
    )
    size = {"height": SIDE, "width": SIDE}
    return config, hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer,
        hf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )


def _plain(tokenizer: Any, known: Any) -> tuple[Any, Any]:
    """A SigLIP tower, a Qwen2."""
    config = hf.LlavaConfig(
        vision_config=hf.SiglipVisionConfig(**SHAPE),
        text_config=_qwen2(known, len(tokenizer)),
        image_token_index=known.image_token_index,
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    return config, hf.LlavaProcessor(
        hf.SiglipImageProcessor(size={"height": SIDE, "width": SIDE}),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
    )


def _qwen2(known: Any, words: int) -> Any:
    text = known.text_config
    return hf.Qwen2Config(
        vocab_size=words,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        max_position_embeddings=text.max_position_embeddings,
    )
