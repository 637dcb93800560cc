"""Attention backends beyond sdpa and eager: what each is handed, and that all agree.

For flash attention a stand-in takes the kernels' inputs: see `flash.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adsc
from tests.adsc.attached import BATCHES, GREEDY, MIXED, STAGES, attached, rows_of
from tests.adsc.flash import handed
from tests.adsc.tiny import alone, batch, llava, pixels, reference, row
from tests.matrix import matrix

CLOSE = {"rtol": 0, "atol": 5e-5}


def flash(**plan: Any) -> Any:
    model = attached(**plan)
    model.model.language_model.set_attn_implementation("stand_in")
    handed.clear()
    return model


@torch.no_grad()
@matrix(rows=BATCHES, side=["left", "right"])
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
