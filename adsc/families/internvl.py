"""InternVL: tiles of a fixed size that are pictures to the model, each shuffled to fewer tokens."""

from __future__ import annotations

from typing import Any

from adsc.families.family import (
    Family,
    Image,
    ImageCost,
    ImageInput,
    Images,
    Inputs,
    image_kind,
    pixels_of,
    square,
)
from adsc.families.llava import tile_of


def images(config: Any, inputs: Inputs) -> Images:
    """Tiles of a fixed size, each shuffled to a quarter of its patches (`downsample_ratio`)."""
    number, _, width = pixels_of(inputs)
    patch = config.vision_config.patch_size
    patch = patch if isinstance(patch, int) else patch[0]
    side = int(width // patch * config.downsample_ratio)
    return [Image(side**2, (side, side))] * number


def cost(config: Any, image: ImageInput) -> ImageCost:
    """InternVL: pixel shuffle, then two matrices."""
    n, tower = tile_of(config)
    shuffle = int(1 / config.downsample_ratio) ** 2
    n, out = n // shuffle, config.text_config.hidden_size
    width = config.vision_config.hidden_size * shuffle
    projector = n * (width * out + out * out)
    return ImageCost(tokens=n, tower_macs=tower, projector_macs=projector, lattice=square(n))


INTERNVL = Family(
    name="InternVL", model_type="internvl", placeholders=(image_kind(images),), cost=cost
)
