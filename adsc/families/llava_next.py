"""LLaVA-NeXT: any resolution: an overview, then crops without padding, and row-end tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
)
from adsc.families.llava import projector_macs, tile_of
from adsc.tiles import Region


def images(config: Any, inputs: Inputs) -> Images:
    """Any resolution: an overview, then crops without their padding, a newline after each row."""
    if inputs.get("pixel_values") is None:
        return encoded_images(inputs)
    sizes = rows_of(inputs["image_sizes"])
    return [anyres_image(config, size, None) for size in sizes]


def anyres_image(config: Any, size: list[int], bound: int | None) -> Image:
    """One image of `size` (height, width), counted with transformers' own geometry."""
    import torch
    from transformers.models.llava_next.modeling_llava_next import (
        get_anyres_image_grid_shape,
        image_size_to_num_patches,
        unpad_image,
    )

    tile, side = config.vision_config.image_size, side_of(config)
    if image_size_to_num_patches(size, config.image_grid_pinpoints, tile) == 1:
        return packed(side, 0, 0)
    rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, tile)
    height, width = unpad_image(torch.empty(0, rows * side, columns * side), size).shape[1:]
    if bound is not None:
        ratio = math.sqrt(height * width / (bound * side**2))
        if ratio > 1.1:
            height, width = int(height // ratio), int(width // ratio)
    return packed(side, height, width)


def packed(side: int, height: int, width: int) -> Image:
    """An overview, and what the model makes of all crops: one lattice with a token at the end of
    each row. Without crops one such token follows the overview."""
    start = side**2
    overview = Region(side, side, 0, side)
    if not height:
        return Image(start + 1, None, (overview, Region(1, 1, start, 1)))
    stride = width + 1
    ends = Region(height, 1, start + width, stride)
    regions = (overview, Region(height, width, start, stride), ends)
    return Image(start + height * stride, None, regions)


def find_row_ends(config: Any, inputs: Inputs, images: list[Image]) -> list[Image]:
    """Regions of images that were encoded beforehand: `generate` forgets sizes, but all row ends
    equal an image's last token. One read from the device for all."""
    import torch

    if features_of(inputs, "image") is None or torch.compiler.is_compiling():
        return images
    features = features_of(inputs, "image").pooler_output
    flags = torch.cat([(one == one[-1:]).all(-1) for one in features]).tolist()
    found, start = [], 0
    for image in images:
        ends = [at for at in range(image.tokens) if flags[start + at]]
        start += image.tokens
        width = ends[1] - ends[0] - 1 if len(ends) > 1 else 0
        known = packed(side_of(config), len(ends) if width else 0, width)
        found.append(known if known.tokens == image.tokens else image)
    return found


def cost(config: Any, image: ImageInput) -> ImageCost:
    """LLaVA-NeXT: the whole image and its tiles, whose padding is cut off, and row ends."""
    grid, tiles = anyres_grid(config, image.size)
    return anyres_cost(config, tiles, with_row_ends(grid))


def anyres_cost(config: Any, tiles: int, extra_tokens: int) -> ImageCost:
    """The whole image and its tiles pass tower and projector; `extra_tokens` is what the decoder
    sees besides the whole image's tokens."""
    n, tower = tile_of(config)
    return ImageCost(
        tokens=n + extra_tokens,
        tower_macs=(tiles + 1) * tower,
        projector_macs=(tiles + 1) * n * projector_macs(config),
    )


def with_row_ends(grid: tuple[int, int]) -> int:
    return grid[0] * (grid[1] + 1)


def best_resolution(size: tuple[int, int], resolutions: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The resolution (height, width) that keeps most pixels of an image, and of those the smallest;
    transformers' `select_best_resolution`, without the seconds that importing it takes."""

    def kept(resolution: Sequence[int]) -> tuple[int, int]:
        scale = min(resolution[1] / size[1], resolution[0] / size[0])
        pixels = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return pixels, pixels - resolution[0] * resolution[1]

    height, width = max(resolutions, key=kept)
    return height, width


def anyres_grid(config: Any, size: tuple[int, int] | None) -> tuple[tuple[int, int], int]:
    """Features (height, width) that are left of the tiles without padding, and how many tiles.

    The arithmetic is that of transformers' `unpad_image`, rounding included. Without a size, twice
    the tower's own: 2 x 2 tiles.
    """
    tile, patch = config.vision_config.image_size, config.vision_config.patch_size
    height, width = size or (2 * tile, 2 * tile)
    best = best_resolution((height, width), config.image_grid_pinpoints)
    across, down = math.ceil(best[1] / tile), math.ceil(best[0] / tile)
    rows, columns = (best[0] // tile) * (tile // patch), (best[1] // tile) * (tile // patch)
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        rows -= 2 * padding
    else:
        padding = (columns - int(round(width * (rows / height), 7))) // 2
        columns -= 2 * padding
    return (rows, columns), across * down


LLAVA_NEXT = Family(
    name="LLaVA-NeXT",
    model_type="llava_next",
    placeholders=(image_kind(images, find_row_ends),),
    cost=cost,
)
