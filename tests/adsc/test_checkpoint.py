"""The plan travels with a checkpoint, weights that don't fit are refused, adapters merge."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import adsc
from tests.adsc.tiny import batch, llava, row
from tests.adsc.zoo import CASES

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


NAMED = {"10": PLAN, "9": "2:1/4", "m.4-x": "0:1/4,3:1/2"}


@pytest.fixture(scope="module")
def elastic(tmp_path_factory):
    """A checkpoint with three named plans, which runs with the second."""
    folder = tmp_path_factory.mktemp("elastic")
    adsc.attach(adsc.name_plans(llava(), NAMED), "9").save_pretrained(folder)
    return folder


def test_named_plans_travel_in_the_config_beside_the_default(elastic):
    config = json.loads((elastic / "config.json").read_text())
    assert config["adsc"] == config["adsc_plans"]["9"]
    loaded = adsc.from_pretrained(elastic)
    assert str(adsc.plan_of(loaded)) == "2:1/4"
    assert list(adsc.plans_of(loaded)) == list(NAMED), "numbers first, the largest first"
    assert adsc.plans_of(loaded)["10"] == PLAN


@pytest.mark.parametrize(
    ("chosen", "plan"),
    [
        (None, "2:1/4"),
        ("10", PLAN),
        ("m.4-x", "0:1/4,3:1/2"),
        ("dense", ""),
        ("1:1/2", "1:1/2"),
        (adsc.PruningPlan.parse("4:1/2"), "4:1/2"),
    ],
)
def test_a_checkpoint_loads_with_any_plan(elastic, chosen, plan):
    loaded = adsc.from_pretrained(elastic, plan=chosen).eval()
    assert str(adsc.plan_of(loaded)) == str(plan)
    inputs = batch([row(3, 0, 5), row(4)])
    with torch.no_grad():
        expected = adsc.attach(llava(), plan).eval()(**inputs).logits
        assert torch.equal(loaded(**inputs).logits, expected)
    assert len(adsc.plans_of(loaded)) == 3, "the names stay whatever it runs with"


def test_a_loaded_model_changes_its_budget_by_name_and_is_saved_so(elastic, tmp_path):
    model = adsc.attach(get_peft_model(adsc.from_pretrained(elastic), LORA), "10")
    assert adsc.plan_of(model) == PLAN
    adsc.attach(model, "dense")
    assert adsc.plan_of(model) == adsc.PruningPlan()
    adsc.attach(model, "m.4-x").merge_and_unload().save_pretrained(tmp_path)
    again = adsc.from_pretrained(tmp_path)
    assert str(adsc.plan_of(again)) == "0:1/4,3:1/2" and len(adsc.plans_of(again)) == 3


def test_a_checkpoint_of_one_plan_loads_with_another(tmp_path):
    adsc.attach(llava(), PLAN).save_pretrained(tmp_path)
    assert str(adsc.plan_of(adsc.from_pretrained(tmp_path, plan="2:1/4"))) == "2:1/4"
    assert adsc.plan_of(adsc.from_pretrained(tmp_path, plan="dense")) == adsc.PruningPlan()
    assert adsc.plans_of(adsc.from_pretrained(tmp_path)) == {}
    with pytest.raises(adsc.PlanError, match="'64': this model has no named plans; write dense"):
        adsc.from_pretrained(tmp_path, plan="64")


def test_an_unknown_name_lists_those_that_are_known(elastic):
    with pytest.raises(adsc.PlanError, match=r"'m4' is unknown: .*has 10, 9, m\.4-x and dense; a"):
        adsc.from_pretrained(elastic, plan="m4")
    with pytest.raises(adsc.PlanError, match=r"did you mean m\.4-x\?"):
        adsc.attach(adsc.from_pretrained(elastic), "m.4x")


def test_detaching_takes_the_names_too(elastic, tmp_path):
    adsc.detach(adsc.from_pretrained(elastic)).save_pretrained(tmp_path)
    assert not {"adsc", "adsc_plans"} & json.loads((tmp_path / "config.json").read_text()).keys()
    model = adsc.name_plans(adsc.from_pretrained(elastic), {})
    assert adsc.plans_of(model) == {} and str(adsc.plan_of(model)) == "2:1/4"


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ({"dense": "2:1/4"}, "'dense' can't name a plan: it is the model without one"),
        ({"a b": "2:1/4"}, "'a b' can't name a plan: use letters"),
        ({"2:1/4": "2:1/4"}, "'2:1/4' can't name a plan"),
        ({"64": ""}, "plan named '64' drops nothing: leave it out"),
        ({"64": "2:1/4", "32": "2:2"}, r"plan named '32': keep ratio 2 .* must be in"),
        (
            {"64": "2:1/4", "32": "9:1/4"},
            r"'32' does not fit this model: .*0\.\.5; all plans of one",
        ),
    ],
)
def test_names_and_plans_that_can_not_be(plans, message):
    model = llava()
    with pytest.raises(adsc.PlanError, match=message):
        adsc.name_plans(model, plans)
    assert adsc.plans_of(model) == {}


def test_a_named_plan_that_the_family_does_not_allow_is_refused():
    """Plans of one checkpoint may differ in what a family allows: one is fine, another is not."""
    case = CASES["qwen2_vl"]
    plans = {"kept": "2:1/4", "renumbered": "2:1/4;positions=reindex"}
    with pytest.raises(adsc.PlanError, match=r"'renumbered' does not fit .*use positions='keep'"):
        adsc.name_plans(case.build(), plans)


def test_a_named_plan_that_does_not_fit_is_refused_on_loading(elastic, tmp_path):
    shutil.copytree(elastic, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["adsc_plans"]["10"]["stages"] = [[40, "1/2"]]
    path.write_text(json.dumps(config))
    with pytest.raises(adsc.PlanError, match=r"plan named '10' does not fit.*layer 40"):
        adsc.from_pretrained(tmp_path)
    config["adsc_plans"] = ["2:1/4"]
    path.write_text(json.dumps(config))
    with pytest.raises(adsc.PlanError, match=r"adsc_plans in the config is .*: it maps names to"):
        adsc.from_pretrained(tmp_path)


def test_a_call_runs_under_a_named_plan(elastic):
    model, inputs = adsc.from_pretrained(elastic).eval(), batch([row(3, 0, 5), row(4)])
    with torch.no_grad():
        for name in ("10", "dense"):
            expected = adsc.from_pretrained(elastic, plan=name).eval()(**inputs).logits
            with adsc.running(model, name):
                assert torch.equal(model(**inputs).logits, expected)
    with pytest.raises(adsc.PlanError, match="'7' is unknown"):
        adsc.running(model, "7")
    assert str(adsc.plan_of(model)) == "2:1/4"
