"""The tiny LLaVA with a plan attached, and the batches and settings that its tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

import adsc
from tests.adsc.tiny import llava, row

STAGES = [(2, 0.5), (4, 0.25)]
FROM_ZERO = [(0, 0.5), (3, 0.5)]
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def attached(stages: Any = STAGES, implementation: str = "sdpa", **plan: Any) -> Any:
    model = llava()
    model.set_attn_implementation(implementation)
    return adsc.attach(model, adsc.PruningPlan(stages=stages, **plan))


MIXED = [row(3, 0, 5), row(2, 0, 3, 0, 4), row(6)]
BATCHES = {
    "one row": [row(3, 0, 5)],
    "same images": [row(3, 0, 5), row(7, 0, 2)],
    "no images in a row": [row(3, 0, 5), row(9)],
    "two and one and none": [row(2, 0, 3, 0, 4), row(4, 0, 1), row(6)],
    "adjacent images": [row(2, 0, 0, 3), row(1, 0, 0, 9)],
    "image first and last": [row(0, 3), row(5, 0)],
    "text only": [row(5), row(8)],
}


def rows_of(output: Any, inputs: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, list[int]]]:
    """Each row's logits at the columns that are left, and these columns without padding."""
    rows = []
    for index, logits in enumerate(output.logits):
        seen = inputs["attention_mask"][index].bool()
        if hasattr(output, "kept_positions"):
            kept = output.kept_positions[-1][index]
            rows.append((logits[kept >= 0], (seen.cumsum(0) - 1)[kept[kept >= 0]].tolist()))
        else:
            rows.append((logits[seen], list(range(int(seen.sum())))))
    return rows


@contextmanager
def group_of_one() -> Iterator[None]:
    """A process group of this process alone: a new one, or the one that DeepSpeed has left here."""
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        if own:
            dist.destroy_process_group()
