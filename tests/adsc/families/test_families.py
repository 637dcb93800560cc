"""Every family against the slow reference: batches, generation, what is refused."""

from __future__ import annotations

import pytest
import torch

import adsc
from tests.adsc.zoo import CASES, reference, rows_for
from tests.matrix import matrix

# The worst measured difference is 3.3e-5 (PaliGemma) for logits of size 5 to 8 in fp32.
CLOSE = {"rtol": 0, "atol": 1e-4}


@matrix(name=CASES.keys(), implementation=["sdpa", "eager"])
def test_rows_of_a_batch_equal_the_reference(name, implementation):
    case = CASES[name]
    if name == "paligemma2" and implementation == "sdpa":
        pytest.skip("Gemma 2 caps attention scores, which transformers only does in eager")
    plain, rows = case.model(), rows_for(case)
    model = adsc.attach(case.model(implementation), case.drops)
    for side in ("left", "right"):
        inputs = case.batch(rows, side)
        with torch.no_grad():
            output = model(**inputs)
        for index, row in enumerate(rows):
            kept = output.kept_positions[-1][index]
            numbers = inputs["attention_mask"][index].cumsum(0) - 1
            wanted, columns = reference(case, plain, row, case.drops)
            assert numbers[kept[kept >= 0]].tolist() == columns
            torch.testing.assert_close(output.logits[index][kept >= 0], wanted, **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_cached_generation_equals_full_recomputation(name):
    case = CASES[name]
    plain, rows = case.model(), rows_for(case)
    model = adsc.attach(case.model("eager" if name == "paligemma2" else "sdpa"), case.drops)
    inputs = case.batch(rows)
    got = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for index, row in enumerate(rows):
        tokens: list[int] = []
        for _ in range(4):
            logits, _ = reference(case, plain, row, case.drops, extra=tokens)
            tokens.append(int(logits[-1].argmax()))
        assert got[index, inputs["input_ids"].shape[1] :].tolist() == tokens


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_beams_share_their_pictures(name):
    case = CASES[name]
    inputs = case.batch(rows_for(case))
    model = adsc.attach(case.model("sdpa"), case.drops)
    how = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 3, "eos_token_id": None}
    cached = model.generate(**inputs, **how)
    assert cached.tolist() == model.generate(**inputs, use_cache=False, **how).tolist()


def test_a_drop_before_the_last_injected_features_is_refused():
    model = CASES["qwen3_vl"].model()
    with pytest.raises(adsc.PlanError, match=r"layers 0\.\.1: the first layer for a drop is 2"):
        adsc.attach(model, "1:1/2")


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_reindexing_positions_of_several_axes_is_refused(name):
    plan = adsc.PruningPlan.parse("3:1/2;positions=reindex")
    with pytest.raises(adsc.PlanError, match="has no meaning for Qwen"):
        adsc.attach(CASES[name].model(), plan)


@pytest.mark.parametrize("name", CASES)
def test_training_reaches_what_it_should(name):
    case = CASES[name]
    inputs = case.batch(rows_for(case), "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model = adsc.attach(case.model("eager").train(), case.drops)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    output = model(**inputs, labels=labels)
    output.loss.backward()
    decoder = getattr(model.model, "text_model", None) or model.model.language_model
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.layers.parameters())
    assert output.logits.shape[1] == output.kept_positions[-1].shape[1] < labels.shape[1]


def test_images_encoded_beforehand_are_refused_once_they_were_cut():
    case = CASES["llava"]
    inputs = case.batch([[3, case.pictures(None)[0], 4]])
    model = adsc.attach(case.model(), case.drops)
    with pytest.raises(adsc.VisionTokenError, match="leave prefill_chunk_size out"):
        model.generate(**inputs, prefill_chunk_size=8, max_new_tokens=2)
