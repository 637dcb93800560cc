"""Idefics3 and SmolVLM: tiles between words, each shuffled to fewer tokens."""

from __future__ import annotations

from typing import Any

from adsc.families.family import (
    Family,
    Image,
    ImageCost,
    ImageInput,
    Images,
    Inputs,
    features_of,
    image_kind,
    side_of,
    square,
    whole,
)
from adsc.families.towers import square_tower


def images(config: Any, inputs: Inputs) -> Images:
    """Tiles between words; some of `pixel_values` are padding, so their number is not checked."""
    if inputs.get("pixel_values") is None:
        whole(features_of(inputs, "image"))
    side = side_of(config) // config.scale_factor
    return Image(side**2, (side, side))


def cost(config: Any, image: ImageInput) -> ImageCost:
    """Idefics3 and SmolVLM: pixel shuffle, then one matrix."""
    n, tower = square_tower(config)
    shuffle = config.scale_factor**2
    n, width = n // shuffle, config.vision_config.hidden_size * shuffle
    projector = n * width * config.text_config.hidden_size
    return ImageCost(tokens=n, tower_macs=tower, projector_macs=projector, lattice=square(n))


_KINDS = (image_kind(images),)

SMOLVLM = Family(
    name="SmolVLM",
    model_type="smolvlm",
    placeholders=_KINDS,
    cost=cost,
    text_model="text_model",
)
IDEFICS3 = Family(
    name="Idefics3",
    model_type="idefics3",
    placeholders=_KINDS,
    cost=cost,
    text_model="text_model",
)
