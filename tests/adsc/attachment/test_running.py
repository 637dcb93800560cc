"""Calls under another plan or under none, and losses at supervised positions alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

import adsc
from adsc import peers
from adsc.attachment.supervised import head, hidden_states
from adsc.peers.visionzip import _PASSES
from tests.adsc.attached import GREEDY, MIXED
from tests.adsc.peers import peer_reference as larger
from tests.adsc.peers.peer_cases import attached
from tests.adsc.tiny import TOKENS, batch, llava, row
from tests.adsc.zoo import CASES, IMAGE, VIDEO, rows_for
from tests.matrix import matrix

PLAN, OTHER = "2:2/3,4:1/2", "1:1/2"


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", CASES)
def test_a_suspended_call_is_plain_and_another_plan_is_as_if_attached(name):
    case = CASES[name]
    inputs = case.batch(rows_for(case))
    plain, other = case.model(), adsc.attach(case.model(), "3:1/3")
    model = adsc.attach(case.model(), case.drops)
    own = logits(model, inputs)
    with adsc.suspended(model):
        assert torch.equal(logits(model, inputs), logits(plain, inputs))
        with adsc.running(model, "3:1/3"):
            assert torch.equal(logits(model, inputs), logits(other, inputs))
        assert torch.equal(logits(model, inputs), logits(plain, inputs))
    assert torch.equal(logits(model, inputs), own)
    assert adsc.plan_of(model) == adsc.PruningPlan(stages=case.drops)


@matrix(name=CASES.keys(), drops={"plan": True, "dense": False})
def test_losses_at_supervised_positions_are_those_of_the_model(name, drops):
    """Measured worst difference 1e-6 (relative)."""
    case = CASES[name]
    model = case.model()
    if drops:
        adsc.attach(model, case.drops)
    inputs = case.batch(rows_for(case), "right")
    ids = inputs["input_ids"]
    hidden = (inputs["attention_mask"] == 0) | (ids == IMAGE) | (ids == VIDEO)
    labels = ids.masked_fill(hidden | (torch.arange(ids.shape[1]) % 3 == 0), -100)
    with torch.no_grad():
        wanted = model(**inputs, labels=labels, num_items_in_batch=7).loss
        made = hidden_states(model, inputs | {"labels": labels})
        before = made.before(ids.shape[1])
        places = (labels != -100) & (before >= 0)
        got = cross_entropy(
            head(model)(made.at(before[places])).float(), labels[places], reduction="sum"
        )
    assert places.sum() > 5
    torch.testing.assert_close(got / 7, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", peers.NAMES)
def test_a_peer_can_be_suspended_in_the_middle_of_its_use(name):
    model, inputs = attached(name), larger.batch([larger.row(3, 0, 7), larger.row(2, 0, 3, 0, 6)])
    own = logits(model, inputs)
    plain = logits(adsc.detach(attached(name)), inputs)
    with adsc.suspended(model):
        assert torch.equal(logits(model, inputs), plain)
    assert torch.equal(logits(model, inputs), own)
    with adsc.running(model, adsc.plan_of(model)):
        assert torch.equal(logits(model, inputs), own)


def test_checkpointing_runs_a_layer_again_under_the_plan_that_it_ran_under():
    """Also when other calls were made before the backward pass."""
    inputs = batch([row(3, 0, 5), row(2, 0, 3, 0, 4)], "right")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)

    def gradient(model: Any, *, within: bool) -> torch.Tensor:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if not within:
            loss = model(**inputs, labels=labels).loss
        else:
            with adsc.running(model, OTHER):
                loss = model(**inputs, labels=labels).loss
            with adsc.suspended(model), torch.no_grad():
                model(**inputs)
            model(**inputs, labels=labels)
        loss.backward()
        return model.model.language_model.layers[0].mlp.up_proj.weight.grad

    wanted = gradient(adsc.attach(llava().train(), OTHER), within=False)
    got = gradient(adsc.attach(llava().train(), PLAN), within=True)
    assert torch.equal(got, wanted)


def test_a_block_is_of_its_thread_and_of_its_model():
    model, twin = adsc.attach(llava(), PLAN), adsc.attach(llava(), PLAN)
    inputs = batch(MIXED)
    own, found = logits(model, inputs), []
    with adsc.suspended(model):
        thread = threading.Thread(target=lambda: found.append(logits(model, inputs)))
        thread.start()
        thread.join()
        assert torch.equal(found[0], own)
        assert torch.equal(logits(twin, inputs), own)


def test_generation_and_caches_keep_to_the_plan_that_they_began_with():
    inputs = batch(MIXED)
    model, other = adsc.attach(llava(), PLAN), adsc.attach(llava(), OTHER)
    wanted = other.generate(**inputs, max_new_tokens=4, **GREEDY)
    with adsc.running(model, OTHER):
        got = model.generate(**inputs, max_new_tokens=4, **GREEDY)
    assert got.tolist() == wanted.tolist()
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        grown = torch.ones(len(MIXED), 1, dtype=torch.long)
        more = {
            "input_ids": grown * 5,
            "attention_mask": torch.cat([inputs["attention_mask"], grown], dim=1),
        }
        with adsc.running(model, OTHER), pytest.raises(adsc.CacheError, match="start a new cache"):
            model(**more, past_key_values=cache)


def test_a_compiled_model_obeys_blocks_too():
    """Torch can't trace them, so a call within one runs eagerly; calls outside stay one graph."""
    torch._dynamo.reset()
    inputs = batch([row(3, 0, 5), row(2, 0, 6)])
    model, plain = adsc.attach(llava(), PLAN), llava()
    compiled = torch.compile(model, backend="eager")
    own = logits(model, inputs)
    torch.testing.assert_close(logits(compiled, inputs), own)
    with adsc.suspended(compiled):
        torch.testing.assert_close(logits(compiled, inputs), logits(plain, inputs))
    torch.testing.assert_close(logits(compiled, inputs), own)


