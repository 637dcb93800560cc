"""A stand-in for flash attention, which has no kernel on a CPU.

It takes the kernels' very inputs (no mask, or a 2-D mask of keys; position ids that tell packed
samples) and computes what they would. Importing this module registers it as `stand_in`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence

handed: list[Any] = []
"""For each call of a decoder layer the shape of the mask that it was handed, or None."""


def _flash_stand_in(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """(B, H, Q, D) attention as the flash kernels do it: causal from the bottom right corner."""
    rows, heads, width, _ = query.shape
    length = key.shape[2]
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    slots = torch.arange(length)
    mask = (slots[None, :] <= slots[-width:, None])[None, None]
    if attention_mask is not None:
        assert attention_mask.shape == (rows, length)
        mask = mask & attention_mask.bool()[:, None, None]
    elif _is_packed_sequence(kwargs.get("position_ids"), rows):
        samples = (kwargs["position_ids"].flatten() == 0).cumsum(0)
        mask = mask & (samples[:, None] == samples[None])
    if module.__class__.__name__ == "LlamaAttention":
        handed.append(None if attention_mask is None else attention_mask.shape)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("stand_in", _flash_stand_in)
AttentionMaskInterface.register("stand_in", flash_attention_mask)
