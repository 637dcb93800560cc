"""adsc.compile_layers: equal to eager layers, few graphs whatever the plan, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters

import adsc
from adsc.attachment.compiled import LIMIT
from pipeline.training.adapters import prepare_trainable
from pipeline.training.config import LoraSettings
from tests.adsc.attached import GREEDY, MIXED, attached
from tests.adsc.tiny import IMAGE, batch, llava, row

PLANS = ("2:1/2,4:1/4", "1:1/4,4:0;pool=tiles", "3:1/4;pool=runs", "0:1/2", "")
ROWS = (MIXED, [row(3, 0, 5), row(2, 0, 6)], [row(1, 0, 7), row(3, 0, 0, 2)])


def gradients(model, inputs, plan):
    """Loss and gradients of a call under a plan."""
    model.zero_grad()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    torch.manual_seed(3)  # of dropout
    with adsc.running(model, plan):
        loss = model(**inputs, labels=labels, use_cache=False).loss
    loss.backward()
    return loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "checkpointing",
    [False, pytest.param(True, marks=pytest.mark.slow)],  # a fast training recomputes, too
    ids=["kept", "recomputed"],
)
def test_training_calls_are_equal_and_share_their_graphs(checkpointing):
    """Every plan with every batch: no break in a graph, and no more of them than the limit."""
    torch._dynamo.reset()
    counters.clear()
    model = attached()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    made = prepare_trainable(model, LoraSettings(rank=4, alpha=8, dropout=0.1), ()).train()
    for name, parameter in made.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    plain = copy.deepcopy(made)
    adsc.compile_layers(made, backend="eager", fullgraph=True)
    after = []
    for _ in range(2):
        for rows in ROWS:
            for plan in PLANS:
                inputs = batch(rows, side="right")
                loss, own = gradients(made, inputs, plan)
                wanted, others = gradients(plain, inputs, plan)
                assert loss == wanted
                assert len(own) == len(others) > 0
                assert all(map(torch.equal, own, others))
        after.append(counters["stats"]["unique_graphs"])
    assert 0 < after[0] == after[1] <= LIMIT


@torch.no_grad()
def test_what_is_generated_and_handed_out_is_that_of_eager_layers():
    inputs = batch(MIXED)
    plain = attached(implementation="eager")
    model = adsc.compile_layers(copy.deepcopy(plain), backend="eager")
    counters.clear()
    for more in ({}, {"cache_implementation": "static"}):
        wanted = plain.generate(**inputs, max_new_tokens=4, **more, **GREEDY)
        assert model.generate(**inputs, max_new_tokens=4, **more, **GREEDY).equal(wanted)
    assert 0 < counters["stats"]["unique_graphs"] <= LIMIT / 2
    how = {"use_cache": False, "output_attentions": True, "output_hidden_states": True}
    model(**inputs, use_cache=False)  # compiled before attentions are wanted
    got, wanted = model(**inputs, **how), plain(**inputs, **how)
    assert len(wanted.attentions) == 6
    assert all(map(torch.equal, got.attentions, wanted.attentions))
    assert all(map(torch.equal, got.hidden_states, wanted.hidden_states))


@torch.no_grad()
def test_a_copy_runs_its_own_layers_and_uncompiled_is_as_before():
    inputs = batch([row(3, 0, 5)])
    model = adsc.compile_layers(attached(), backend="eager")
    before = model(**inputs, use_cache=False).logits
    other = copy.deepcopy(model)
    other.model.language_model.layers[0].mlp.down_proj.weight.zero_()
    assert torch.equal(model(**inputs, use_cache=False).logits, before)
    assert not torch.equal(other(**inputs, use_cache=False).logits, before)
    adsc.uncompile_layers(model)
    assert not any("forward" in vars(layer) for layer in model.model.language_model.layers)
    assert torch.equal(model(**inputs, use_cache=False).logits, before)


def test_a_replaced_forward_is_refused():
    model = llava()
    model.model.language_model.layers[2].forward = lambda *args, **kwargs: None
    with pytest.raises(adsc.UnsupportedModel, match="replaced the forward of decoder layer 2"):
        adsc.compile_layers(model)


@pytest.mark.slow  # a C++ compiler takes a minute
def test_inductor_is_close():
    torch._dynamo.reset()
    model = attached().train()
    plain = copy.deepcopy(model)
    adsc.compile_layers(model)
    inputs = batch([row(3, 0, 5), row(2, 0, 6)], side="right")
    for plan in PLANS[:2]:
        loss, own = gradients(model, inputs, plan)
        wanted, others = gradients(plain, inputs, plan)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
        for one, other in zip(own, others, strict=True):
            # Rounded elsewhere; measured: at most 5e-5 in an element.
            torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4)
