"""What a peer's budget means, what can't be reached, what it costs, and how it is saved."""

from __future__ import annotations

import doctest
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf

import adsc
from adsc import peers
from adsc.costs.geometries import geometry
from adsc.method import Budget, from_dict
from adsc.peers.dart import DART
from adsc.peers.fastv import FastV
from adsc.peers.pyramiddrop import PyramidDrop
from adsc.peers.sparsevlm import SparseVLM
from adsc.tiles import Region, cut, ragged_counts
from tests.adsc.costs.cost_cases import CASES, ids, types
from tests.adsc.costs.counting import counted
from tests.adsc.peers.peer_cases import MIXED, attached, made
from tests.adsc.peers.peer_reference import LAYERS, TOKENS, batch, llava
from tests.documents import ROOT
from tests.matrix import matrix


@pytest.fixture(scope="module")
def seven_b() -> Any:
    """LLaVA-1.5-7B without weights."""
    with torch.device("meta"):
        return hf.LlavaForConditionalGeneration(geometry("llava-1.5-7b"))


@pytest.mark.parametrize("average", [192, 128, 64])
@pytest.mark.parametrize("name", peers.NAMES)
def test_the_usual_budgets_of_a_7b_model_are_met(name, average, seven_b):
    options = {"layers": "earlier"} if name == "pyramiddrop" and average < 144 else {}
    method = peers.make(name, seven_b, average, **options)
    assert method.average_tokens(576, 32) == pytest.approx(average, rel=0.01)
    each = method.tokens_per_layer(576, 32)
    assert each == sorted(each, reverse=True)
    assert each[-1] >= 1


def test_published_settings_are_what_they_truly_average():
    """FastV's "192" is 216, PyramidDrop's default 270; SparseVLM's "192" is 203 on inputs."""
    fastv = FastV(stages=((2, Fraction(192, 576)),))
    assert fastv.average_tokens(576, 32) == 216
    pyramid = PyramidDrop(stages=((8, Fraction(1, 2)), (16, Fraction(1, 4)), (24, Fraction(1, 8))))
    assert pyramid.average_tokens(576, 32) == 270
    shares = [Fraction(count, 576) for count in (300, 200, 110)]
    sparse = SparseVLM(stages=tuple(zip((3, 7, 16), shares, strict=True)))
    assert sparse.average_tokens(576, 32) == 202.75


def test_pyramiddrop_at_270_has_the_published_ratio(seven_b):
    method = peers.make("pyramiddrop", seven_b, 270)
    assert [layer for layer, _ in method.stages] == [8, 16, 24]
    assert method.counts(576) == [288, 144, 72]


def test_quarters_are_quarters_of_any_depth():
    config = geometry("llava-1.5-7b")
    config.text_config.num_hidden_layers = 30
    with torch.device("meta"):
        model = hf.LlavaForConditionalGeneration(config)
    method = peers.make("pyramiddrop", model, 270)
    assert [layer for layer, _ in method.stages] == [7, 15, 22]


def test_no_attention_no_choice(seven_b):
    with pytest.raises(adsc.PlanError, match="pyramiddrop can drop before layer 1 at the earliest"):
        peers.make("pyramiddrop", seven_b, 64, layers=(0, 8, 16))
    with pytest.raises(adsc.PlanError, match="sparsevlm can drop before layer 1 at the earliest"):
        peers.make("sparsevlm", seven_b, 64, layers=(0, 8, 16))
    for kind in (FastV, DART, PyramidDrop, SparseVLM):  # of a checkpoint's config, say
        with pytest.raises(adsc.PlanError, match=f"{kind.name} can drop before layer 1"):
            kind(stages=((0, Fraction(1, 2)),))


