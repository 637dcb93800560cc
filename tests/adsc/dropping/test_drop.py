"""Forward, generation and training of an attached LLaVA-1.5 against the slow reference."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import adsc
from tests.adsc.attached import BATCHES, STAGES, attached, rows_of
from tests.adsc.tiny import (
    IMAGE,
    LAYERS,
    TOKENS,
    alone,
    batch,
    greedy_reference,
    llava,
    pixels,
    reference,
    row,
)
from tests.matrix import matrix

# The worst measured difference is 1.4e-5 for logits of size 5 in fp32; a wrong token, mask or
# position is above 1e-2.
CLOSE = {"rtol": 0, "atol": 5e-5}


@matrix(rows=BATCHES, side=["left", "right"], implementation=["sdpa", "eager"])
def test_rows_of_a_batch_equal_the_reference(rows, side, implementation):
    inputs = batch(rows, side)
    model = attached(implementation=implementation)
    plain = llava()
    with torch.no_grad():
        got = rows_of(model(**inputs), inputs)
    for index, (logits, columns) in enumerate(got):
        wanted, kept = reference(plain, alone(inputs, index), STAGES)
        assert columns == kept
        torch.testing.assert_close(logits, wanted, **CLOSE)


@matrix(
    stages={
        "one": [(0, 0.5)],
        "three": [(0, 0.3), (1, 0.5), (5, 0.1)],
        "all kept": [(3, 1.0)],
    },
    positions=["keep", "reindex"],
    anchor=["last", "first", "center"],
)
def test_anchors_positions_and_layers(anchor, positions, stages):
    inputs = batch([row(3, 0, 5, 0, 2), row(1, 0, 2)])
    model = attached(stages, anchor=anchor, positions=positions)
    with torch.no_grad():
        got = rows_of(model(**inputs), inputs)
    for index, (logits, columns) in enumerate(got):
        wanted, kept = reference(llava(), alone(inputs, index), stages, anchor, positions)
        assert columns == kept
        torch.testing.assert_close(logits, wanted, **CLOSE)


@matrix(
    rows=BATCHES,
    stages={"from 2": STAGES, "from 0": [(0, 0.5), (3, 0.5)]},
    positions=["keep", "reindex"],
)
def test_cached_generation_equals_full_recomputation(rows, stages, positions):
    inputs = batch(rows)
    model = attached(stages, positions=positions)
    got = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for index, tokens in enumerate(got[:, inputs["input_ids"].shape[1] :].tolist()):
        wanted = greedy_reference(llava(), alone(inputs, index), 6, stages, positions=positions)
        assert tokens == wanted


def test_each_cache_layer_holds_what_its_layer_saw():
    model = attached()
    cache = DynamicCache(config=model.config.get_text_config())
    model.generate(
        **batch([row(3, 0, 5)]), past_key_values=cache, max_new_tokens=4, min_new_tokens=4
    )
    vision = adsc.plan_of(model).tokens_per_layer(TOKENS, LAYERS)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [n + 3 + 5 + 3 for n in vision]


def test_loss_and_gradients_equal_the_reference():
    inputs = batch([row(3, 0, 5), row(2, 0, 3, 0, 4), row(6)], "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model = attached().train()
    output = model(**inputs, labels=labels)  # labels on image tokens must not count either
    output.loss.backward()

    plain, total, count = llava().train(), 0.0, 0
    from tests.adsc.tiny import states

    for index in range(3):
        single = alone(inputs, index)
        hidden, columns = states(plain, single, STAGES)[-1]
        logits = plain.lm_head(plain.model.language_model.norm(hidden))[0]
        targets = single["input_ids"][0, columns]
        targets = targets.masked_fill(targets == IMAGE, -100)
        total = total + torch.nn.functional.cross_entropy(
            logits[:-1], targets[1:], ignore_index=-100, reduction="sum"
        )
        count += int((targets[1:] != -100).sum())
    (total / count).backward()
    torch.testing.assert_close(output.loss, total / count, **CLOSE)
    wanted = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if wanted[name].grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[name].grad, **CLOSE)


def test_logits_of_dropped_positions_are_never_computed():
    model = attached()
    widths: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    model(**batch([row(3, 0, 5)]))
    assert widths == [3 + 2 + 5]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    inputs = batch([row(3, 0, 5), row(6)], "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    gradients = []
    for checkpointing in (False, True):
        model = attached().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**inputs, labels=labels).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6)


def test_detach_restores_the_model_bit_for_bit():
    inputs = batch([row(3, 0, 5), row(6)])
    plain = llava()(**inputs).logits
    model = attached()
    assert model(**inputs).logits.shape != plain.shape
    adsc.detach(model)
    assert torch.equal(model(**inputs).logits, plain)
    assert adsc.plan_of(model) is None
    assert not hasattr(model.config, "adsc")


def test_an_empty_plan_installs_nothing_and_is_bit_identical():
    inputs = batch([row(3, 0, 5), row(6)])
    model = attached([])
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(**inputs).logits, llava()(**inputs).logits)
    assert adsc.plan_of(model) == adsc.PruningPlan()


def test_attaching_again_replaces_the_plan():
    model = adsc.attach(attached(), "3:1/4")
    inputs = batch([row(3, 0, 5)])
    wanted, _ = reference(llava(), inputs, [(3, 0.25)])
    torch.testing.assert_close(model(**inputs).logits[0], wanted, **CLOSE)
    assert str(adsc.plan_of(model)) == "3:1/4"


def test_the_inner_model_can_be_called_directly():
    inputs = batch([row(3, 0, 5)])
    model = attached()
    hidden = model.model(**inputs).last_hidden_state
    wanted, _ = reference(llava(), inputs, STAGES)
    torch.testing.assert_close(model.lm_head(hidden)[0], wanted, **CLOSE)


def test_inputs_by_position_and_as_embeddings():
    inputs = batch([row(3, 0, 5)])
    model = attached()
    wanted = model(**inputs).logits
    assert torch.equal(model(inputs["input_ids"], inputs["pixel_values"]).logits, wanted)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    got = model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"]).logits
    assert torch.equal(got, wanted)


def test_embeddings_that_may_hold_merged_images_are_refused():
    inputs = batch([row(3, 0, 5), row(3, 0, 5, seed=4)])
    model = attached()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    features = torch.cat(model.model.get_image_features(inputs["pixel_values"]).pooler_output)
    merged = embeds.masked_scatter((inputs["input_ids"] == IMAGE).unsqueeze(-1), features)
    zeros = torch.zeros_like(inputs["input_ids"])
    with pytest.raises(adsc.VisionTokenError, match="inputs_embeds came without images"):
        model(inputs_embeds=merged)
    with pytest.raises(adsc.VisionTokenError, match=r"pass mm_token_type_ids=torch\.zeros"):
        model.generate(inputs_embeds=merged, max_new_tokens=2)
    with pytest.raises(adsc.VisionTokenError, match="inputs_embeds came without images"):
        model(inputs_embeds=merged, mm_token_type_ids=(inputs["input_ids"] == IMAGE).long())
    wanted = llava()(inputs_embeds=embeds).logits
    assert torch.equal(model(inputs_embeds=embeds, mm_token_type_ids=zeros).logits, wanted)
    assert torch.equal(attached([])(inputs_embeds=merged).logits, llava()(**inputs).logits)


@pytest.mark.parametrize(
    ("ids", "count"),
    [([[5] + [IMAGE] * 15], 1), ([[5] + [IMAGE] * 16], 2), ([row(1, 0), row(1, 0)], 1)],
    ids=["a token too few", "an image too many", "an image too few"],
)
def test_images_and_tokens_that_do_not_match_are_refused(ids, count):
    with pytest.raises(adsc.VisionTokenError, match="vision tokens, the"):
        attached()(input_ids=torch.tensor(ids), pixel_values=pixels(count))


def test_an_unknown_model_is_refused_with_what_was_looked_for():
    with pytest.raises(adsc.UnsupportedModel, match=r"Linear .*looked for llava"):
        adsc.attach(torch.nn.Linear(2, 2), "1:1/2")


def test_a_layer_out_of_range_is_refused():
    with pytest.raises(adsc.PlanError, match=r"layer 6, but the decoder has layers 0\.\.5"):
        adsc.attach(llava(), "6:1/2")
