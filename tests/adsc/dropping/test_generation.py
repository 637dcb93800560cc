"""Generation of an attached model: every decoding mode, conversations, caches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import adsc
from tests.adsc.attached import FROM_ZERO, GREEDY, MIXED, STAGES, attached
from tests.adsc.tiny import (
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


def new_tokens(got: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    return got[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("stages", [STAGES, FROM_ZERO], ids=["from 2", "from 0"])
@pytest.mark.parametrize(
    "how",
    [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=["beams", "two of three beams"],
)
def test_beams_with_a_cache_equal_beams_without(how, stages):
    inputs = batch(MIXED)
    model = attached(stages)
    cached = model.generate(**inputs, max_new_tokens=5, **GREEDY, **how)
    plain = model.generate(**inputs, max_new_tokens=5, use_cache=False, **GREEDY, **how)
    assert cached.tolist() == plain.tolist()


def test_sampling_draws_the_same_with_and_without_a_cache():
    inputs = batch(MIXED)
    model = attached()
    how = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 5, "eos_token_id": None}
    draws = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        draws.append(model.generate(**inputs, use_cache=use_cache, pad_token_id=0, **how).tolist())
    assert draws[0] == draws[1]
    assert draws[0][0] != draws[0][1]


@pytest.mark.parametrize("stages", [STAGES, FROM_ZERO], ids=["from 2", "from 0"])
@pytest.mark.parametrize("assistant", ["another model", "prompt lookup"])
def test_assisted_decoding_equals_greedy(assistant, stages):
    inputs = batch([row(3, 0, 5)])
    model = attached(stages)
    how: dict[str, Any] = {"prompt_lookup_num_tokens": 2}
    if assistant == "another model":
        other = attached([(1, 0.25)])
        with torch.no_grad():  # right now and then, so that tokens are accepted and cropped
            other.lm_head.weight.add_(torch.randn_like(other.lm_head.weight) * 0.3)
        how = {"assistant_model": other}
    got = model.generate(**inputs, max_new_tokens=12, **GREEDY, **how)
    assert new_tokens(got, inputs)[0] == greedy_reference(llava(), alone(inputs, 0), 12, stages)


@matrix(
    opened={
        "image, words": ("image", False),
        "image, image": ("image", True),
        "words, words": ("words", False),
        "words, image": ("words", True),
    },
    stages={"from 2": STAGES, "from 0": FROM_ZERO},
    positions=["keep", "reindex"],
)
def test_a_conversation_goes_on_on_the_same_cache(opened, stages, positions):
    opening, image = opened
    first = row(3, 0, 5) if opening == "image" else row(4)
    model = attached(stages, positions=positions)
    cache = DynamicCache(config=model.config.get_text_config())
    inputs = batch([first])
    generated = model.generate(**inputs, past_key_values=cache, max_new_tokens=4, **GREEDY)
    follow = row(2, 0, 3, seed=5) if image else row(4, seed=5)
    whole = torch.cat([generated, torch.tensor([follow])], dim=1)
    given: dict[str, Any] = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    if image:
        given["pixel_values"] = pixels(1, seed=8)
    got = model.generate(**given, past_key_values=cache, max_new_tokens=4, **GREEDY)

    # What plain recomputation must see: each turn's images are dropped in the same layers.
    everything = [inputs[k] for k in ("pixel_values",) if k in inputs] + (
        [given["pixel_values"]] if image else []
    )
    single = {"input_ids": whole}
    if everything:
        single["pixel_values"] = torch.cat(everything)
    assert got[0, whole.shape[1] :].tolist() == greedy_reference(
        llava(), single, 4, stages, positions=positions
    )
    if positions == "keep":
        kept = adsc.plan_of(model).tokens_per_layer(TOKENS, LAYERS)
        images = sum(len(one) for one in everything)
        words = whole.shape[1] - images * TOKENS + 3
        assert [layer.keys.shape[-2] for layer in cache.layers] == [
            n * images + words for n in kept
        ]


def test_padded_conversations_go_on_in_a_batch():
    model = attached()
    cache = DynamicCache(config=model.config.get_text_config())
    inputs = batch(MIXED)
    generated = model.generate(**inputs, past_key_values=cache, max_new_tokens=3, **GREEDY)
    follow = batch([row(2, 0, seed=3), row(4, seed=4), row(1, 0, 0, 2, seed=5)], seed=6)
    grown = torch.ones(3, 3, dtype=torch.long)
    given = {
        "input_ids": torch.cat([generated, follow["input_ids"]], dim=1),
        "attention_mask": torch.cat(
            [inputs["attention_mask"], grown, follow["attention_mask"]], dim=1
        ),
        "pixel_values": follow["pixel_values"],
    }
    got = model.generate(**given, past_key_values=cache, max_new_tokens=3, **GREEDY)
    pictures = [[0], [1, 2], []]
    more = [[0], [], [1, 2]]
    for index in range(3):
        seen = given["attention_mask"][index].bool()
        single = {"input_ids": given["input_ids"][index : index + 1, seen]}
        chosen = [inputs["pixel_values"][pictures[index]], follow["pixel_values"][more[index]]]
        single["pixel_values"] = torch.cat(chosen)
        assert new_tokens(got, given)[index] == greedy_reference(llava(), single, 3, STAGES)


def test_generations_that_take_turns_do_not_disturb_each_other():
    model = attached()
    prompts = [batch([row(3, 0, 5)]), batch([row(2, 0, 0, 4)], seed=9)]
    wanted = [greedy_reference(llava(), alone(one, 0), 5, STAGES) for one in prompts]
    caches = [DynamicCache(config=model.config.get_text_config()) for _ in prompts]
    tokens: list[list[int]] = [[], []]
    lengths = [one["input_ids"].shape[1] for one in prompts]
    for step in range(5):
        for turn, prompt in enumerate(prompts):
            inputs = prompt if step == 0 else {"input_ids": torch.tensor([tokens[turn][-1:]])}
            if step:
                place = lengths[turn] + step - 1
                inputs = inputs | {"position_ids": torch.tensor([[place]])}
            with torch.no_grad():
                logits = model(**inputs, past_key_values=caches[turn], use_cache=True).logits
            tokens[turn].append(int(logits[0, -1].argmax()))
    assert tokens == wanted


@pytest.mark.parametrize("stages", [STAGES, FROM_ZERO], ids=["from 2", "from 0"])
def test_positions_go_on_by_themselves_when_none_are_given(stages):
    inputs = batch([row(3, 0, 5)])
    model = attached(stages)
    first = model(**inputs, use_cache=True)
    token = first.logits[:, -1:].argmax(-1)
    second = model(input_ids=token, past_key_values=first.past_key_values)
    single = {**alone(inputs, 0), "input_ids": torch.cat([inputs["input_ids"], token], dim=1)}
    wanted, _ = reference(llava(), single, stages)
    torch.testing.assert_close(second.logits[0, -1], wanted[-1], rtol=0, atol=5e-5)


@pytest.mark.parametrize("stages", [STAGES, FROM_ZERO], ids=["from 2", "from 0"])
def test_embeddings_as_inputs(stages):
    inputs = batch([row(3, 0, 5)])
    model = attached(stages)
    given = {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]),
        "pixel_values": inputs["pixel_values"],
        "attention_mask": inputs["attention_mask"],
    }
    got = model.generate(**given, max_new_tokens=4, **GREEDY)
    assert got[0].tolist() == greedy_reference(llava(), alone(inputs, 0), 4, stages)


@pytest.mark.parametrize("method", ["copy", "reorder", "repeat", "select"])
@torch.no_grad()
def test_a_cache_whose_rows_are_moved_keeps_its_record(method):
    inputs = batch([row(3, 0, 5), row(2, 0, 3, 0, 4)])
    model = attached()
    cache = model(**inputs, use_cache=True).past_key_values
    rows = {"copy": [0, 1], "reorder": [1, 0], "repeat": [0, 0, 1, 1], "select": [1]}[method]
    if method == "copy":
        cache = copy.deepcopy(cache)
    elif method == "reorder":
        cache.reorder_cache(torch.tensor(rows))
    elif method == "repeat":
        cache.batch_repeat_interleave(2)
    else:
        cache.batch_select_indices(torch.tensor(rows))
    mask = torch.cat([inputs["attention_mask"][rows], torch.ones(len(rows), 1).long()], dim=1)
    step = {"input_ids": torch.full((len(rows), 1), 7), "attention_mask": mask}
    logits = model(**step, past_key_values=cache).logits[:, -1]
    for place, index in enumerate(rows):
        single = alone(inputs, index)
        single["input_ids"] = torch.cat([single["input_ids"], torch.tensor([[7]])], dim=1)
        wanted, _ = reference(llava(), single, STAGES)
        torch.testing.assert_close(logits[place], wanted[-1], rtol=0, atol=5e-5)


def test_cropping_back_into_a_dropped_image_is_refused():
    model = attached()
    cache = model(**batch([row(3, 0, 5)]), use_cache=True).past_key_values
    cache.crop(-5)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [19, 19, 11, 11, 5, 5]
    with pytest.raises(adsc.CacheError, match="vision tokens among them were dropped"):
        cache.crop(-4)


def test_a_cache_that_was_reset_starts_anew():
    model = attached()
    inputs = batch([row(3, 0, 5)])
    cache = model(**inputs, use_cache=True).past_key_values
    cache.reset()
    again = model(**inputs, past_key_values=cache).logits
    assert torch.equal(again, model(**inputs).logits)


def test_offloaded_cache():
    inputs = batch(MIXED)
    model = attached()
    cache = DynamicCache(config=model.config.get_text_config())
    wanted = model.generate(**inputs, past_key_values=cache, max_new_tokens=4, **GREEDY)
    if not torch.accelerator.is_available():
        pytest.skip("transformers offloads from an accelerator only")
    got = model.generate(**inputs, cache_implementation="offloaded", max_new_tokens=4, **GREEDY)
    assert got.tolist() == wanted.tolist()


def test_the_language_model_alone_does_not_take_over_such_a_cache():
    model = attached()
    cache = model(**batch([row(3, 0, 5)]), use_cache=True).past_key_values
    with pytest.raises(adsc.CacheError, match="through the multimodal model"):
        model.model.language_model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_another_plan_does_not_take_over_a_conversation():
    model = attached()
    inputs = batch([row(3, 0, 5)])
    cache = model(**inputs, use_cache=True).past_key_values
    step = {"input_ids": torch.tensor([[5]]), "past_key_values": cache}
    adsc.attach(model, "1:1/2,5:1/4")
    with pytest.raises(adsc.CacheError, match=r"plan '2:1/2,4:1/4' dropped tokens.*'1:1/2,5:1/4'"):
        model(**step)
    adsc.attach(model, STAGES)
    assert model(**step).logits.shape == (1, 1, 100)


def test_a_mask_that_does_not_cover_the_conversation_is_refused():
    model = attached()
    cache = model(**batch([row(3, 0, 5)]), use_cache=True).past_key_values
    with pytest.raises(adsc.CacheError, match="1 columns, but the cache stands for 24"):
        model(
            input_ids=torch.tensor([[5]]),
            attention_mask=torch.ones(1, 1),
            past_key_values=cache,
        )
