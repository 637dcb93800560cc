"""LLaVA-OneVision: LLaVA-NeXT with a bound on crops, and video."""

from __future__ import annotations

import math
from typing import Any

from adsc.families.family import (
    Family,
    Image,
    ImageCost,
    ImageInput,
    Images,
    Inputs,
    encoded_images,
    features_of,
    image_kind,
    rows_of,
    side_of,
    video_kind,
    whole,
)
from adsc.families.llava_next import (
    anyres_cost,
    anyres_grid,
    anyres_image,
    find_row_ends,
    packed,
    with_row_ends,
)


def images(config: Any, inputs: Inputs) -> Images:
    """As LLaVA-NeXT, with a bound on crops; several images in a sample may come without crops."""
    if inputs.get("pixel_values") is None:
        return encoded_images(inputs)
    sizes = rows_of(inputs["image_sizes"])
    numbers = inputs.get("batch_num_images")
    cropped = [True] * len(sizes)
    if numbers is not None:
        cropped = [n == 1 for n in rows_of(numbers) for _ in range(n)]
    # The forward passes no aspect ratio on, so the config's is what counts.
    bound = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    return [
        anyres_image(config, size, bound) if crops else packed(side_of(config), 0, 0)
        for size, crops in zip(sizes, cropped, strict=True)
    ]


def videos_of(config: Any, inputs: Inputs) -> Images:
    """Frames pooled to half their side, and one newline at the end of a video."""
    side = math.ceil(side_of(config) / 2)
    if (pixels := inputs.get("pixel_values_videos")) is not None:
        videos, frames = pixels.shape[:2]
    else:
        features = whole(features_of(inputs, "video")).pooler_output
        videos, frames = len(features), (features[0].shape[0] - 1) // side**2
    return ([Image(side**2, (side, side))] * frames + [Image(1, (1, 1))]) * videos


def cost(config: Any, image: ImageInput) -> ImageCost:
    """LLaVA-OneVision: as LLaVA-NeXT, shrunk where the tiles are too many; several images in a row
    are not cut."""
    if image.images_in_row > 1:
        return anyres_cost(config, 0, 1)
    (height, width), tiles = anyres_grid(config, image.size)
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    side = config.vision_config.image_size // config.vision_config.patch_size
    ratio = math.sqrt(height * width / (most * side**2))
    if ratio > 1.1:
        height, width = int(height // ratio), int(width // ratio)
    return anyres_cost(config, tiles, with_row_ends((height, width)))


LLAVA_ONEVISION = Family(
    name="LLaVA-OneVision",
    model_type="llava_onevision",
    placeholders=(image_kind(images, find_row_ends), video_kind(videos_of)),
    cost=cost,
)
