"""A checkpoint with a plan in transformers' own doors: pipelines and the Auto classes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, pipeline

import adsc
from tests.adsc.tiny import batch, llava, processor, row

PLAN = adsc.PruningPlan.parse("2:1/2,4:1/4")


@pytest.fixture
def checkpoint(tmp_path):
    adsc.attach(llava(), PLAN).save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    return tmp_path


def test_auto_classes_attach_the_plan(checkpoint):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert adsc.plan_of(model) == PLAN
    inputs = batch([row(3, 0, 5)])
    assert torch.equal(model(**inputs).logits, adsc.attach(llava(), PLAN)(**inputs).logits)


def test_the_pipeline_runs_compressed(checkpoint):
    pipe = pipeline("image-text-to-text", model=str(checkpoint))
    seen: list[int] = []
    last = pipe.model.model.language_model.layers[-1]
    last.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    picture = Image.new("RGB", (40, 50), (200, 30, 90))
    answers = pipe(
        images=picture, text="w5 <image> w7 w8", max_new_tokens=3, return_full_text=False
    )
    assert isinstance(answers[0]["generated_text"], str)
    assert adsc.plan_of(pipe.model) == PLAN
    assert seen[0] == 3 + 2


def test_copies_and_pickles_of_a_model_are_attached_and_can_be_detached():
    inputs = batch([row(3, 0, 5)])
    model = adsc.attach(llava(), PLAN)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs).logits, model(**inputs).logits)
        adsc.detach(other)
        assert torch.equal(other(**inputs).logits, llava()(**inputs).logits)
    assert adsc.plan_of(model) == PLAN
