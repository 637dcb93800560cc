"""What goes into a model and what comes out: greedy tokens, pictures, costs; on tiny models."""

from typing import Any

import pytest
import torch

from pipeline.evaluation.generation import generate_tokens
from tests.adsc import tiny


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
        {"min_new_tokens": 8},
        {"suppress_tokens": list(range(3, 60))},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_answers_are_greedy_whatever_the_checkpoint_asks_for(setting: dict[str, Any]) -> None:
    model = tiny.llava()
    inputs = tiny.batch([tiny.row(5, 0, 3), tiny.row(2, 0, 9)])
    first = generate_tokens(model, inputs, 8)[0].tolist()
    model.generation_config.eos_token_id = first[3]  # what min_new_tokens would forbid
    greedy = generate_tokens(model, inputs, 8)
    assert greedy[0].tolist() == first[:4] + [tiny.PAD] * 4
    model.generation_config.update(**setting)
    told = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert told[:, inputs["input_ids"].shape[1] :].tolist() != greedy.tolist()
    assert torch.equal(generate_tokens(model, inputs, 8), greedy)
    assert model.generation_config.to_dict().items() >= setting.items()
