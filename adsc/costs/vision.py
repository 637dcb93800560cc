"""What one image costs and how many vision tokens it becomes, per model family.

It reads configs and does integer arithmetic: no model is built and no image is opened; the size of
the picture is all that it needs, and only where the token count depends on it. A family is one
function and one row of `FAMILIES`. Towers are in `vision_towers`; videos are not counted.

Legend: n tokens, t tiles, d width of the tower, D width of the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.image_processing_utils import select_best_resolution

from adsc.costs.error import CostError
from adsc.costs.towers import (
    qwen2_5_vl_tower,
    qwen2_vl_tower,
    qwen3_vl_tower,
    qwen_grid,
    square_tower,
)
from adsc.families import first_legal_layer


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """What a family may need to know of an image.

    Attributes:
        size: (height, width) in pixels, None for the family's usual size.
        images_in_row: LLaVA-OneVision cuts an image into tiles only when it is alone in its row.
    """

    size: tuple[int, int] | None = None
    images_in_row: int = 1


@dataclass(frozen=True, kw_only=True)
class ImageCost:
    """One image: `tokens` vision tokens in the decoder, and MACs to make them, half of what
    torch's FlopCounterMode reports for the same work; `lattice` is the tokens' (height, width) if
    they lie on one."""

    tokens: int
    tower_macs: int
    projector_macs: int
    lattice: tuple[int, int] | None = None

    @property
    def macs(self) -> int:
        return self.tower_macs + self.projector_macs


def image_cost(config: Any, image: ImageInput) -> ImageCost:
    """Tokens and MACs of one image.

    Where a processor cuts an image into tiles that the model takes for images (InternVL, SmolVLM,
    Gemma 3's pan and scan), this is the cost of one tile.

    Raises:
        CostError: the family, or its vision tower, is not among those counted.
    """
    family = getattr(config, "model_type", None)
    if family not in FAMILIES:
        raise CostError(
            f"no exact cost for model type {family!r}: supported are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[family](config, image)


def _llava(config: Any, image: ImageInput) -> ImageCost:
    """LLaVA-1.5: one tile, a projector of two matrices."""
    n, tower = _tile(config)
    projector = n * llava_projector(config)
    return ImageCost(tokens=n, tower_macs=tower, projector_macs=projector, lattice=_square(n))


def _square(n: int) -> tuple[int, int] | None:
    side = math.isqrt(n)
    return (side, side) if side**2 == n else None


def _tile(config: Any) -> tuple[int, int]:
    """Tokens that are selected from one tile, and the tower's MACs for it."""
    n, macs = square_tower(config)
    return n - (config.vision_feature_select_strategy == "default"), macs


def llava_projector(config: Any) -> int:
    """MACs for one token."""
    layers, out = config.vision_feature_layer, config.text_config.hidden_size
    width = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
    return width * out + out * out


def _llava_next(config: Any, image: ImageInput) -> ImageCost:
    """LLaVA-NeXT: the whole image and its tiles, whose padding is cut off, and row ends."""
    grid, tiles = anyres_grid(config, image.size)
    return _anyres_cost(config, tiles, _with_row_ends(grid))


def _llava_onevision(config: Any, image: ImageInput) -> ImageCost:
    """LLaVA-OneVision: as LLaVA-NeXT, shrunk where the tiles are too many; several images in a row
    are not cut."""
    if image.images_in_row > 1:
        return _anyres_cost(config, 0, 1)
    (height, width), tiles = anyres_grid(config, image.size)
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    side = config.vision_config.image_size // config.vision_config.patch_size
    ratio = math.sqrt(height * width / (most * side**2))
    if ratio > 1.1:
        height, width = int(height // ratio), int(width // ratio)
    return _anyres_cost(config, tiles, _with_row_ends((height, width)))


def _anyres_cost(config: Any, tiles: int, extra_tokens: int) -> ImageCost:
    """The whole image and its tiles pass tower and projector; `extra_tokens` is what the decoder
    sees besides the whole image's tokens."""
    n, tower = _tile(config)
    return ImageCost(
        tokens=n + extra_tokens,
        tower_macs=(tiles + 1) * tower,
        projector_macs=(tiles + 1) * n * llava_projector(config),
    )


def _with_row_ends(grid: tuple[int, int]) -> int:
    return grid[0] * (grid[1] + 1)


def anyres_grid(config: Any, size: tuple[int, int] | None) -> tuple[tuple[int, int], int]:
    """Features (height, width) that are left of the tiles without padding, and how many tiles.

    The arithmetic is that of transformers' `unpad_image`, rounding included. Without a size, twice
    the tower's own: 2 x 2 tiles.
    """
    tile, patch = config.vision_config.image_size, config.vision_config.patch_size
    height, width = size or (2 * tile, 2 * tile)
    best = select_best_resolution((height, width), config.image_grid_pinpoints)
    across, down = math.ceil(best[1] / tile), math.ceil(best[0] / tile)
    rows, columns = (best[0] // tile) * (tile // patch), (best[1] // tile) * (tile // patch)
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        rows -= 2 * padding
    else:
        padding = (columns - int(round(width * (rows / height), 7))) // 2
        columns -= 2 * padding
    return (rows, columns), across * down


def _qwen(tower_macs: Callable[[Any, tuple[int, int]], int]) -> Callable[..., ImageCost]:
    def cost(config: Any, image: ImageInput) -> ImageCost:
        """Qwen-VL: native resolution; each 2 x 2 patches are merged by an MLP of two matrices."""
        tower = config.vision_config
        grid = qwen_grid(tower, image.size)
        n = grid[0] * grid[1]
        # Qwen2-VL calls the tower's width embed_dim, and the decoder's hidden_size.
        d = getattr(tower, "embed_dim", None) or tower.hidden_size
        out = getattr(tower, "out_hidden_size", None) or tower.hidden_size
        merged = d * tower.spatial_merge_size**2
        # Qwen3-VL also merges the features of a few layers on the way (deepstack).
        mergers = 1 + first_legal_layer(config)
        return ImageCost(
            tokens=n,
            tower_macs=tower_macs(tower, grid),
            projector_macs=mergers * n * (merged * merged + merged * out),
            lattice=grid,
        )

    return cost


def _internvl(config: Any, image: ImageInput) -> ImageCost:
    """InternVL: pixel shuffle, then two matrices."""
    n, tower = _tile(config)
    shuffle = int(1 / config.downsample_ratio) ** 2
    n, out = n // shuffle, config.text_config.hidden_size
    width = config.vision_config.hidden_size * shuffle
    projector = n * (width * out + out * out)
    return ImageCost(tokens=n, tower_macs=tower, projector_macs=projector, lattice=_square(n))


def _idefics3(config: Any, image: ImageInput) -> ImageCost:
    """Idefics3 and SmolVLM: pixel shuffle, then one matrix."""
    n, tower = square_tower(config)
    shuffle = config.scale_factor**2
    n, width = n // shuffle, config.vision_config.hidden_size * shuffle
    projector = n * width * config.text_config.hidden_size
    return ImageCost(tokens=n, tower_macs=tower, projector_macs=projector, lattice=_square(n))


def _gemma3(config: Any, image: ImageInput) -> ImageCost:
    """Gemma 3: average pooling to `mm_tokens_per_image`, then one matrix."""
    _, tower = square_tower(config)
    side = config.vision_config.image_size // config.vision_config.patch_size
    pool = side // int(config.mm_tokens_per_image**0.5)
    n = (side // pool) ** 2
    projector = n * config.vision_config.hidden_size * config.text_config.hidden_size
    return ImageCost(tokens=n, tower_macs=tower, projector_macs=projector, lattice=_square(n))


def _paligemma(config: Any, image: ImageInput) -> ImageCost:
    """PaliGemma: one matrix."""
    n, tower = square_tower(config)
    projector = n * config.vision_config.hidden_size * config.vision_config.projection_dim
    return ImageCost(tokens=n, tower_macs=tower, projector_macs=projector, lattice=_square(n))


FAMILIES: dict[str, Callable[[Any, ImageInput], ImageCost]] = {
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "paligemma": _paligemma,
    "qwen2_5_vl": _qwen(qwen2_5_vl_tower),
    "qwen2_vl": _qwen(qwen2_vl_tower),
    "qwen3_vl": _qwen(qwen3_vl_tower),
    "smolvlm": _idefics3,
}
