"""Attention backends beyond sdpa and eager: what each is handed, and that all agree.

Flash attention has no kernel on a CPU. A stand-in takes its very inputs (no mask, or a 2-D mask of
keys; position ids that tell packed samples) and computes what the kernel would.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence

import adsc
from tests.adsc.test_drop import BATCHES, rows_of
from tests.adsc.test_generation import GREEDY, MIXED, STAGES, attached
from tests.adsc.tiny import alone, batch, llava, pixels, reference, row

CLOSE = {"rtol": 0, "atol": 5e-5}
handed: list[Any] = []


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


def flash(**plan: Any) -> Any:
    model = attached(**plan)
    model.model.language_model.set_attn_implementation("stand_in")
    handed.clear()
    return model


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES.keys())
def test_flash_inputs_give_the_reference(rows, side):
    inputs = batch(rows, side)
    for index, (logits, columns) in enumerate(rows_of(flash()(**inputs), inputs)):
        wanted, kept = reference(llava(), alone(inputs, index), STAGES)
        assert columns == kept
        torch.testing.assert_close(logits, wanted, **CLOSE)


def test_flash_is_handed_no_mask_where_nothing_is_padded():
    flash()(**batch([row(3, 0, 5), row(2, 0, 6)]))
    assert handed == [None] * 6
    flash()(**batch([row(3, 0, 5), row(2, 0, 5)]))
    assert handed == [(2, 24)] * 2 + [(2, 16)] * 2 + [(2, 10)] * 2


@torch.no_grad()
@pytest.mark.parametrize("positions", ["keep", "reindex"])
def test_flash_decodes_and_takes_kept_positions_for_no_packing(positions):
    for rows in ([row(3, 0, 5)], MIXED):
        inputs = batch(rows)
        wanted = attached(positions=positions).generate(**inputs, max_new_tokens=4, **GREEDY)
        got = flash(positions=positions).generate(**inputs, max_new_tokens=4, **GREEDY)
        assert got.tolist() == wanted.tolist()


@torch.no_grad()
def test_flash_tells_packed_samples_apart_after_a_drop():
    samples = [row(3, 0, 5), row(2, 0, 0, 4)]
    inputs = {
        "input_ids": torch.tensor([[word for one in samples for word in one]]),
        "position_ids": torch.tensor([[i for one in samples for i in range(len(one))]]),
        "pixel_values": pixels(3),
    }
    wanted = attached()(**inputs, use_cache=False).logits
    lengths = torch.tensor([0, 24, 62], dtype=torch.int32)
    packed = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
    got = flash()(**inputs, **packed, max_length_q=38, max_length_k=38, use_cache=False).logits
    torch.testing.assert_close(got, wanted, **CLOSE)
    del inputs["position_ids"]
    with pytest.raises(adsc.VisionTokenError, match="cu_seq_lens without position_ids"):
        flash()(**inputs, **packed, max_length_q=38, max_length_k=38)


@torch.no_grad()
@pytest.mark.parametrize("rows", [[row(3, 0, 5)], MIXED], ids=["one row", "mixed"])
def test_flex_attention_gives_the_reference(rows):
    inputs = batch(rows)
    model = attached()
    model.model.language_model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        output = model(**inputs, use_cache=False)
    for index, (logits, columns) in enumerate(rows_of(output, inputs)):
        wanted, kept = reference(llava(), alone(inputs, index), STAGES)
        assert columns == kept
        torch.testing.assert_close(logits, wanted, **CLOSE)
