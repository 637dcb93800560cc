"""PaliGemma 1 and 2: a token for each patch; the prefix attends both ways."""

from __future__ import annotations

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
    side_of,
    square,
)
from adsc.families.towers import square_tower

if TYPE_CHECKING:
    from torch import Tensor


def images(config: Any, inputs: Inputs) -> Images:
    """One token for each patch."""
    return [Image(side_of(config) ** 2, (side_of(config), side_of(config)))] * pixels_of(inputs)[0]


def blocks(inputs: Inputs, past: int, width: int) -> Tensor | None:
    """The prefix, image and question, attends to itself both ways; the answer is causal."""
    import torch

    types = inputs.get("token_type_ids")
    return None if types is None else torch.where(types[:, -width:] == 0, 0, -1)


def cost(config: Any, image: ImageInput) -> ImageCost:
    """PaliGemma: one matrix."""
    n, tower = square_tower(config)
    projector = n * config.vision_config.hidden_size * config.vision_config.projection_dim
    return ImageCost(tokens=n, tower_macs=tower, projector_macs=projector, lattice=square(n))


PALIGEMMA = Family(
    name="PaliGemma",
    model_type="paligemma",
    placeholders=(image_kind(images),),
    cost=cost,
    blocks=blocks,
)