def test_an_average_out_of_reach_names_the_nearest(seven_b):
    with pytest.raises(
        adsc.PlanError, match=r"can't average 128 .* is 144\.75 .*; layers='earlier' reaches"
    ):
        peers.make("pyramiddrop", seven_b, 128)
    with pytest.raises(
        adsc.PlanError, match=r"fastv can't average 20 .* is 36\.9375 \(fastv 2:1/576"
    ):
        peers.make("fastv", seven_b, 20)
    assert peers.make("fastv", seven_b, 20, layer=1).average_tokens(576, 32) == pytest.approx(
        20, 0.01
    )
    with pytest.raises(adsc.PlanError, match="at most 576"):
        peers.make("pool", seven_b, 577)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fastvv", {}, r"unknown \(did you mean fastv\?\); choose one of stride, random"),
        ("fastv", {"ratio": 0.5}, "options ratio of fastv are unknown; it has layer, positions"),
        ("fastv", {"layer": 0}, "layer 0 must be a whole number from 1"),
        ("fastv", {"layer": 6}, r"layers 0\.\.5"),
        ("visionzip", {"contextual": 1}, r"contextual 1 must be in \[0, 1\)"),
        ("visionzip", {"contextual": "some"}, "contextual 'some' is not a number"),
        ("visionzip", {"contextual": (1, 2)}, r"contextual \(1, 2\) is not a number"),
        ("pool", {"positions": "renumber"}, "positions 'renumber' is unknown"),
        ("pyramiddrop", {"layers": "late"}, "'quarters', 'earlier' or layer numbers"),
        ("pyramiddrop", {"layers": 4}, r"layers 4 must be 'quarters', 'earlier' or layer numbers"),
        ("pyramiddrop", {"layers": ("4",)}, r"layers \('4',\) must be 'quarters'"),
        ("sparsevlm", {"layers": 4}, r"layers 4 must be layer numbers, such as \[1,2,4\]"),
        ("sparsevlm", {"layers": ()}, r"layers \(\) must be layer numbers"),
        ("random", {"seed": -1}, "seed -1 must be a whole number from 0"),
    ],
)
def test_what_can_not_be_meant_is_refused(name, options, message):
    with pytest.raises(adsc.PlanError, match=message):
        peers.make(name, llava(), 18, **options)


def test_families_that_a_method_can_not_serve_are_refused_by_name():
    from tests.adsc.zoo import CASES as ZOO

    for name, family, why in (
        ("fastv", "gemma3", "fastv does not serve Gemma 3: its prefix attends both ways"),
        ("sparsevlm", "paligemma", "does not serve PaliGemma"),
        ("visionzip", "internvl", "visionzip serves LLaVA-1.5, .* not InternVL"),
    ):
        with pytest.raises(adsc.UnsupportedModel, match=why):
            peers.make(name, ZOO[family].model(), 2, num_vision_tokens=4, tolerance=1)
    model = ZOO["qwen3_vl"].model()
    pool = peers.make("pool", model, 4, num_vision_tokens=8)
    with pytest.raises(adsc.PlanError, match="first layer for a drop is 2"):
        adsc.attach(model, pool)


def cells_of(lattice: tuple[int, int], m: int) -> list[list[int]]:
    """The tokens of each of the m cells that `pool` averages."""
    sheet = Region(*lattice, 0, lattice[1]).sheet()
    return [list(cell) for band in cut(sheet, ragged_counts(sheet, m)) for cell in band]


