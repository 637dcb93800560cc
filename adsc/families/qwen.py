"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: native resolution, patches merged by squares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adsc.families.family import (
    GRID,
    Family,
    Image,
    ImageCost,
    ImageInput,
    Images,
    Inputs,
    features_of,
    image_kind,
    rows_of,
    video_kind,
    whole,
)
from adsc.families.towers import qwen2_5_vl_tower, qwen2_vl_tower, qwen3_vl_tower, qwen_grid


def images(config: Any, inputs: Inputs) -> Images:
    return _qwen_grids(config, inputs, "image")


def videos(config: Any, inputs: Inputs) -> Images:
    return _qwen_grids(config, inputs, "video")


def _qwen_grids(config: Any, inputs: Inputs, kind: str) -> Images:
    """Native resolution: t x h x w patches, merged by squares in space."""
    merge = config.vision_config.spatial_merge_size
    if (given := inputs.get(f"{kind}_grid_thw")) is not None:
        grids = rows_of(given)
    else:
        # Encoded beforehand: the tower's output tells the grids, in the order of distinct features
        # (beams share theirs).
        output = whole(features_of(inputs, kind))
        distinct = list({id(one): None for one in output.pooler_output})
        known = dict(zip(distinct, getattr(output, GRID), strict=True))
        grids = [known[id(one)] for one in output.pooler_output]
    return [
        Image(h * w // merge**2, (h // merge, w // merge)) for t, h, w in grids for _ in range(t)
    ]


def _deepstack_layers(config: Any) -> int:
    """Image features are added to all vision tokens after each of these layers."""
    return len(config.vision_config.deepstack_visual_indexes)


def cost_with(tower_macs: Callable[[Any, tuple[int, int]], int]) -> Callable[..., ImageCost]:
    """Costs with a tower of `tower_macs(vision config, grid of merged patches)`."""

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
        mergers = 1 + len(getattr(tower, "deepstack_visual_indexes", ()))
        return ImageCost(
            tokens=n,
            tower_macs=tower_macs(tower, grid),
            projector_macs=mergers * n * (merged * merged + merged * out),
            lattice=grid,
        )

    return cost


_KINDS = (image_kind(images), video_kind(videos))

QWEN2_VL = Family(
    name="Qwen2-VL",
    model_type="qwen2_vl",
    placeholders=_KINDS,
    cost=cost_with(qwen2_vl_tower),
    axes=3,
)
QWEN2_5_VL = Family(
    name="Qwen2.5-VL",
    model_type="qwen2_5_vl",
    placeholders=_KINDS,
    cost=cost_with(qwen2_5_vl_tower),
    axes=3,
)
QWEN3_VL = Family(
    name="Qwen3-VL",
    model_type="qwen3_vl",
    placeholders=_KINDS,
    cost=cost_with(qwen3_vl_tower),
    first_layer=_deepstack_layers,
    axes=3,
)
