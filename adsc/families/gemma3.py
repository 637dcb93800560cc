"""Gemma 3: a fixed number of tokens an image, which attend to each other both ways."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

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
from adsc.families.towers import square_tower

if TYPE_CHECKING:
    from torch import Tensor


def images(config: Any, inputs: Inputs) -> Images:
    """A fixed number of tokens, pooled from the patches."""
    side = math.isqrt(config.mm_tokens_per_image)
    return [Image(side**2, (side, side))] * pixels_of(inputs)[0]


def blocks(inputs: Inputs, past: int, width: int) -> Tensor | None:
    """Each run of image tokens attends to itself both ways."""
    import torch
    from torch import nn

    if (types := inputs.get("token_type_ids")) is None:
        return None
    image = types[:, -width:] == 1
    starts = image & ~nn.functional.pad(image, (1, 0))[:, :-1]
    return torch.where(image, starts.cumsum(1) - 1, -1)


def cost(config: Any, image: ImageInput) -> ImageCost:
    """Gemma 3: average pooling to `mm_tokens_per_image`, then one matrix."""
    _, tower = square_tower(config)
    side = config.vision_config.image_size // config.vision_config.patch_size
    pool = side // int(config.mm_tokens_per_image**0.5)
    n = (side // pool) ** 2
    projector = n * config.vision_config.hidden_size * config.text_config.hidden_size
    return ImageCost(tokens=n, tower_macs=tower, projector_macs=projector, lattice=square(n))


GEMMA3 = Family(
    name="Gemma 3",
    model_type="gemma3",
    placeholders=(image_kind(images),),
    cost=cost,
    blocks=blocks,
    window_cuts_blocks=True,
    rotary_by_layer_type=True,
)
