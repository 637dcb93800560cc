"""What torch counts in a real forward: what `estimate_cost` is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _cpu_flash_flop(query, key, value, *_, **__):
    return sdpa_flop_count(query, key, value)


# FlopCounterMode has formulas for the CUDA attention kernels, but none for the CPU's flash kernel,
# which does the same work. Without this line sdpa's attention would count for nothing on a CPU.
_CPU_FLASH = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_flash_flop}


def counted(model: Any, *, steps: int = 0, logits_to_keep: int = 1, **inputs: Any):
    """FLOPs of a prefill and `steps` cached decode steps, and the bytes of the cache's tensors."""
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_FLASH)
    rows = inputs["input_ids"].shape[0]
    with torch.no_grad(), counter:
        out = model(**inputs, use_cache=True, logits_to_keep=logits_to_keep)
        for _ in range(steps):
            token = torch.full((rows, 1), 11)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    tensors = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
    return counter.get_total_flops(), sum(t.numel() * t.element_size() for t in tensors)
