"""Faster kernels by name, where they are installed: Liger's, and flash attention. The only file
that asks for liger-kernel, and lazily."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers import utils

from adsc.attachment.attach import base_model
from adsc.errors import UnsupportedModel
from adsc.families.table import find_family

FLASH = {
    "flash_attention_3": utils.is_flash_attn_3_available,
    "flash_attention_2": utils.is_flash_attn_2_available,
}
"""Packages of flash attention, the fastest first, and whether one is there."""


def best_attention(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """The attention kernel that a model can run with: the one that is wanted, or in place of a
    flash attention that can't run, the next older one or sdpa, with a warning.

    Args:
        wanted: transformers' name.
        device: of the model.
        dtype: in which attention is computed.
    """
    if wanted not in FLASH:
        return wanted
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        why, found = f"it needs a GPU and 16 bits, and this is {device.type} in {dtype}", "sdpa"
    else:
        names = list(FLASH)
        others = names[names.index(wanted) :]
        found = next((name for name in others if FLASH[name]()), "sdpa")
        why = "its package is not installed, or doesn't serve this GPU"
    if found != wanted:
        warnings.warn(f"{wanted} can't be used, {found} is: {why}", stacklevel=2)
    return found


def use_liger(model: nn.Module) -> None:
    """Put Liger's RMSNorm, SwiGLU and rotary embedding into a model's decoder, in place; the rotary
    embedding into all models of its architecture in this process. Its fused losses stay off: they
    pair labels with columns that a plan has dropped.

    Args:
        model: as `adsc.attach` takes it, with or without adapters.

    Raises:
        UnsupportedModel: liger-kernel is missing, or has no kernels for this architecture.
    """
    from transformers.integrations.liger import apply_liger_kernel

    base: Any = base_model(model)
    try:
        apply_liger_kernel(base, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    except ImportError as error:
        raise UnsupportedModel(
            f"Liger's kernels can't be used ({error}): pip install 'adsc[gpu]' on a machine with a "
            "GPU, or leave them out"
        ) from error
    family, inner = find_family(base)
    layer = family.decoder(inner).layers[0]
    if not any("forward" in vars(part) for part in layer.modules()):
        raise UnsupportedModel(
            f"liger-kernel has no kernels for {base.config.model_type} with a decoder of type "
            f"{base.config.get_text_config().model_type}: leave them out, or compile the layers"
        )
