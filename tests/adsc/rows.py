"""Rows as trainers take them: a data set with its collator, and prompts with answers."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.adsc.tiny import IMAGE, TOKENS, batch, pixels, row


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> list[int]:
        return row(3, 0, 5, seed=index) if index % 3 else row(6, seed=index)


def collate(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    inputs = batch(rows, "right")
    hidden = (inputs["attention_mask"] == 0) | (inputs["input_ids"] == IMAGE)
    return inputs | {"labels": inputs["input_ids"].masked_fill(hidden, -100)}


def both_sides(prompts: list[list[int]], answers: list[list[int]]) -> dict[str, Tensor]:
    """Prompts padded on the left, answers on the right: a batch of reinforcement learning."""
    left, right = batch(prompts), batch(answers, "right")
    joined = {
        name: torch.cat([left[name], right[name]], dim=1)
        for name in ("input_ids", "attention_mask")
    }
    images = sum(one.count(IMAGE) // TOKENS for one in prompts)
    return joined | ({"pixel_values": pixels(images)} if images else {})


PROMPTS = [row(3, 0, 5), row(2, 0, 3, 0, 4), row(6), row(0, 7)]
ANSWERS = [row(5, seed=1), row(2, seed=2), row(4, seed=3), row(1, seed=4)]
