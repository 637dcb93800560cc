"""`estimate_cost` against torch's own counter on real forwards, and against the numbers published
for LLaVA-1.5-7B."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from adsc.attachment.attach import attach
from adsc.costs.cost import Cost, estimate_cost
from adsc.errors import CostError
from adsc.plan import PlanError
from adsc.solve import solve_plans
from tests.adsc.costs.counting import counted
from tests.matrix import matrix

IMAGE_TOKEN = 7


def clip(**changes):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "image_size": 28, "patch_size": 7}
    return CLIPVisionConfig(**shape | changes)


def siglip(**changes):
    shape = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    return SiglipVisionConfig(**shape | changes)


def decoder(kind=LlamaConfig, **changes):
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 99}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return kind(**shape | changes)


def llava(attention="eager", **changes):
    torch.manual_seed(0)
    parts = {"vision_config": clip(), "text_config": decoder(), "image_token_index": IMAGE_TOKEN}
    config = LlavaConfig(**parts | changes)
    return LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()


def rows(spans, *, text_tokens, batch_size=1):
    """Input ids with one run of image tokens per span, text around and between them."""
    row, left = [], text_tokens - len(spans) - 1
    assert left >= 0, "one text token around every image, at least"
    for span in spans:
        row += [11] + [IMAGE_TOKEN] * span
    row += [12] * (left + 1)
    return torch.tensor([row] * batch_size)


LLAVAS = {
    "gqa": {},
    "early vision layer": {"vision_feature_layer": 1},
    "two vision layers, class token": {
        "vision_feature_layer": [-2, -1],
        "vision_feature_select_strategy": "full",
    },
    "wide heads": {"text_config": decoder(head_dim=24, num_key_value_heads=1)},
    "qwen2 with biases": {"text_config": decoder(Qwen2Config)},
    "mistral, sliding": {"text_config": decoder(MistralConfig, sliding_window=20)},
    "siglip with its head": {
        "vision_config": siglip(),
        "vision_feature_select_strategy": "full",
    },
    "siglip": {
        "vision_config": siglip(vision_use_head=False),
        "vision_feature_select_strategy": "full",
    },
}


@matrix(name=LLAVAS.keys(), attention=["eager", "sdpa"])
def test_dense_llava_is_exact(name, attention):
    model = llava(attention, **LLAVAS[name])
    span = 17 if LLAVAS[name].get("vision_feature_select_strategy") == "full" else 16
    span -= "siglip" in name
    for images, batch_size, steps in ((1, 1, 0), (2, 3, 2), (1, 2, 1), (0, 2, 1)):
        inputs = {"input_ids": rows([span] * images, text_tokens=9, batch_size=batch_size)}
        if images:
            inputs["pixel_values"] = torch.zeros(images * batch_size, 3, 28, 28)
        flops, kv = counted(model, steps=steps, **inputs)
        cost = estimate_cost(
            model, None, 9, num_images=images, batch_size=batch_size, new_tokens=steps
        )
        assert (cost.flops, cost.kv_cache_bytes) == (flops, kv), (images, batch_size, steps)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "plan",
    [
        "1:1/2,3:1/3",
        "0:1/4;anchor=first",
        "2:1/2;positions=reindex",
        "3:1/100",
        "1:1/4;pool=tiles",
        "1:1/3,3:0;pool=tiles",
        "0:1/4,2:1/2;pool=runs",
        "2:0",
    ],
)
def test_llava_with_a_plan_is_exact(plan, attention):
    model = attach(llava(attention), plan)
    for images, batch_size, steps in ((1, 1, 0), (2, 3, 2)):
        inputs = {
            "input_ids": rows([16] * images, text_tokens=9, batch_size=batch_size),
            "pixel_values": torch.zeros(images * batch_size, 3, 28, 28),
        }
        for logits, keep in (("last", 1), ("kept", 0)):
            found = counted(model, steps=steps, logits_to_keep=keep, **inputs)
            cost = estimate_cost(
                model, plan, 9, images, batch_size, logits=logits, new_tokens=steps
            )
            assert (cost.flops, cost.kv_cache_bytes) == found, (images, batch_size, logits)


def test_logits_on_all_positions_and_dtype():
    model = llava().to(torch.bfloat16)
    inputs = {"input_ids": rows([16], text_tokens=9), "pixel_values": torch.zeros(1, 3, 28, 28)}
    flops, kv = counted(model, logits_to_keep=0, **inputs)
    for where in ("kept", "full"):
        cost = estimate_cost(model, "", 9, logits=where)
        assert (cost.flops, cost.kv_cache_bytes) == (flops, kv)
    assert estimate_cost(model.config, "", 9).kv_cache_bytes in (kv, 2 * kv)


def test_per_layer_adds_up_and_follows_the_plan():
    cost = estimate_cost("llava-1.5-7b", "8:1/2,16:1/2,24:1/2", num_images=2, batch_size=3)
    assert [layer.vision_tokens for layer in cost.per_layer[::8]] == [1152, 576, 288, 144]
    assert [layer.tokens for layer in cost.per_layer[::8]] == [1253, 677, 389, 245]
    assert (
        cost.flops == sum(x.flops for x in cost.per_layer) + cost.vision_flops + cost.logits_flops
    )
    assert cost.kv_cache_bytes == sum(layer.kv_cache_bytes for layer in cost.per_layer)
    assert cost.average_vision_tokens == 540


class HalfAfterTwo:
    """A method of another kind: all that the cost needs of it is `tokens_per_layer`."""

    def tokens_per_layer(self, num_vision_tokens: int, num_layers: int) -> list[int]:
        return [num_vision_tokens] * 2 + [num_vision_tokens // 2] * (num_layers - 2)


class ForAnotherModel:
    def tokens_per_layer(self, num_vision_tokens: int, num_layers: int) -> list[int]:
        return [num_vision_tokens]


def test_any_plan_with_tokens_per_layer():
    with pytest.raises(CostError, match="for 1 layers; the decoder has 32"):
        estimate_cost("llava-1.5-7b", ForAnotherModel())
    assert estimate_cost("llava-1.5-7b", HalfAfterTwo()) == estimate_cost("llava-1.5-7b", "2:1/2")


# Published values, true geometry of LLaVA-1.5-7B --------------------------------------------------


def tera(plan, convention, text_tokens=0) -> float:
    cost = estimate_cost("llava-1.5-7b", plan, text_tokens, convention=convention)
    return cost.flops / 1e12


@pytest.mark.parametrize(
    ("plan", "convention", "published"),
    [
        ("", "fastv", 2.99),
        ("", "pdrop", 3.817),
        ("8:1/2,16:1/2,24:1/2", "pdrop", 1.777),
        ("2:1/2", "pdrop", 2.007),
    ],
)
def test_published_teraflops(plan, convention, published):
    assert tera(plan, convention) == pytest.approx(
        published, abs=0.005 if published == 2.99 else 0.0006
    )


def test_conventions_count_the_tokens_they_name():
    assert tera("", "pdrop", text_tokens=101) == tera("", "pdrop")
    assert tera("", "fastv", text_tokens=101) > tera("", "fastv")
    assert tera("", "sparsevlm") == tera("", "pdrop")
    assert tera("", "sparsevlm", text_tokens=101) > tera("", "fastv", text_tokens=101)


def test_exact_is_twice_the_macs_of_its_parts():
    cost = estimate_cost("llava-1.5-7b", logits="full")
    n, d, m = 677, 4096, 11008
    assert cost.per_layer[0].flops == 2 * (4 * n * d * d + 2 * n * n * d + 3 * n * d * m)
    assert cost.logits_flops == 2 * n * d * 32064
    assert cost.vision_flops / 2e12 == pytest.approx(0.183 + 0.012 + 0.008, abs=0.001)
    assert cost.kv_cache_bytes == n * 524_288


def placements_near_192():
    """Many ways to an average of 192 of 576: one to four drops, mild and heavy, early and late."""
    shapes = [(1, "1/3"), (1, "1/9"), (2, "1/3"), (3, (0.5, 0.25, 0.125)), (3, "1/3"), (4, "2/3")]
    for drops, keep in shapes:
        plans = solve_plans(32, 576, 192, drops, keep, tolerance=0.002)
        yield from plans[:: max(1, len(plans) // 25)]


def test_the_papers_pair_comes_out_of_any_placement():
    """-56.7 % KV and -53.5..-54.0 % FLOPs: the whole model, text counted, full-length lm_head."""
    dense = {where: estimate_cost("llava-1.5-7b", logits=where) for where in ("full", "kept")}
    plans = list(placements_near_192())
    assert len(plans) > 60
    for plan in plans:
        costs = {w: estimate_cost("llava-1.5-7b", plan, logits=w).versus(dense[w]) for w in dense}
        assert costs["full"].kv_cache_bytes == pytest.approx(0.567, abs=0.001), plan
        assert 0.535 <= costs["full"].flops <= 0.540, plan
        # A drop before layer 0 leaves the decoder no full-length layer; its 54.93 % rounds down.
        assert 0.549 <= costs["kept"].flops <= 0.555, plan
    exactly_192 = estimate_cost("llava-1.5-7b", "8:1/9", text_tokens=101)
    assert exactly_192.average_vision_tokens == 192
    assert exactly_192.kv_cache_bytes == (192 + 101) * 524_288
    saved = exactly_192.versus(estimate_cost("llava-1.5-7b"))
    assert f"{saved.kv_cache_bytes:.1%}" == "56.7%"


def test_pyramiddrop_coincidence():
    cost = estimate_cost("llava-1.5-7b", "8:1/2,16:1/2,24:1/2", convention="pdrop")
    assert cost.average_vision_tokens == 270
    saved = cost.versus(estimate_cost("llava-1.5-7b", convention="pdrop"))
    assert saved.flops == pytest.approx(0.534, abs=0.0005)


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"convention": "macs"}, ["'macs'", "exact, fastv, pdrop, sparsevlm"]),
        ({"logits": "all"}, ["'all'", "last, kept, full"]),
        ({"text_tokens": -1}, ["text_tokens -1"]),
        ({"batch_size": 0}, ["batch_size 0"]),
        ({"new_tokens": 1.5}, ["new_tokens 1.5"]),
        ({"text_tokens": 0, "num_images": 0}, ["both 0"]),
        ({"image_size": (0, 9)}, ["height 0"]),
        ({"image_size": (9, 9, 3)}, ["(9, 9, 3)", "(height, width)"]),
    ],
)
def test_bad_arguments_are_named(changes, names):
    with pytest.raises(CostError) as error:
        estimate_cost("llava-1.5-7b", **changes)
    assert all(name in str(error.value) for name in names)


def test_unsupported_models_list_what_is_supported():
    with pytest.raises(CostError, match=r"'llama'.*supported are .*llava"):
        estimate_cost(LlamaConfig())
    with pytest.raises(CostError, match="pass a transformers config"):
        estimate_cost(42)
    with pytest.raises(CostError, match="cannot cost a Linear"):
        estimate_cost(torch.nn.Linear(2, 2))
    with pytest.raises(CostError, match=r"'gpt2'.*llama, mistral"):
        estimate_cost(LlavaConfig(text_config={"model_type": "gpt2"}))
    with pytest.raises(CostError, match=r"nearest first: llava-1.5-7b"):
        estimate_cost("llava-1.5-7")


def test_plan_beyond_the_decoder_is_refused():
    with pytest.raises(PlanError, match=r"0\.\.31"):
        estimate_cost("llava-1.5-7b", "32:1/2")


def test_versus_refuses_another_convention():
    exact: Cost = estimate_cost("llava-1.5-7b")
    with pytest.raises(CostError, match=r"'exact'.*'fastv'"):
        exact.versus(estimate_cost("llava-1.5-7b", convention="fastv"))
