"""A plan stands wherever a model, a config or an adapter goes: what is loaded or built from it is
in force, or warned of."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import adsc
from tests.adsc.rows import Rows, collate
from tests.adsc.tiny import batch, llava, row

PLAN = adsc.PruningPlan.parse("2:1/2,4:1/4")
OTHER = adsc.PruningPlan.parse("3:1/4")
LORA: dict[str, Any] = {"r": 4, "target_modules": r".*language_model.*\.(q|v)_proj"}


def adapter(path: Path, plan: Any = PLAN, **save: Any) -> PeftModel:
    """An adapter with weights of its own, saved from an attached model."""
    base = llava() if plan is None else adsc.attach(llava(), plan)
    model = get_peft_model(base, LoraConfig(**LORA))
    torch.manual_seed(1)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.normal_(std=0.3)
    model.save_pretrained(path, **save)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch([row(3, 0, 5), row(6)])).logits


def test_an_adapter_brings_its_plan_to_a_dense_base(tmp_path):
    wanted = adapter(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["adsc"] == PLAN.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error", adsc.PlanWarning)
        loaded = PeftModel.from_pretrained(llava(), tmp_path).eval()
    assert adsc.plan_of(loaded) == PLAN
    assert torch.equal(logits(loaded), logits(wanted))
    assert PeftConfig.from_pretrained(tmp_path).adsc == PLAN.to_dict()


def test_an_adapter_brings_its_named_plans_to_a_base_without_any(tmp_path):
    named = {"64": PLAN, "32": OTHER}
    base = adsc.name_plans(adsc.attach(llava(), PLAN), named)
    get_peft_model(base, LoraConfig(**LORA)).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llava(), tmp_path)
    assert adsc.plans_of(loaded) == named
    assert adsc.plan_of(adsc.attach(loaded, "32")) == OTHER
    own = adsc.name_plans(llava(), {"half": "2:1/2"})
    with pytest.warns(adsc.PlanWarning, match=r"plans 64, 32, and its base has others, half"):
        loaded = PeftModel.from_pretrained(own, tmp_path)
    assert adsc.plans_of(loaded).keys() == {"half"}


def test_transformers_own_loading_of_adapters(tmp_path):
    wanted = adapter(tmp_path / "adapter")
    model = llava()
    model.load_adapter(tmp_path / "adapter")
    assert adsc.plan_of(model) == PLAN
    assert torch.equal(logits(model), logits(wanted))
    model.save_pretrained(tmp_path / "again")
    assert "adsc" in json.loads((tmp_path / "again" / "adapter_config.json").read_text())


def test_a_folder_with_an_adapter_alone_loads_with_its_plan(tmp_path):
    llava().save_pretrained(tmp_path / "base")
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    model = get_peft_model(adsc.attach(base, PLAN), LoraConfig(**LORA))
    model.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    found = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    config.write_text(json.dumps(found))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter")
    assert adsc.plan_of(loaded) == PLAN
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))


@pytest.mark.parametrize("name", ["default", "sft"])
def test_a_second_adapter_and_one_with_a_name(tmp_path, name):
    model = get_peft_model(adsc.attach(llava(), PLAN), LoraConfig(**LORA), adapter_name=name)
    model.add_adapter("more", LoraConfig(**LORA))
    model.save_pretrained(tmp_path)
    files = sorted(tmp_path.rglob("adapter_config.json"))
    assert len(files) == 2
    for file in files:
        assert json.loads(file.read_text())["adsc"] == PLAN.to_dict()
        dense = get_peft_model(llava(), LoraConfig(**LORA), adapter_name="first")
        dense.load_adapter(file.parent, "late")
        assert adsc.plan_of(dense) == PLAN


def test_an_adapter_and_its_base_that_differ_are_warned_of(tmp_path):
    adapter(tmp_path)
    with pytest.warns(adsc.PlanWarning, match="trained under plan '2:1/2,4:1/4'.*drops by 3:1/4"):
        loaded = PeftModel.from_pretrained(adsc.attach(llava(), OTHER), tmp_path)
    assert adsc.plan_of(loaded) == OTHER
    with pytest.warns(adsc.PlanWarning, match="dense on purpose"):
        loaded = PeftModel.from_pretrained(adsc.attach(llava(), ""), tmp_path)
    assert not adsc.plan_of(loaded).stages
    with warnings.catch_warnings():
        warnings.simplefilter("error", adsc.PlanWarning)
        PeftModel.from_pretrained(adsc.attach(llava(), PLAN), tmp_path)


def test_an_adapter_of_a_dense_model_says_nothing(tmp_path):
    model = adapter(tmp_path, plan=None)
    assert "adsc" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert adsc.plan_of(PeftModel.from_pretrained(llava(), tmp_path)) is None
    adsc.attach(model, PLAN)
    model.save_pretrained(tmp_path / "with")
    adsc.detach(model)
    model.save_pretrained(tmp_path / "without")
    kept = [
        "adsc" in json.loads((tmp_path / one / "adapter_config.json").read_text())
        for one in ("with", "without")
    ]
    assert kept == [True, False]


def test_the_trainers_checkpoints_of_an_adapter_hold_the_plan(tmp_path):
    model = get_peft_model(adsc.attach(llava(), PLAN), LoraConfig(**LORA))
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=args, train_dataset=Rows(), data_collator=collate)
    trainer.train()
    for step in (1, 2):
        loaded = PeftModel.from_pretrained(llava(), tmp_path / f"checkpoint-{step}")
        assert adsc.plan_of(loaded) == PLAN
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert adsc.plan_of(model) == PLAN


def test_a_model_built_from_a_config_with_a_plan_drops_by_it(tmp_path):
    adsc.attach(llava(), PLAN).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    for build in (LlavaForConditionalGeneration, AutoModelForImageTextToText.from_config):
        built = build(config).eval()
        assert adsc.plan_of(built) == PLAN
        built.load_state_dict(llava().state_dict())
        assert torch.equal(logits(built), logits(adsc.attach(llava(), PLAN)))
    empty = LlavaForConditionalGeneration(adsc.attach(llava(), "").config)
    assert not adsc.plan_of(empty).stages


def test_a_config_that_two_models_share_is_warned_of_on_saving(tmp_path):
    first = llava()
    second = LlavaForConditionalGeneration(first.config)
    adsc.attach(first, PLAN)
    with pytest.warns(
        adsc.PlanWarning, match="runs dense, but its config holds plan '2:1/2,4:1/4'"
    ):
        second.save_pretrained(tmp_path)


def test_a_config_that_was_replaced_gets_the_plan_on_saving(tmp_path):
    model = adsc.attach(llava(), PLAN)
    model.config = copy.deepcopy(llava().config)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["adsc"] == PLAN.to_dict()
    assert adsc.plan_of(adsc.from_pretrained(tmp_path)) == PLAN


IMPORTED_LATER = """
import sys, adsc
from tests.adsc.tiny import llava
assert "peft" not in sys.modules, "adsc must not import peft"
import importlib.util
importlib.util.find_spec("peft")
base = llava()
import peft
assert type(peft.__loader__).__module__ != "adsc.attachment.after_import"
model = peft.PeftModel.from_pretrained(base, sys.argv[1])
print(adsc.plan_of(model))
"""
PLAIN = """
import sys, warnings
from peft import PeftModel
from tests.adsc.tiny import llava
assert "adsc" not in sys.modules
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    PeftModel.from_pretrained(llava(), sys.argv[1])
print([str(one.message) for one in seen])
"""


def _run(code: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_peft_that_is_imported_after_adsc(tmp_path):
    adapter(tmp_path)
    assert str(PLAN) in _run(IMPORTED_LATER, str(tmp_path))


def test_plain_peft_names_the_field_that_it_ignores(tmp_path):
    adapter(tmp_path)
    assert "['adsc']" in _run(PLAIN, str(tmp_path))


def test_merging_a_loaded_adapter_keeps_its_plan(tmp_path):
    wanted = adapter(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(llava(), tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = adsc.from_pretrained(tmp_path / "merged").eval()
    assert adsc.plan_of(loaded) == PLAN
    torch.testing.assert_close(logits(loaded), logits(wanted), rtol=0, atol=1e-4)