def test_pooling_cells_partition_every_lattice_evenly():
    for lattice in ((6, 6), (24, 24), (3, 11), (1, 40), (7, 2)):
        n = lattice[0] * lattice[1]
        for m in range(1, n + 1):
            cells = cells_of(lattice, m)
            assert len(cells) == m
            assert sorted(token for cell in cells for token in cell) == list(range(n))
            middles = [cell[len(cell) // 2] for cell in cells]
            assert middles == sorted(middles)


def test_pooling_by_whole_numbers_is_torchs_average_pooling():
    image = torch.randn(1, 5, 24, 24)
    wanted = torch.nn.functional.avg_pool2d(image, 2)[0].flatten(1).T
    tokens = image[0].flatten(1).T
    got = torch.stack([tokens[cell].mean(0) for cell in cells_of((24, 24), 144)])
    torch.testing.assert_close(got, wanted)


def test_sparsevlm_recycles_as_published():
    """576 to 300 kept: 277 go, the best 30 % and one more of them into a tenth and one clusters."""
    method = SparseVLM()
    assert method.split(576, 309) == (300, 83, 9)
    assert method.split(10, 10) == (10, 0, 0)
    assert SparseVLM(recycle=False).split(576, 309) == (309, 0, 0)
    for n in range(2, 60):
        for count in range(1, n):
            kept, best, clusters = method.split(n, count)
            assert kept + clusters == count
            assert clusters <= best <= n - kept


@pytest.mark.parametrize("name", peers.NAMES)
def test_a_method_travels_in_the_checkpoint(name, tmp_path):
    model = attached(name)
    wanted = adsc.plan_of(model)
    model.save_pretrained(tmp_path)
    loaded = adsc.from_pretrained(tmp_path).eval()
    assert adsc.plan_of(loaded) == wanted
    assert str(adsc.plan_of(loaded)) == str(wanted)
    inputs = batch(MIXED)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_a_method_in_a_config_that_is_not_known_is_refused():
    with pytest.raises(adsc.PlanError, match="method 'slowv' is unknown; known are dart"):
        from_dict({"method": "slowv"})
    with pytest.raises(adsc.PlanError, match=r"unknown fields \['heads'\] in method 'fastv'"):
        from_dict({"method": "fastv", "heads": 2})
    with pytest.raises(adsc.PlanError, match="grow from one drop to the next"):
        FastV(stages=((1, Fraction(1, 3)), (2, Fraction(1, 2))))


@matrix(name=peers.NAMES, tower=["clip", "siglip"], attention=["eager", "sdpa"])
def test_cost_is_exact(name, tower, attention):
    model = llava(tower, attention)
    method = made(name, model)
    adsc.attach(model, method)
    for images, rows, steps in ((1, 1, 0), (2, 3, 2)):
        row = [5, *([90] * TOKENS + [6]) * images, *[7] * (9 - 1 - images)]
        inputs = {
            "input_ids": torch.tensor([row] * rows),
            "pixel_values": torch.randn(images * rows, 3, 48, 48),
        }
        found = counted(model, steps=steps, **inputs)
        cost = adsc.estimate_cost(model, method, 9, images, rows, new_tokens=steps)
        assert (cost.flops, cost.kv_cache_bytes) == found, (images, rows, steps)
        parts = sum(layer.flops for layer in cost.per_layer)
        assert cost.flops == parts + cost.vision_flops + cost.logits_flops + cost.scoring_flops
        assert (cost.scoring_flops == 0) == (name in ("stride", "random"))


UNSERVED = {  # families by peers that refuse them by name
    "llava_next, padded": set(),
    "qwen2_5_vl": {"downsample"},
    "qwen3_vl": {"downsample", "visionzip"},
    "internvl": {"downsample", "visionzip"},
}


@pytest.mark.parametrize("family", UNSERVED)
def test_cost_is_exact_in_other_families(family):
    case = CASES[family]
    torch.manual_seed(0)
    model = case.model._from_config(case.config(), attn_implementation="sdpa").eval()
    n, unserved = case.tokens, set()
    for name in peers.NAMES:
        try:
            method = peers.make(name, model, n * 0.7, num_vision_tokens=n, tolerance=0.3)
            adsc.attach(model, method)
        except adsc.UnsupportedModel:
            unserved.add(name)
            continue
        except adsc.PlanError as error:
            assert family == "qwen3_vl" and "the first layer for a drop is" in str(error), name
            continue
        inputs = {"input_ids": ids(n, 1, 2, 9)} | case.pictures(2, 1)
        if "qwen" in family:
            inputs["mm_token_type_ids"] = types(inputs["input_ids"])["token_type_ids"]
        found = counted(model, **inputs)
        cost = adsc.estimate_cost(model, method, 9, 1, 2, image_size=case.size)
        assert (cost.flops, cost.kv_cache_bytes) == found, name
    assert unserved == UNSERVED[family]


def test_published_conventions_do_not_count_scoring(seven_b):
    fastv = peers.make("fastv", seven_b, 216)
    cost = adsc.estimate_cost("llava-1.5-7b", fastv, convention="fastv")
    assert cost.scoring_flops == 0
    exact = adsc.estimate_cost("llava-1.5-7b", fastv)
    assert 0 < exact.scoring_flops < exact.flops / 100


def test_plan_of_tells_a_method_inside_wrappers():
    model = attached("fastv")
    wrapped = SimpleNamespace(get_base_model=lambda: model)
    assert adsc.plan_of(wrapped) == made("fastv", llava())  # type: ignore[arg-type]


def test_another_image_keeps_the_same_share():
    budget = Budget(
        average=Fraction(16), tokens=TOKENS, layers=LAYERS, tolerance=Fraction(1), first=0, axes=1
    )
    assert DART.fit(budget).counts(72) == [2 * count for count in DART.fit(budget).counts(36)]


def test_the_documentation_says_what_happens():
    text = ROOT / "docs" / "peers.md"
    failed, tried = doctest.testfile(str(text), module_relative=False, verbose=False)
    assert tried > 10
    assert not failed
