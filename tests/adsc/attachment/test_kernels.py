"""Kernels by name: what takes the place of those that can't run here."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import adsc
from adsc.attachment import kernels
from tests.adsc.attached import attached

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "there", "found"),
    [
        ("sdpa", CPU, torch.float32, set(), "sdpa"),
        ("flash_attention_3", CUDA, torch.bfloat16, {"2", "3"}, "flash_attention_3"),
        ("flash_attention_3", CUDA, torch.bfloat16, {"2"}, "flash_attention_2"),
        ("flash_attention_2", CUDA, torch.bfloat16, {"3"}, "sdpa"),
        ("flash_attention_2", CUDA, torch.float32, {"2"}, "sdpa"),
        ("flash_attention_2", CPU, torch.bfloat16, {"2"}, "sdpa"),
    ],
)
def test_flash_attention_falls_back_to_what_is_there(
    wanted, device, dtype, there, found, monkeypatch, recwarn
):
    installed = {name: lambda name=name: name[-1] in there for name in kernels.FLASH}
    monkeypatch.setattr(kernels, "FLASH", installed)
    assert kernels.best_attention(wanted, device, dtype) == found
    said = [str(one.message) for one in recwarn]
    assert len(said) == (wanted != found)
    assert all(text.startswith(f"{wanted} can't be used, {found} is: ") for text in said)


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="it is installed")
def test_liger_without_its_package_is_refused():
    with pytest.raises(adsc.UnsupportedModel, match=r"pip install 'adsc\[gpu\]'"):
        kernels.use_liger(attached())
