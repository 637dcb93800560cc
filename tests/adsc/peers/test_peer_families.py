"""Peers in other families: a row of a batch is the row alone, cached is uncached, and the scores
are those of the families' own eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adsc
from adsc import peers
from tests.adsc.tiny import kept_of
from tests.adsc.zoo import CASES, IMAGE, VIDEO, rows_for, units_of
from tests.matrix import matrix, pairs

CLOSE = {"rtol": 0, "atol": 1e-4}
EVERY = [
    (name, family)
    for family in ("llava_next", "qwen2_5_vl")
    for name in peers.NAMES
    if (name, family) != ("downsample", "qwen2_5_vl")  # refused by name
]
OTHERS = {
    "llava sliding": ("fastv", "sparsevlm", "dart"),
    "llava_onevision": ("pool", "fastv", "divprune", "tome"),
    "qwen2_vl": ("pyramiddrop", "random"),
    "qwen3_vl": ("fastv", "pyramiddrop", "dart", "tome"),
    "internvl": ("fastv", "pool", "sparsevlm"),
    "smolvlm": ("fastv", "dart", "divprune"),
    "idefics3": ("pyramiddrop",),
    "gemma3": ("pool", "dart", "divprune", "tome"),
    "paligemma": ("random", "dart", "divprune"),
}
PAIRS = EVERY + [(name, family) for family, names in OTHERS.items() for name in names]


def attached(name: str, family: str, implementation: str = "sdpa") -> Any:
    model = CASES[family].model(implementation)
    how: dict[str, Any] = {"num_vision_tokens": 20, "tolerance": 0.2}
    if family == "qwen3_vl" and name == "pyramiddrop":
        how["layers"] = (2, 3, 4)
    return adsc.attach(model, peers.make(name, model, 13, **how))


@pairs(("name", "family"), PAIRS)
def test_a_row_of_a_batch_is_the_row_alone(name, family):
    case = CASES[family]
    model, rows = attached(name, family), rows_for(case)
    method = adsc.plan_of(model)
    layers = len(method.tokens_per_layer(20, 5))
    for side in ("left", "right"):
        inputs = case.batch(rows, side)
        with torch.no_grad():
            output = model(**inputs)
        for index, row in enumerate(rows):
            kept = output.kept_positions[-1][index]
            numbers = inputs["attention_mask"][index].cumsum(0) - 1
            columns = numbers[kept[kept >= 0]].tolist()
            with torch.no_grad():
                single = model(**case.batch([row]))
            wanted = getattr(single, "kept_positions", None)
            if wanted:
                assert columns == wanted[-1][0].tolist()
            torch.testing.assert_close(output.logits[index][kept >= 0], single.logits[0], **CLOSE)
            for unit in units_of(row):  # every image has its share
                left = len(set(unit) & set(columns))
                assert left == method.tokens_per_layer(len(unit), layers)[-1]


@pairs(("name", "family"), PAIRS)
def test_cached_generation_equals_one_forward_with_labels(name, family):
    case = CASES[family]
    model, rows = attached(name, family), rows_for(case)[:2]
    inputs = case.batch(rows)
    got = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    answers = got[:, inputs["input_ids"].shape[1] :]
    for index, row in enumerate(rows):
        single = case.batch([row])
        ids = torch.cat([single["input_ids"], answers[index : index + 1]], dim=1)
        labels = torch.full_like(ids, -100)
        labels[:, -4:] = answers[index]
        grown = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        if case.types is not None:
            types = single[case.types[0]]
            fill = 1 if family == "paligemma" else 0
            grown[case.types[0]] = torch.nn.functional.pad(types, (0, 4), value=fill)
        with torch.no_grad():
            logits = model(**single | grown).logits
        assert logits[0, -5:-1].argmax(-1).tolist() == answers[index].tolist()


@matrix(name=["pool", "visionzip", "fastv"], family=["llava_next", "qwen2_5_vl"])
def test_beams_share_their_pictures(name, family):
    """One a row: before 5.2x transformers itself repeats the pictures of other rows wrongly."""
    case = CASES[family]
    first, second, _ = case.pictures(case.model())
    model, rows = attached(name, family), [[3, first, 4], [2, second, 6]]
    how = {"num_beams": 2, "num_return_sequences": 1, "max_new_tokens": 3, "eos_token_id": None}
    together = model.generate(**case.batch(rows), **how)[:, -3:].tolist()
    alone = [model.generate(**case.batch([row]), **how)[0, -3:].tolist() for row in rows]
    assert together == alone


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen3_vl", "llava sliding"])
def test_fastv_keeps_what_the_eager_map_says(family):
    case = CASES[family]
    model, plain = attached("fastv", family), case.model("eager")
    (layer, _), method = adsc.plan_of(model).stages[0], adsc.plan_of(model)
    for row in rows_for(case):
        if not units_of(row):
            continue
        inputs = case.batch([row])
        paid = plain(**inputs, output_attentions=True, use_cache=False).attentions[layer - 1]
        paid = paid[0, :, -1].mean(0)
        vision = torch.isin(inputs["input_ids"][0], torch.tensor([IMAGE, VIDEO]))
        wanted = set((~vision).nonzero().flatten().tolist())
        for unit in units_of(row):
            m = method.counts(len(unit))[0]
            wanted |= set(sorted(unit, key=lambda c: (-float(paid[c]), c))[:m])
        kept = model(**inputs, use_cache=False).kept_positions[-1][0].tolist()
        assert kept == sorted(wanted)


@torch.no_grad()
def test_visionzip_keeps_what_the_towers_map_says_in_llava_next():
    """Dominant tokens of a picture with all its crops; the newlines are no patches."""
    case = CASES["llava_next"]
    model = case.model()
    how = {"num_vision_tokens": 20, "tolerance": 0.2, "contextual": 0}
    adsc.attach(model, peers.make("visionzip", model, 13, **how))
    picture = case.pictures(model)[0]
    inputs = case.batch([[3, picture, 4]])
    tower = case.model("eager").model.vision_tower
    tiles = inputs["pixel_values"][0][:3]
    paid = tower(tiles, output_attentions=True).attentions[-1][:, :, 0, 1:].sum(1)
    packed, _ = model.model.pack_image_features(
        [paid.unsqueeze(-1)], inputs["image_sizes"], "default", torch.tensor([-1.0])
    )
    n = picture.units[0]
    assert packed[0].shape[0] == n
    scores = packed[0].flatten().tolist()
    m = adsc.plan_of(model).counts(n)[0]
    best = sorted(sorted(range(n), key=lambda t: (-scores[t], t))[:m])
    columns = units_of([3, picture, 4])[0]
    kept = model(**inputs).kept_positions[-1][0].tolist()
    assert [c for c in kept if c in columns] == [columns[t] for t in best]


@torch.no_grad()
def test_visionzip_keeps_what_the_last_full_block_says_in_qwen():
    """One picture that is one window, so that no order has to be undone."""
    case = CASES["qwen2_5_vl"]
    model = case.model()
    how = {"num_vision_tokens": 20, "tolerance": 0.2, "contextual": 0}
    adsc.attach(model, peers.make("visionzip", model, 13, **how))
    patches = torch.randn(16, 96, generator=torch.Generator().manual_seed(2))
    grid = torch.tensor([[1, 4, 4]])
    tower = case.model("eager").model.visual
    block = tower.blocks[tower.fullatt_block_indexes[-1]]
    seen: dict[str, Any] = {}
    block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(hidden=args[0], **kwargs), with_kwargs=True
    )
    tower(patches, grid)
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    q, k, _ = block.attn.qkv(block.norm1(seen["hidden"])).reshape(16, 3, 2, 8).unbind(1)
    q, k = apply_rotary_pos_emb_vision(q, k, *seen["position_embeddings"])
    paid = torch.einsum("qhd,khd->hqk", q, k).div(8**0.5).softmax(-1).mean(1).sum(0)
    scores = paid.reshape(4, 4).mean(1).tolist()
    m = adsc.plan_of(model).counts(4)[0]
    best = sorted(sorted(range(4), key=lambda t: (-scores[t], t))[:m])
    inputs = {
        "input_ids": torch.tensor([[5, 92, *[IMAGE] * 4, 93, 7]]),
        "pixel_values": patches,
        "image_grid_thw": grid,
        "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]]),
    }
    kept = model(**inputs).kept_positions[-1][0].tolist()
    assert 0 < m < 4
    assert [c - 2 for c in kept if 2 <= c < 6] == best


def test_a_packed_sample_is_as_if_alone():
    """Its query is its own last token, and it sees no other sample."""
    case = CASES["llava"]
    samples = [[3, case.pictures(None)[0], 5], [2, case.pictures(None)[1], 4], [6]]
    alone = [case.batch([sample]) for sample in samples]
    ids = torch.cat([one["input_ids"] for one in alone], dim=1)
    restart = torch.cat([torch.arange(one["input_ids"].shape[1]) for one in alone])[None]
    pixels = torch.cat([one["pixel_values"] for one in alone[:2]])
    for name in peers.NAMES:
        if name == "random":  # its draws come from the ids of the whole row
            continue
        model = case.model("sdpa")
        how = {"num_vision_tokens": 16, "tolerance": 0.2, "positions": "keep"}
        adsc.attach(model, peers.make(name, model, 10, **how))
        with torch.no_grad():
            output = model(
                input_ids=ids, position_ids=restart, pixel_values=pixels, use_cache=False
            )
            kept, start = output.kept_positions[-1][0], 0
            for one in alone:
                width = one["input_ids"].shape[1]
                mine = (kept >= start) & (kept < start + width)
                single = model(**one, use_cache=False)
                torch.testing.assert_close(output.logits[0, mine], single.logits[0], **CLOSE)
                start += width


def test_downsample_names_the_families_that_it_serves():
    model = CASES["qwen2_5_vl"].model()
    with pytest.raises(adsc.UnsupportedModel, match=r"serves LLaVA-1\.5 and LLaVA-NeXT"):
        peers.make("downsample", model, 13, num_vision_tokens=20, tolerance=0.2)


def test_stride_is_a_plan():
    model = CASES["llava"].model()
    plan = peers.make("stride", model, 10, num_vision_tokens=16, tolerance=0.2)
    assert isinstance(plan, adsc.PruningPlan)
    keep = float(plan.stages[0][1])
    assert list(plan.kept_indices(16)[0]) == kept_of(16, keep, "last")


@torch.no_grad()
def test_capturing_a_graph_is_refused():
    torch._dynamo.reset()
    case = CASES["llava"]
    model = case.model("sdpa")
    adsc.attach(model, peers.make("fastv", model, 12, num_vision_tokens=16, tolerance=0.2))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    inputs = case.batch([[3, case.pictures(None)[0], 5]])
    del inputs["attention_mask"]
    with pytest.raises(Exception, match=r"outside of torch\.compile"):
        compiled(**inputs, use_cache=False)


def test_a_custom_square_mask_is_refused_by_scores_only():
    case = CASES["llava"]
    inputs = case.batch([[3, case.pictures(None)[0], 5]])
    width = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(width, width).tril().bool()[None, None]
    how = {"num_vision_tokens": 16, "tolerance": 0.2}
    model = case.model("sdpa")
    adsc.attach(model, peers.make("fastv", model, 12, **how))
    with pytest.raises(adsc.CacheError, match="fastv scores tokens by causal attention"):
        model(**inputs)
    adsc.attach(model, peers.make("divprune", model, 12, **how))
    assert model(**inputs).logits.shape[1] == 12 + 8


@torch.no_grad()
@pytest.mark.parametrize("name", peers.NAMES)
def test_static_caches_of_later_drops_hold_the_same(name):
    case = CASES["llava"]
    model = case.model("sdpa")
    how = {"num_vision_tokens": 16, "tolerance": 0.3}
    method = peers.make(name, model, 11, **how)
    adsc.attach(model, method)
    inputs = case.batch([[3, case.pictures(None)[0], 5], [4, case.pictures(None)[1], 2]])
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    if method.stages[0][0] == 0:
        with pytest.raises(adsc.CacheError, match="drop after that layer"):
            model.generate(**inputs, cache_implementation="static", **how)
        return
    wanted = model.generate(**inputs, **how).tolist()
    assert model.generate(**inputs, cache_implementation="static", **how).tolist() == wanted
