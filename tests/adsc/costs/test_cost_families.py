"""`estimate_cost` equals torch's counter and the cache's bytes on a tiny model of every family."""

from __future__ import annotations

import random

import pytest
import torch
import transformers as tf
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from adsc.attachment.attach import attach
from adsc.costs.cost import estimate_cost
from adsc.costs.geometries import geometry
from adsc.errors import CostError
from adsc.families.llava_next import anyres_grid
from adsc.families.table import FAMILIES
from tests.adsc.costs.cost_cases import (
    CASES,
    ONE,
    ids,
    onevision,
    tiled,
    types,
)
from tests.adsc.costs.counting import counted
from tests.matrix import matrix


@matrix(name=CASES.keys(), attention=["eager", "sdpa"])
def test_exact(name: str, attention: str) -> None:
    case = CASES[name]
    if name == "paligemma 2, sliding" and attention == "sdpa":
        pytest.skip("transformers has no sdpa for Gemma 2: its attention scores are soft-capped")
    torch.manual_seed(0)
    model = case.model._from_config(case.config(), attn_implementation=attention).eval()
    # Text alone comes first: the Qwen-VL models keep the rope offsets of their last call.
    batches = [(0, 1, 1), (1, 1, 0)] + [(case.most_images, 2, 2)] * (case.tokens < 500)
    for plan in ("", "2:1/2,4:1/3"):
        attach(model, plan)
        for images, rows, steps in batches[bool(plan) :]:
            inputs = {"input_ids": ids(case.tokens, images, rows, 9)}
            if images:
                inputs |= case.pictures(rows, images)
            if "gemma" in name:
                inputs |= types(inputs["input_ids"])
            elif "qwen" in name and images:
                inputs["mm_token_type_ids"] = types(inputs["input_ids"])["token_type_ids"]
            found = counted(model, steps=steps, **inputs)
            cost = estimate_cost(
                model, plan, 9, images, rows, new_tokens=steps, image_size=case.size
            )
            assert (cost.flops, cost.kv_cache_bytes) == found, (plan, images, rows, steps)
            assert cost.per_layer[0].vision_tokens == images * case.tokens


def test_several_onevision_images_are_not_cut() -> None:
    model = ONE._from_config(onevision(9), attn_implementation="eager").eval()
    inputs = {"input_ids": ids(17, 2, 1, 9)} | tiled(5, (56, 56), onevision=True)(1, 2)
    flops, kv = counted(model, **inputs)
    cost = estimate_cost(model, "", 9, num_images=2, image_size=(56, 56))
    assert (cost.flops, cost.kv_cache_bytes) == (flops, kv)


@pytest.mark.parametrize("name", ["llava-next-7b", "llava-onevision-7b"])
def test_tokens_of_any_resolution_are_those_of_transformers(name: str) -> None:
    config = geometry(name)
    tile, side = config.vision_config.image_size, config.vision_config.image_size // 14
    draw = random.Random(0)
    for _ in range(200):
        size = (draw.randint(20, 3000), draw.randint(20, 3000))
        grid = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, tile)
        features = torch.empty(1, grid[0] * side, grid[1] * side, device="meta")
        (rows, columns), tiles = anyres_grid(config, size)
        assert (1, rows, columns) == tuple(unpad_image(features, size).shape), size
        assert tiles + 1 == image_size_to_num_patches(size, config.image_grid_pinpoints, tile)


def test_every_family_has_a_case() -> None:
    covered = {case.config().model_type for case in CASES.values()} | {"llava"}
    assert covered == {family.model_type for family in FAMILIES}


def test_unknown_tower_is_refused() -> None:
    config = tf.LlavaConfig(vision_config={"model_type": "pixtral"})
    with pytest.raises(CostError, match=r"'pixtral' in 'llava'.*clip_vision_model"):
        estimate_cost(config)
