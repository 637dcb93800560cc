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
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma3Processor, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

import adsc
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.generation import Questions, append_text, encode, generate_tokens
from pipeline.evaluation.speed import measure_and_count, pictures_of_rows
from pipeline.stages.evaluate import write_pictures
from tests.adsc import tiny, zoo
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
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert generated[:, inputs["input_ids"].shape[1] :].tolist() != greedy.tolist()
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


FEW = {"rounds": 1, "decode_rounds": 1, "decode_tokens": 2}


@pytest.mark.parametrize(
    "name",
    [
        "llava_next",
        "qwen2_5_vl",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("llava", "internvl", "smolvlm")),
    ],
)
def test_costs_are_those_of_the_evaluated_pictures(name: str) -> None:
    """To the byte, in every family: several pictures, of any size, as tiles, or none."""
    case = zoo.CASES[name]
    model = case.model("sdpa")
    model.config.dtype = model.dtype  # as a checkpoint's says
    first, second, *_ = case.pictures(model)
    plans = [adsc.PruningPlan.parse(""), adsc.PruningPlan.parse("1:1/2,3:1/2")]
    flops = []
    for row in ([3, first, 4], [3, second, 4], [3, first, 4, first], [7]):
        inputs = case.batch([row])
        found = measure_and_count(model, inputs, plans, **FEW)
        vision = int((inputs["input_ids"] == zoo.IMAGE).sum())
        assert found["num_vision_tokens"] == vision == found["dense"].tokens_per_layer[0]
        for times, cost in found["methods"]:
            assert times["kv_measured_bytes"] == cost.kv_cache_bytes
        flops.append(found["dense"].flops)
    assert flops[3] < flops[0] < flops[2]
    pictures = [pictures_of_rows(model, case.batch([row])) for row in ([3, first], [3, second])]
    assert pictures_of_rows(model, case.batch([[7], [3, second, 4, first]])) == [
        [],
        pictures[1][0] + pictures[0][0],
    ]


def test_the_cost_of_a_batch_is_the_mean_of_its_rows() -> None:
    """Text alone is a row without pictures."""
    model, inputs = tiny.llava(), tiny.batch([tiny.row(6), tiny.row(2, 0, 4), tiny.row(3, 0, 3, 0)])
    plan = adsc.PruningPlan.parse("2:1/4")
    found = measure_and_count(model, inputs, [plan], **FEW)
    ((_, cost),) = found["methods"]
    rows = [adsc.estimate_cost(model.config, plan, 6, count) for count in range(3)]
    assert (found["text_tokens"], found["num_vision_tokens"]) == (6, 16)
    assert cost.flops == pytest.approx(np.mean([row.flops for row in rows]), abs=1)
    assert cost.kv_cache_bytes == np.mean([row.kv_cache_bytes for row in rows])
    assert cost.tokens_per_layer == [16, 16, 4, 4, 4, 4]
    assert cost.average_vision_tokens == 8
    assert found["dense"].average_vision_tokens == 16


def gemma_processor() -> Gemma3Processor:
    words = ["<pad>", "<s>", "</s>", "<boi>", "<eoi>", "<image>", "what", "both"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", extra_special_tokens=tokens
    )
    pictures = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    return Gemma3Processor(image_processor=pictures, tokenizer=tokenizer, image_seq_length=4)


@pytest.mark.parametrize(
    ("processor", "marker", "image", "tokens"),
    [(gemma_processor, "<boi>", 5, 4), (tiny.processor, "<image>", tiny.IMAGE, tiny.TOKENS)],
    ids=["gemma3", "llava"],
)
def test_a_batch_is_encoded_with_each_prompts_own_pictures(
    processor: Any, marker: str, image: int, tokens: int
) -> None:
    red, blue = (Image.new("RGB", (32, 32), color) for color in ("red", "blue"))
    prompts = ["what", f"{marker} what", f"{marker} {marker} both"]
    inputs = encode(prompts, [[], [red], [red, blue]], processor())
    assert (inputs["input_ids"] == image).sum(dim=1).tolist() == [0, tokens, 2 * tokens]
    first, second, third = inputs["pixel_values"]
    assert torch.equal(first, second) and not torch.equal(second, third)
    assert "pixel_values" not in encode(prompts[:1], [[]], processor())


def test_appended_text_has_a_type_as_the_prompt_has() -> None:
    """Qwen2.5-VL places tokens by their types."""
    case = zoo.CASES["qwen2_5_vl"]
    model = case.model("sdpa")
    picture = case.pictures(model)[0]
    prompt, words = case.batch([[3, picture, 4]]), torch.tensor([[20, 30, 40]])
    whole = append_text(prompt, words)
    assert whole["mm_token_type_ids"].tolist() == [
        [int(token == zoo.IMAGE) for token in whole["input_ids"][0].tolist()]
    ]
    assert whole["input_ids"][0, -3:].tolist() == [20, 30, 40] and whole["attention_mask"].all()
    assert whole["pixel_values"] is prompt["pixel_values"]
    with torch.inference_mode():
        assert model(**whole).logits.shape[1] == prompt["input_ids"].shape[1] + 3
