"""The plan travels with a checkpoint, weights that don't fit are refused, adapters merge."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import adsc
from tests.adsc.tiny import batch, llava, row

PLAN = adsc.PruningPlan.parse("2:1/2,4:1/3", anchor="first", positions="reindex")
LORA = LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj", lora_dropout=0.0)


def test_the_plan_travels_in_the_config(tmp_path):
    model = adsc.attach(llava(), PLAN)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["adsc"] == PLAN.to_dict()
    loaded = adsc.from_pretrained(tmp_path, dtype=torch.float32)
    assert adsc.plan_of(loaded) == PLAN
    inputs = batch([row(3, 0, 5), row(4)])
    assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)


def test_a_checkpoint_without_a_plan_loads_dense(tmp_path):
    llava().save_pretrained(tmp_path)
    assert adsc.plan_of(adsc.from_pretrained(tmp_path)) is None


def test_a_detached_model_leaves_no_plan_in_its_checkpoint(tmp_path):
    adsc.detach(adsc.attach(llava(), PLAN)).save_pretrained(tmp_path)
    assert "adsc" not in json.loads((tmp_path / "config.json").read_text())


def test_a_plan_that_does_not_fit_is_refused_on_loading(tmp_path):
    adsc.attach(llava(), PLAN).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["adsc"]["stages"] = [[40, "1/2"]]
    path.write_text(json.dumps(config))
    with pytest.raises(adsc.PlanError, match=r"layer 40, but the decoder has layers 0\.\.5"):
        adsc.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_that_do_not_fit_are_refused(tmp_path, change):
    llava().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    if change == "missing":
        del weights[next(name for name in weights if "q_proj" in name)]
    else:
        weights["language_model.model.layers.0.gate"] = torch.zeros(2)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(adsc.CheckpointError, match=rf"{change}_keys.*layers\.0"):
        adsc.from_pretrained(tmp_path)


def test_attach_reaches_the_model_inside_peft_and_merging_keeps_it():
    inputs = batch([row(3, 0, 5), row(4)])
    wrapped = adsc.attach(get_peft_model(llava(), LORA), PLAN)
    assert adsc.plan_of(wrapped) == PLAN
    assert torch.equal(wrapped(**inputs).logits, adsc.attach(llava(), PLAN)(**inputs).logits)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.SGD((p for p in wrapped.parameters() if p.requires_grad), lr=1.0)
    for _ in range(2):
        wrapped(**inputs, labels=labels).loss.backward()
        optimizer.step()
    trained = wrapped(**inputs).logits
    merged = wrapped.merge_and_unload()
    assert adsc.plan_of(merged) == PLAN
    torch.testing.assert_close(merged(**inputs).logits, trained, rtol=0, atol=1e-4)
    assert not torch.allclose(trained, llava()(**inputs).logits[:, -trained.shape[1] :], atol=1e-2)


def test_peft_around_an_attached_model_and_detach():
    inputs = batch([row(3, 0, 5), row(4)])
    wrapped = get_peft_model(adsc.attach(llava(), PLAN), LORA)
    assert adsc.plan_of(wrapped) == PLAN
    adsc.detach(wrapped)
    assert torch.equal(wrapped(**inputs).logits, llava()(**inputs).logits)
