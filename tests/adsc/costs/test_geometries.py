"""Named geometries: their sizes, and that their costs follow from the models' real weights."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from adsc.costs.cost import estimate_cost
from adsc.costs.geometries import GEOMETRIES, HUB_IDS, geometry
from adsc.errors import CostError

# name -> parameters of the whole model, vision tokens of an image of the usual size, KV bytes of
# one token
KNOWN = {
    "internvl3-8b": (7_944_373_760, 256, 57_344),
    "llava-1.5-13b": (13_351_494_656, 576, 819_200),
    "llava-1.5-7b": (7_063_427_072, 576, 524_288),
    "llava-next-7b": (7_063_431_168, 2928, 524_288),
    "llava-onevision-7b": (8_030_807_584, 729 + 54 * 55, 57_344),
    "qwen2.5-vl-7b": (8_292_166_656, 576, 57_344),
    "qwen3-vl-8b": (8_767_123_696, 576, 147_456),
    "smolvlm": (2_246_272_880, 81, 196_608),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_size_and_cost(name):
    parameters, tokens, kv_per_token = KNOWN[name]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(geometry(name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    cost = estimate_cost(name)
    assert cost == estimate_cost(model)
    assert cost.per_layer[0].vision_tokens == tokens
    assert cost.kv_cache_bytes == (tokens + 101) * kv_per_token
    # Every weight of a decoder layer is multiplied and added once for each token, plus attention.
    layer = cost.per_layer[0]
    weights = sum(
        p.numel()
        for name, p in model.named_parameters()
        if ".layers.0." in name and "vision" not in name and p.ndim == 2
    )
    text = model.config.get_text_config()
    heads = text.num_attention_heads * (layer.tokens**2)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    assert layer.flops == 2 * weights * layer.tokens + 4 * heads * head_dim


def test_image_size_counts_where_it_should():
    usual = estimate_cost("llava-next-7b")
    assert estimate_cost("llava-next-7b", image_size=(672, 672)) == usual
    assert estimate_cost("llava-next-7b", image_size=(336, 672)).flops < usual.flops
    assert estimate_cost("llava-1.5-7b", image_size=(99, 9)) == estimate_cost("llava-1.5-7b")
    assert estimate_cost("qwen2.5-vl-7b", image_size=(280, 560)).per_layer[0].vision_tokens == 200


def test_names_forgive_case_and_unknown_ones_list_the_nearest_first():
    assert geometry(" LLaVA_1.5-7B ").model_type == "llava"
    with pytest.raises(CostError) as error:
        geometry("qwen3-vl-7b")
    known = str(error.value).split("nearest first: ")[1].split(", ")
    assert known[0] == "qwen3-vl-8b" and set(known) == set(GEOMETRIES)


def test_hub_ids_name_geometries() -> None:
    assert set(HUB_IDS.values()) == set(GEOMETRIES)
    for hub_id, name in HUB_IDS.items():
        assert geometry(hub_id).to_dict() == geometry(name).to_dict()
