"""What goes into a model and what comes out: greedy tokens, pictures, costs; on tiny models."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.evaluation.generation import Questions, generate_tokens
from pipeline.stages.evaluate import EvaluateConfig, write_pictures
from tests.adsc import tiny
from tests.pipeline.contexts import stage_context


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


def test_samples_show_the_picture_that_the_model_saw(tmp_path: Path) -> None:
    """Each turn's own, turned as its EXIF says, and 16 bits scaled."""
    turned, grey = io.BytesIO(), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    Image.new("RGB", (60, 40), "red").save(turned, "JPEG", exif=exif)
    Image.fromarray(np.full((30, 30), 200 << 8, np.uint16)).save(grey, "PNG")
    turns = [turn for text in ("<image>\nA?", "<image>\nB?", "A again?") for turn in
             (("human", text), ("gpt", "yes"))]  # fmt: skip
    row = {
        "id": "talk", "pictures": [turned.getvalue(), grey.getvalue()], "kinds": [],
        "turns": json.dumps(turns), "length": 9, "supervised": 3, "vision_tokens": 8,
    }  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "0.parquet")
    ctx = stage_context("evaluate", tmp_path / "out", {})
    numbers, files = write_pictures(ctx, EvaluateConfig(), Questions(tmp_path))
    assert numbers == [0, 1, 2]
    assert files == ["pictures/0.png", "pictures/1.png", "pictures/2.png"]
    first, second, third = (Image.open(ctx.out / file) for file in files)
    assert (first.size, second.size, third.size) == ((40, 60), (30, 30), (40, 60))
    assert not first.getexif() and second.getpixel((9, 9)) == (200, 200, 200)
    config = EvaluateConfig(sample_pictures=1)
    again = stage_context("evaluate", tmp_path / "again", {})
    assert write_pictures(again, config, Questions(tmp_path)) == ([0], ["pictures/0.png"])
