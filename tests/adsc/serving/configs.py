"""Configs of small checkpoints with a plan, and images that requests may have."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlavaNextConfig

from adsc import PruningPlan
from adsc.families.family import Image
from adsc.serving.settings import ServedPlan
from tests.adsc import tiny


def config_of(plan: str | dict[str, Any] | None, **changes: Any) -> Any:
    config = tiny.llava().config
    if plan is not None:
        config.adsc = PruningPlan.parse(plan).to_dict() if isinstance(plan, str) else plan
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def next_of(plan: str, **changes: Any) -> Any:
    """LLaVA-NeXT, with crops of 16 tokens."""
    known = tiny.llava().config
    return LlavaNextConfig(
        text_config=known.text_config,
        vision_config=known.vision_config,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64], [32, 96]],
        adsc=PruningPlan.parse(plan).to_dict(),
        **changes,
    )


def pictures_of(plan: ServedPlan) -> list[Image]:
    """Images that requests may have under a plan."""
    if plan.by_size is None:
        return [plan.image]
    sizes = [(64, 64), (30, 60), (60, 90), (20, 90), (90, 31), (64, 30)]
    pixels = torch.empty(1, 3, 32, 32, device="meta")
    return [plan.image_of({"pixel_values": pixels, "image_sizes": [size]}) for size in sizes]
