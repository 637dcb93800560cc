"""LLaVA-1.5: a fixed patch grid, one tile, a projector of two matrices."""

from __future__ import annotations

from typing import Any

from adsc.families.family import (
    Family,
    Image,
    ImageCost,
    ImageInput,
    Images,
    Inputs,
    encoded_images,
    image_kind,
    pixels_of,
    rows_of,
    square,
)
from adsc.families.towers import square_tower
from adsc.tiles import Region


def images(config: Any, inputs: Inputs) -> Images:
    """A fixed patch grid; the tower's class token goes (`default`) or stays (`full`)."""
    patch = config.vision_config.patch_size
    if (sizes := inputs.get("image_sizes")) is not None:  # towers of native resolution (Pixtral)
        grids = [(int(h) // patch, int(w) // patch) for h, w in rows_of(sizes)]
        return [Image(h * w, (h, w)) for h, w in grids]
    strategy = inputs.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
    has_class_token = "clip" in config.vision_config.model_type
    if config.vision_config.model_type == "pixtral":  # encoded beforehand
        return encoded_images(inputs)
    number, height, width = pixels_of(inputs)
    height, width = height // patch, width // patch
    tokens = height * width + has_class_token - (strategy == "default")
    if tokens == height * width:
        return [Image(tokens, (height, width))] * number
    before = tokens - height * width  # the class token
    regions = (Region(1, before, 0, before), Region(height, width, before, width))
    return [Image(tokens, None, regions if before > 0 else ())] * number


def cost(config: Any, image: ImageInput) -> ImageCost:
    """LLaVA-1.5: one tile, a projector of two matrices."""
    n, tower = tile_of(config)
    projector = n * projector_macs(config)
    return ImageCost(tokens=n, tower_macs=tower, projector_macs=projector, lattice=square(n))


def tile_of(config: Any) -> tuple[int, int]:
    """Tokens that are selected from one tile, and the tower's MACs for it."""
    n, macs = square_tower(config)
    return n - (config.vision_feature_select_strategy == "default"), macs


def projector_macs(config: Any) -> int:
    """MACs for one token."""
    layers, out = config.vision_feature_layer, config.text_config.hidden_size
    width = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
    return width * out + out * out


LLAVA = Family(name="LLaVA-1.5", model_type="llava", placeholders=(image_kind(images),), cost=cost)
