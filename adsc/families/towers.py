"""Vision towers: how many tokens leave one, and how many MACs one tile costs it.

Only matmuls and the patch convolution count, which is what torch.utils.flop_counter counts; norms,
rotary angles, pooling and position interpolation are elementwise. Projectors are in the families.

Legend: n patches, d width, m MLP width, s side of a square.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adsc.errors import CostError


def encoder_macs(n: int, d: int, m: int, layers: int, *, mlp_matrices: int = 2) -> int:
    """Layers of q, k, v, output projections, global attention among n tokens, and an MLP."""
    return layers * (4 * n * d * d + 2 * n * n * d + mlp_matrices * n * d * m)


def square_tower(config: Any) -> tuple[int, int]:
    """Tokens that leave the tower for one tile of its own size, and their MACs.

    Counts CLIP (with its class token), SigLIP, the SigLIP of Idefics3 and SmolVLM, and InternViT.
    All layers count: transformers runs them all, even where `vision_feature_layer` picks one
    further down. A tower that isn't transformers' own says its cost itself: its config has a method
    `tile_cost` that returns the same.

    Args:
        config: of the whole model.
    """
    tower = config.vision_config
    kind = getattr(tower, "model_type", None)
    if (own := getattr(tower, "tile_cost", None)) is not None:
        tokens, macs = own()
        return int(tokens), int(macs)
    if kind not in _SQUARE_TOWERS:
        raise CostError(
            f"no exact cost for vision tower {kind!r} in {config.model_type!r}: counted towers are "
            f"{', '.join(_SQUARE_TOWERS)}"
        )
    class_token, pooling_head = _SQUARE_TOWERS[kind]
    d, m = tower.hidden_size, tower.intermediate_size
    height, width = _pair(tower.image_size)
    patch_height, patch_width = _pair(tower.patch_size)
    patches = (height // patch_height) * (width // patch_width)
    macs = patches * tower.num_channels * patch_height * patch_width * d
    n = patches + class_token
    macs += encoder_macs(n, d, m, tower.num_hidden_layers)
    if pooling_head and getattr(tower, "vision_use_head", True):
        # Attention pooling with one learnt query: it runs, though these models ignore its output.
        macs += 2 * d * d + 2 * n * d * d + 2 * n * d + 2 * d * m
    return n, macs


# vision_config.model_type -> (class tokens, whether it may have SigLIP's pooling head)
_SQUARE_TOWERS = {
    "clip_vision_model": (1, False),
    "idefics3_vision": (0, False),
    "internvl_vision": (1, False),
    "siglip_vision_model": (0, True),
    "smolvlm_vision": (0, False),
}


def qwen_patch_macs(tower: Any, patches: int, d: int) -> int:
    """Patch embedding of the Qwen-VL towers: a 3-D convolution over a still image shown twice."""
    return patches * tower.in_channels * tower.temporal_patch_size * tower.patch_size**2 * d


def qwen_grid(tower: Any, size: tuple[int, int] | None) -> tuple[int, int]:
    """Merged patches (height, width) of an image: each side rounded to whole merged patches.

    The processor's limits on the number of pixels are not in a model's config: give the size that
    the image has after them. Without a size, 24 x 24, as many vision tokens as LLaVA-1.5 has.
    """
    if size is None:
        return 24, 24
    side = tower.patch_size * tower.spatial_merge_size
    height, width = (max(1, round(pixels / side)) for pixels in size)
    return height, width


def qwen2_vl_tower(tower: Any, grid: tuple[int, int]) -> int:
    """MACs of Qwen2-VL's tower: global attention within an image, plain MLP."""
    n, d = _patches(tower, grid), tower.embed_dim
    m = int(d * tower.mlp_ratio)
    return qwen_patch_macs(tower, n, d) + encoder_macs(n, d, m, tower.depth)


def qwen2_5_vl_tower(tower: Any, grid: tuple[int, int]) -> int:
    """MACs of Qwen2.5-VL's tower: attention within windows except in a few layers, gated MLP."""
    n, d, m = _patches(tower, grid), tower.hidden_size, tower.intermediate_size
    window = tower.window_size // tower.spatial_merge_size // tower.patch_size
    # Windows tile the merged grid; those at its edges are smaller. A sum over a product of sides.
    rows, columns = (sum(s * s for s in _cut(side, window)) for side in grid)
    windowed = rows * columns * tower.spatial_merge_size**4
    full = sum(layer in tower.fullatt_block_indexes for layer in range(tower.depth))
    attended = full * n * n + (tower.depth - full) * windowed
    linear = tower.depth * (4 * n * d * d + 3 * n * d * m)
    return qwen_patch_macs(tower, n, d) + linear + 2 * attended * d


def qwen3_vl_tower(tower: Any, grid: tuple[int, int]) -> int:
    """MACs of Qwen3-VL's tower: global attention within an image, plain MLP."""
    n, d = _patches(tower, grid), tower.hidden_size
    layers = encoder_macs(n, d, tower.intermediate_size, tower.depth)
    return qwen_patch_macs(tower, n, d) + layers


def _patches(tower: Any, grid: tuple[int, int]) -> int:
    return grid[0] * grid[1] * tower.spatial_merge_size**2


def _cut(side: int, window: int) -> list[int]:
    return [min(window, side - start) for start in range(0, side, window)]


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