def test_what_can_not_run_is_refused():
    with pytest.raises(adsc.PlanError, match="has no plan: attach one first"):
        adsc.running(llava(), PLAN)
    with adsc.suspended(llava()):
        pass
    model = adsc.attach(llava(), PLAN)
    with pytest.raises(adsc.PlanError, match=r"layer 9, but the decoder has layers 0\.\.5"):
        adsc.running(model, "9:1/2")
    with pytest.raises(adsc.PlanError, match="a method installs its own hooks"):
        adsc.running(model, peers.make("fastv", model, average=9, tolerance=0.1))


def test_losses_are_the_same_where_a_model_hands_out_all_columns():
    """Also of a label right before an image, whose column stands there again."""
    inputs = batch([row(3, 0, 5), row(2, 0, 3, 0, 4)], "right")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    given = inputs | {"labels": labels}
    with torch.no_grad():
        kept = hidden_states(adsc.attach(llava(), OTHER), given)
        full = hidden_states(adsc.attach(llava(), OTHER, logits="full"), given)
    width = labels.shape[1]
    assert full.states.shape[1] == width > kept.states.shape[1]
    places = (kept.before(width) >= 0) & inputs["attention_mask"].bool()
    assert torch.equal(places, (full.before(width) >= 0) & inputs["attention_mask"].bool())
    torch.testing.assert_close(
        full.at(full.before(width)[places]), kept.at(kept.before(width)[places])
    )


def test_a_static_cache_is_made_for_the_plan_of_its_block():
    model, inputs = adsc.attach(llava(), "2:1/4"), batch([row(3, 0, 5)])
    length, how = inputs["input_ids"].shape[1] + 4, GREEDY | {"max_new_tokens": 4}
    with torch.no_grad(), adsc.running(model, "2:1/2"):
        cache = adsc.static_cache(model, length, [TOKENS])
        got = model.generate(**inputs, past_key_values=cache, disable_compile=True, **how)
        assert torch.equal(got, model.generate(**inputs, **how))
    assert [layer.max_cache_len for layer in cache.layers] == [length] * 2 + [length - 8] * 4


def test_a_suspended_peer_leaves_nothing_of_its_pictures_to_the_next_call():
    model = attached("visionzip")
    inputs = larger.batch([larger.row(3, 0, 7)])
    with adsc.suspended(model):
        logits(model, inputs)
    assert not _PASSES.get()
