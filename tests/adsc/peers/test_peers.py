"""Every peer against the literal transcription of its paper, under the same tests as a plan."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import adsc
from adsc import peers
from tests.adsc import flash  # noqa: F401  (registers the stand-in)
from tests.adsc.peers import peer_reference as paper
from tests.adsc.peers.peer_cases import (
    CLOSE,
    GREEDY,
    MIXED,
    attached,
    expected,
    stage_counts,
)
from tests.adsc.peers.peer_reference import LAYERS, TOKENS, alone, batch, llava, row
from tests.matrix import matrix


@matrix(name=peers.NAMES, implementation=["sdpa", "eager"])
def test_rows_of_a_batch_equal_the_paper(name, implementation):
    model, plain = attached(name, implementation), llava(attention="eager")
    for side in ("left", "right") if implementation == "sdpa" else ("right",):
        inputs = batch(MIXED, side)
        with torch.no_grad():
            output = model(**inputs)
        for index in range(len(MIXED)):
            kept = output.kept_positions[-1][index]
            seen = inputs["attention_mask"][index].cumsum(0) - 1
            with torch.no_grad():
                wanted, columns = expected(name, plain, alone(inputs, index))
            assert seen[kept[kept >= 0]].tolist() == columns
            torch.testing.assert_close(output.logits[index][kept >= 0], wanted, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", peers.NAMES)
def test_cached_generation_equals_full_recomputation(name):
    model, plain = attached(name), llava(attention="eager")
    inputs = batch(MIXED)
    got = model.generate(**inputs, max_new_tokens=4, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    for index in range(len(MIXED)):
        single, tokens = alone(inputs, index), []
        query = single["input_ids"].shape[1] - 1
        for _ in range(4):
            logits, _ = expected(name, plain, single, query)
            tokens.append(int(logits[-1].argmax()))
            ids = torch.cat([single["input_ids"], torch.tensor([tokens[-1:]])], dim=1)
            single = single | {"input_ids": ids}
        assert got[index].tolist() == tokens


@pytest.mark.parametrize("name", peers.NAMES)
def test_labels_say_where_the_question_ends(name):
    """One uncached forward over prompt and answer gives what the cache gave step by step."""
    model = attached(name)
    inputs = batch([row(2, 0, 3, 0, 6)])
    generated = model.generate(**inputs, max_new_tokens=5, **GREEDY)
    width = inputs["input_ids"].shape[1]
    labels = generated.clone()
    labels[:, :width] = -100
    given = inputs | {"input_ids": generated, "attention_mask": torch.ones_like(generated)}
    with torch.no_grad():
        logits = model(**given, labels=labels).logits
    assert logits[0, -6:-1].argmax(-1).tolist() == generated[0, width:].tolist()


@pytest.mark.parametrize("name", peers.NAMES)
def test_each_cache_layer_holds_what_its_layer_saw(name):
    model = attached(name)
    cache = DynamicCache(config=model.config.get_text_config())
    model.generate(
        **batch([row(3, 0, 5)]), past_key_values=cache, max_new_tokens=4, min_new_tokens=4
    )
    vision = adsc.plan_of(model).tokens_per_layer(TOKENS, LAYERS)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [n + 3 + 5 + 3 for n in vision]


@pytest.mark.parametrize("name", peers.NAMES)
def test_generations_that_take_turns_do_not_disturb_each_other(name):
    model = attached(name)
    prompts = [batch([row(3, 0, 5)]), batch([row(2, 0, 0, 4)], seed=9)]
    wanted = [model.generate(**one, max_new_tokens=4, **GREEDY)[0, -4:].tolist() for one in prompts]
    caches = [DynamicCache(config=model.config.get_text_config()) for _ in prompts]
    tokens: list[list[int]] = [[], []]
    for step in range(4):
        for turn, prompt in enumerate(prompts):
            inputs = prompt
            if step:
                place = prompt["input_ids"].shape[1] + step - 1
                inputs = {"input_ids": torch.tensor([tokens[turn][-1:]])}
                inputs["position_ids"] = torch.tensor([[place]])
            with torch.no_grad():
                logits = model(**inputs, past_key_values=caches[turn], use_cache=True).logits
            tokens[turn].append(int(logits[0, -1].argmax()))
    assert tokens == wanted


@pytest.mark.parametrize("name", [name for name in peers.NAMES if name != "random"])
def test_a_conversation_goes_on_on_the_same_cache(name):
    """Not for random: its draws come from the ids of the call that brings the image."""
    model = attached(name, positions="keep")
    cache = DynamicCache(config=model.config.get_text_config())
    inputs = batch([row(3, 0, 5)])
    generated = model.generate(**inputs, past_key_values=cache, max_new_tokens=4, **GREEDY)
    whole = torch.cat([generated, torch.tensor([row(2, 0, 3, seed=5)])], dim=1)
    given = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    more = paper.pixels(1, seed=8)
    got = model.generate(
        **given, pixel_values=more, past_key_values=cache, max_new_tokens=3, **GREEDY
    )
    # Uncached, the labels tell where each question ends.
    labels = torch.full_like(got, -100)
    start = inputs["input_ids"].shape[1]
    labels[:, start : start + 4] = got[:, start : start + 4]
    labels[:, whole.shape[1] :] = got[:, whole.shape[1] :]
    both = torch.cat([inputs["pixel_values"], more])
    with torch.no_grad():
        logits = model(input_ids=got, pixel_values=both, labels=labels).logits
    assert logits[0, -4:-1].argmax(-1).tolist() == got[0, whole.shape[1] :].tolist()


@pytest.mark.parametrize("name", peers.NAMES)
def test_beams_with_a_cache_have_the_likelihood_of_a_forward_without(name):
    model = attached(name)
    inputs = batch([row(3, 0, 5), row(2, 0, 3, 0, 6)])
    how = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True}
    found = model.generate(
        **inputs, **how, output_scores=True, max_new_tokens=4, length_penalty=0, **GREEDY
    )
    width = inputs["input_ids"].shape[1]
    for number, tokens in enumerate(found.sequences):
        single = alone(inputs, number // 2)
        ids = torch.cat([single["input_ids"], tokens[None, width:]], dim=1)
        labels = ids.clone()
        labels[:, : single["input_ids"].shape[1]] = -100
        given = {"input_ids": ids, "pixel_values": single["pixel_values"], "labels": labels}
        with torch.no_grad():
            loss = model(**given).loss
        torch.testing.assert_close(-4 * loss, found.sequences_scores[number], **CLOSE)


@pytest.mark.parametrize("name", peers.NAMES)
def test_a_budget_of_all_tokens_is_the_dense_model_bit_for_bit(name):
    model = llava()
    method = peers.make(name, model, average=TOKENS)
    adsc.attach(model, method)
    inputs = batch(MIXED)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(**inputs).logits, llava()(**inputs).logits)
    assert adsc.plan_of(model) == method


@pytest.mark.parametrize("name", peers.NAMES)
def test_detach_restores_the_model_bit_for_bit(name):
    inputs = batch(MIXED)
    model = attached(name)
    assert model(**inputs).logits.shape[1] < inputs["input_ids"].shape[1]
    adsc.detach(model)
    assert torch.equal(model(**inputs).logits, llava()(**inputs).logits)
    hooks = [
        hook
        for module in model.modules()
        for each in (module._forward_pre_hooks, module._forward_hooks)
        for hook in each.values()
    ]
    assert not [hook for hook in hooks if type(hook).__module__.startswith("adsc")]
    assert not hasattr(model.config, "adsc")


@torch.no_grad()
@pytest.mark.parametrize("name", peers.NAMES)
def test_flash_inputs_give_the_same(name):
    """With the stand-in for flash kernels, which takes their very inputs."""
    model, inputs = attached(name), batch(MIXED)
    wanted = model(**inputs)
    model.model.language_model.set_attn_implementation("stand_in")
    got = model(**inputs)
    for index in range(len(MIXED)):
        kept = wanted.kept_positions[-1][index]
        assert torch.equal(got.kept_positions[-1][index], kept)
        torch.testing.assert_close(
            got.logits[index][kept >= 0], wanted.logits[index][kept >= 0], **CLOSE
        )


@torch.no_grad()
def test_tokens_merge_before_a_later_layer_by_its_keys():
    """The default is layer 0; LLaVA-like models are merged inside the decoder, too."""
    model = llava()
    method = peers.make("tome", model, 20, layer=2)
    adsc.attach(model, method)
    inputs = batch([row(3, 0, 5)])
    output = model(**inputs)
    counts = stage_counts(method)
    wanted, columns = paper.reference(
        llava(attention="eager"), inputs, paper.tome(2), counts, method.positions
    )
    assert output.kept_positions[-1][0].tolist() == columns
    torch.testing.assert_close(output.logits[0], wanted, **CLOSE)


def test_merging_three_rounds_down_to_one_token_is_the_mean_of_all():
    model = llava()
    method = peers.make("tome", model, 1)
    adsc.attach(model, method)
    inputs = batch([row(3, 0, 5)])
    entered = {}
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: entered.update(hidden=args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        features = torch.cat(model.get_image_features(inputs["pixel_values"]).pooler_output)
        kept = model(**inputs).kept_positions[0][0].tolist()
    (place,) = [slot for slot, column in enumerate(kept) if 3 <= column < 3 + TOKENS]
    torch.testing.assert_close(entered["hidden"][0, place], features.mean(0), rtol=0, atol=1e-5)
