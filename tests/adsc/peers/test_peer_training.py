"""Training with a peer attached: gradients, labels, checkpointing, adapters, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import adsc
from adsc import peers
from tests.adsc.peers.peer_cases import CLOSE, attached, expected
from tests.adsc.peers.peer_reference import alone, batch, llava, row
from tests.adsc.tiny import IMAGE
from tests.matrix import matrix

ROWS = [row(3, 0, 7), row(2, 0, 3, 0, 6), row(6)]
ANSWER = 2  # the last words of a row


def supervised() -> dict[str, torch.Tensor]:
    inputs = batch(ROWS, "right")
    lengths = inputs["attention_mask"].sum(1)
    labels = torch.full_like(inputs["input_ids"], -100)
    for index, length in enumerate(lengths.tolist()):
        labels[index, length - ANSWER : length] = inputs["input_ids"][
            index, length - ANSWER : length
        ]
    return inputs | {"labels": labels}


@pytest.mark.parametrize("name", peers.NAMES)
def test_loss_and_gradients_equal_the_paper(name):
    inputs = supervised()
    model, plain = attached(name).train(), llava(attention="eager").train()
    output = model(**inputs)
    output.loss.backward()
    total = 0.0
    for index in range(len(ROWS)):
        single = alone(inputs, index)
        ids = single["input_ids"][0]
        logits, columns = expected(name, plain, single, len(ids) - 1 - ANSWER)
        assert (ids[columns[-ANSWER:]] != IMAGE).all()
        total = total + torch.nn.functional.cross_entropy(
            logits[-1 - ANSWER : -1], ids[-ANSWER:], reduction="sum"
        )
    (total / (len(ROWS) * ANSWER)).backward()
    torch.testing.assert_close(output.loss, total / (len(ROWS) * ANSWER), **CLOSE)
    wanted = dict(plain.named_parameters())
    reached = 0
    for parameter_name, parameter in model.named_parameters():
        if wanted[parameter_name].grad is not None:
            reached += 1
            torch.testing.assert_close(parameter.grad, wanted[parameter_name].grad, **CLOSE)
    assert reached > 60


def gradients(model: Any, **inputs: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    model(**inputs).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@matrix(name=peers.NAMES, reentrant=[False, True])
def test_gradient_checkpointing_chooses_once_and_changes_nothing(name, reentrant, monkeypatch):
    """With adapters whose dropout must draw the same numbers in both runs of a layer."""
    config = LoraConfig(
        r=4,
        lora_dropout=0.3,
        init_lora_weights=False,
        target_modules=r".*language_model.*\.(q|k|v|o)_proj",
    )
    torch.manual_seed(0)
    model = get_peft_model(attached(name), config).train()
    method, calls = adsc.plan_of(model), []
    if name != "stride":
        kind, choose = type(method), type(method).choose
        monkeypatch.setattr(
            kind, "choose", lambda self, *args: calls.append(0) or choose(self, *args)
        )
    inputs = supervised()
    wanted = gradients(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients(model, **inputs)
    assert got.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(got[parameter], gradient, rtol=0, atol=1e-6)
    assert len(calls) == (0 if name == "stride" else 2 * len(method.stages))


@pytest.mark.parametrize("name", peers.NAMES)
def test_autocast_leaves_gradients_to_every_adapter(name):
    """Scoring casts weights without gradients; the layers must not find those in the cache."""
    config = LoraConfig(
        r=4,
        init_lora_weights=False,
        target_modules=r".*(language_model|vision_tower).*\.(q|k)_proj",
    )
    torch.manual_seed(0)
    model = get_peft_model(attached(name), config).train()
    inputs = supervised()
    wanted = gradients(model, **inputs)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    missing = [n for n, p in model.named_parameters() if n in wanted and p.grad is None]
    assert not missing
    used = {n for n, gradient in wanted.items() if gradient.abs().sum() > 0}
    assert used
    assert not [n for n, p in model.named_parameters() if n in used and p.grad.abs().sum() == 0]
