"""Pooled drops and exits: what a plan says, and every family against the slow reference.

The reference (`zoo.reference`) runs a row alone in float64, layer by layer, without cache, padding
or hooks, and takes the mean of a group by adding up its members one by one.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

import adsc
from adsc.attachment.supervised import hidden_states
from adsc.curriculum import curriculum, scale_plan
from adsc.dropping.segments import survivors
from adsc.families.family import Image
from adsc.plan import PruningPlan
from adsc.tiles import Region, cut, even_tiles, ragged_counts, share
from tests.adsc.tiny import LAYERS, TOKENS, alone, batch, llava, row
from tests.adsc.zoo import CASES, Case, Picture, reference
from tests.matrix import matrix, pairs

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# Weights and states are float64 on both sides, but transformers' softmax and norms are float32: the
# worst measured difference is 7.7e-6, for logits of size 5. A wrong member or place is above 1e-2.
EXACT = {"rtol": 0, "atol": 5e-5}
# Plans from before there were pools and exits: text, text form, kept tokens of 4 x 4 and of
# 3 x 5 after each drop, drops parted by /.
FROZEN = [
    ("", "", "", ""),
    ("0:1/2", "0:1/2", "1 3 5 7 9 11 13 15", "0 2 4 6 8 10 12 14"),
    ("0:1/4", "0:1/4", "3 7 11 15", "2 6 10 14"),
    ("2:1/3;anchor=first", "2:1/3;anchor=first", "0 3 6 9 12", "0 3 6 9 12"),
    ("2:1/3;anchor=center", "2:1/3;anchor=center", "1 4 8 11 14", "1 4 7 10 13"),
    ("1:0.25;positions=reindex", "1:1/4;positions=reindex", "3 7 11 15", "2 6 10 14"),
    (
        "8:1/2,16:1/2,24:1/2",
        "8:1/2,16:1/2,24:1/2",
        "1 3 5 7 9 11 13 15/3 7 11 15/7 15",
        "0 2 4 6 8 10 12 14/2 6 10 14/6 14",
    ),
    ("2:5/32,4:1/2", "2:5/32,4:1/2", "4 9 15/4 15", "6 14/14"),
    ("8:1/9;anchor=grid", "8:1/9;anchor=grid", "5 15", "10 14"),
    (
        "3:0.3,5:0.1;anchor=first;positions=reindex",
        "3:3/10,5:1/10;anchor=first;positions=reindex",
        "0 3 6 9 12/0",
        "0 3 6 9 12/0",
    ),
    (
        "1:1/2,2:1/2;anchor=grid",
        "1:1/2,2:1/2;anchor=grid",
        "0 2 5 7 8 10 13 15/5 7 13 15",
        "0 2 4 6 8 10 12 14/2 10 12 14",
    ),
    ("1:1e-9", "1:1/1000000", "15", "14"),
    ("0:1", "0:1", "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15", "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14"),
    (
        "4:0.37,9:0.6,11:0.99;anchor=center",
        "4:37/100,9:3/5,11:99/100;anchor=center",
        "1 4 6 9 12 14/1 6 9 14/1 6 9 14",
        "1 3 6 8 11 13/1 6 8 13/1 6 8 13",
    ),
    ("2:1/3;positions=keep;anchor=last", "2:1/3", "2 5 8 11 15", "2 5 8 11 14"),
]


@pytest.mark.parametrize(("text", "form", "square", "oblong"), FROZEN)
def test_plans_of_old_mean_what_they_meant(text, form, square, oblong):
    plan = adsc.PruningPlan.parse(text)
    assert str(plan) == form
    for n, lattice, wanted in ((16, (4, 4), square), (15, (3, 5), oblong)):
        kept = plan.kept_indices(n, lattice)
        assert "/".join(" ".join(map(str, one)) for one in kept) == wanted
    assert set(plan.to_dict()) == {"stages", "anchor", "positions"}
    assert adsc.PruningPlan.from_dict(plan.to_dict()) == plan


def test_every_text_and_dict_round_trips():
    stages = ["", "0:0", "24:0", "1:1/4", "1:1/4,6:0", "0:5/32,2:1/3,7:0", "3:1"]
    words = product(stages, ("last", "first", "center", "grid"), ("keep", "reindex"))
    seen = set()
    for (text, anchor, positions), pool in product(words, (None, "tiles", "runs")):
        if anchor == "grid" and pool is not None:
            continue
        plan = adsc.PruningPlan.parse(text, anchor=anchor, positions=positions, pool=pool)
        assert (
            adsc.PruningPlan.parse(str(plan)) == plan == adsc.PruningPlan.from_dict(plan.to_dict())
        )
        assert ("pool" in plan.to_dict()) == (pool is not None)
        seen.add(str(plan))
    assert len(seen) == 7 * 2 * (4 + 3 + 3)
    assert str(adsc.PruningPlan.parse("1:1/4,6:0;pool=tiles")) == "1:1/4,6:0;pool=tiles"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1:0,2:1/2", "layer 2 after an exit: keep 0 at layer 1"),
        ("1:0,2:0", "layer 2 after an exit"),
        ("1:-1/2", r"must be in \(0, 1\]"),
        ("1:1/4;pool=mean", "pool 'mean' is unknown; choose one of tiles, runs"),
        ("1:1/4;pool=", "pool '' is unknown"),
        ("1:1/4;pool=tiles;anchor=grid", "anchor 'grid' with pool=tiles"),
        ("1:1/4;pol=tiles", "use anchor=..., positions=... or pool=..."),
    ],
)
def test_bad_plans_are_refused(text, message):
    with pytest.raises(adsc.PlanError, match=message):
        adsc.PruningPlan.parse(text)


def test_an_exit_is_counted():
    plan = adsc.PruningPlan.parse("4:1/9,24:0;pool=tiles")
    assert plan.exit == 24
    assert plan.tokens_per_layer(576, 32) == [576] * 4 + [64] * 20 + [0] * 8
    assert plan.average_tokens(576, 32) == (4 * 576 + 20 * 64) / 32
    assert adsc.PruningPlan.parse("24:0").kept_indices(5) == [()]
    assert adsc.PruningPlan.parse("4:1/9;pool=tiles").average_tokens(576, 32) == 128


def test_curricula_leave_an_exit_and_the_pool_alone():
    plan = adsc.PruningPlan.parse("1:1/4,6:0;pool=tiles;anchor=first")
    assert str(scale_plan(plan, 2)) == "1:1/16,6:0;anchor=first;pool=tiles"
    assert [str(one) for one in curriculum(plan, "reverse", 2, 2)][1] == str(plan)


def rows_of(height: int, width: int) -> list[range]:
    return Region(height, width, 0, width).sheet()


def literal_tiles(height: int, width: int, down: int, across: int) -> list[tuple[int, ...]]:
    """Token by token: which tile it is in."""
    tiles: dict[tuple[int, int], list[int]] = {}
    for y, x in product(range(height), range(width)):
        i = next(i for i in range(down) if y < (i + 1) * height // down)
        j = next(j for j in range(across) if x < (j + 1) * width // across)
        tiles.setdefault((i, j), []).append(y * width + x)
    return [tuple(tiles[key]) for key in sorted(tiles)]


@pytest.mark.parametrize(
    ("lattice", "m", "tiles"),
    [
        ((24, 24), 144, (12, 12)),
        ((24, 24), 64, (8, 8)),
        ((24, 24), 36, (6, 6)),
        ((8, 8), 8, (4, 2)),
        ((6, 4), 6, (3, 2)),
        ((5, 5), 6, (3, 2)),
        ((3, 2), 3, (3, 1)),
    ],
)
def test_even_tiles_are_literal_ones(lattice, m, tiles):
    assert even_tiles(*lattice, m) == tiles
    plan = adsc.PruningPlan(stages=((0, Fraction(m, lattice[0] * lattice[1])),), pool="tiles")
    (groups,) = plan.groups(lattice[0] * lattice[1], lattice)
    wanted = literal_tiles(*lattice, *tiles)
    assert [group.members for group in groups] == wanted
    assert [group.anchor for group in groups] == [tile[-1] for tile in wanted]


def test_runs_are_cut_by_floors():
    plan = adsc.PruningPlan.parse("0:3/7,1:2/3;pool=runs;anchor=first")
    first, second = plan.groups(7)
    assert [group.members for group in first] == [(0, 1), (2, 3), (4, 5, 6)]
    assert [tuple(group) for group in second] == [(0, (0,)), (2, (2, 4))]
    for n, m in product(range(1, 40), range(1, 40)):
        if m <= n:
            (groups,) = adsc.PruningPlan(((0, Fraction(m, n)),), pool="runs").groups(n)
            wanted = [tuple(range(j * n // m, (j + 1) * n // m)) for j in range(m)]
            assert [group.members for group in groups] == wanted


@pytest.mark.parametrize("anchor", ["last", "first", "center"])
def test_any_number_of_tiles_parts_any_lattice_and_nests(anchor):
    for height, width in product(range(1, 8), range(1, 8)):
        n = height * width
        for m in range(1, n + 1):
            for k in {1, max(1, m // 3), max(1, m - 1), m}:
                plan = adsc.PruningPlan(
                    ((0, Fraction(m, n)), (1, Fraction(k, m))), anchor=anchor, pool="tiles"
                )
                first, second = plan.groups(n, (height, width))
                assert len(first) == m and len(second) == k
                assert sorted(t for g in first for t in g.members) == list(range(n))
                kept = [group.anchor for group in first]
                assert kept == sorted(kept)
                assert sorted(t for g in second for t in g.members) == kept
                assert all(g.anchor in g.members for g in (*first, *second))


def test_ragged_tiles_are_whole_rows_and_columns():
    # 3 bands of 1, 1 and 2 rows; m = 7 has no even tiles on 4 x 4.
    assert even_tiles(4, 4, 7) is None
    assert ragged_counts(rows_of(4, 4), 7) == [2, 2, 3]
    (groups,) = adsc.PruningPlan(((0, Fraction(7, 16)),), pool="tiles").groups(16, (4, 4))
    assert [g.members for g in groups] == [
        (0, 1), (2, 3), (4, 5), (6, 7), (8, 12), (9, 13), (10, 11, 14, 15),
    ]  # fmt: skip
    # The next drop cuts the bands of cells: (2, 2, 3) to one cell of the first, two of the rest.
    assert cut([[1, 3], [5, 7], [12, 13, 15]], [1, 2]) == [[(1, 3)], [(5, 12), (7, 13, 15)]]
    assert share([16, 32, 4], 13) == [4, 8, 1]
    assert share([9, 1, 1], 3) == [1, 1, 1]


def test_tiles_without_a_lattice_and_too_few_tokens_are_refused_with_what_to_do():
    plan = adsc.PruningPlan.parse("1:1/26;pool=tiles")
    with pytest.raises(adsc.PlanError, match="17 tokens came with lattice None; use pool=runs"):
        plan.groups(17)
    regions = (Region(4, 4, 0, 4), Region(4, 8, 16, 9), Region(4, 1, 24, 9))
    with pytest.raises(adsc.PlanError, match=r"keeps 2 of 52 tokens at layer 1, .*3 parts"):
        plan.groups(52, None, regions)


@pytest.mark.parametrize(
    ("average", "how", "wanted"),
    [
        (128, {"drops": 1, "keep": "any", "tolerance": 0}, ["4:1/9;pool=tiles"]),
        (128, {"drops": 1, "keep": "1/9", "tolerance": 0}, ["4:1/9;pool=tiles"]),
        (24, {"drops": 1, "keep": "any", "tolerance": 0, "exit_layer": 4}, None),
    ],
)
def test_the_solver_knows_pools_and_exits(average, how, wanted):
    found = adsc.solve_plans(32, 576, average, pool="tiles", lattice=(24, 24), **how)
    assert all(plan.average_tokens(576, 32) == average and plan.pool == "tiles" for plan in found)
    if wanted is not None:
        assert [str(plan) for plan in found] == wanted
    else:
        assert all(plan.exit == how["exit_layer"] for plan in found)


def test_the_solver_lists_whole_tiles_first_and_the_closest_within_them():
    found = adsc.solve_plans(32, 576, 250, 1, "any", 0.05, pool="tiles", lattice=(24, 24))
    sides = [even_tiles(24, 24, plan.tokens_after_drops(576)[0]) for plan in found]
    whole = [side is not None and all(24 % tiles == 0 for tiles in side) for side in sides]
    assert whole == sorted(whole, reverse=True) and any(whole) and not all(whole)
    far = [abs(plan.average_tokens(576, 32) - 250) for plan in found]
    assert far[: sum(whole)] == sorted(far[: sum(whole)])
    with pytest.raises(adsc.PlanError, match="with an exit before layer 2 averages 300"):
        adsc.solve_plans(32, 576, 300, 1, "1/2", exit_layer=2)
    with pytest.raises(adsc.PlanError, match="keep 0 is an exit"):
        adsc.solve_plans(32, 576, 100, 2, ["1/2", "0"])
    with pytest.raises(adsc.PlanError, match=r"exit_layer 32, but the decoder has layers 0\.\.31"):
        adsc.solve_plans(32, 576, 100, 1, exit_layer=32)


# The families.


def pictures_of(case: Case, model: Any) -> list[Picture]:
    return case.pictures(model)


def regions_of(model: Any, picture: Picture) -> list[tuple[Region, ...]]:
    """For each unit of a picture its lattices, derived from what the model makes of it."""
    shapes = {16: (4, 4), 4: (2, 2), 1: (1, 1), 8: (4, 2), 12: (2, 6)}
    if "image_sizes" not in picture.inputs:
        return [(Region(*shapes[n], 0, shapes[n][1]),) for n in picture.units]
    with torch.no_grad():
        (features,) = model.model.get_image_features(**picture.inputs).pooler_output
    ends = (features == model.model.image_newline).all(-1).nonzero().flatten().tolist()
    assert ends[-1] == len(features) - 1
    width = ends[1] - ends[0] - 1
    assert ends == list(range(16 + width, len(features), width + 1))
    lattice = Region(len(ends), width, 16, width + 1)
    return [(Region(4, 4, 0, 4), lattice, Region(len(ends), 1, 16 + width, width + 1))]


def groups_of(model: Any, plan: adsc.PruningPlan, line: list[Any]) -> list[list[Any]] | None:
    """For each unit of a row and each drop, its groups."""
    if plan.pool is None:
        return None
    return [
        plan.groups(n, None, regions)
        for part in line
        if isinstance(part, Picture)
        for n, regions in zip(part.units, regions_of(model, part), strict=True)
    ]


def plans_for(case: Case) -> list[str]:
    first, second = (layer for layer, _ in case.drops)
    plans = [
        f"{first}:1/4,{second}:1/2;pool=tiles",
        f"{first}:0.4,{second}:0;anchor=first;pool=tiles",
        f"{first}:2/3,{second}:2/5;anchor=center;pool=runs",
        f"{second}:0",
    ]
    return plans if first > 1 else [*plans, "0:1/3;pool=tiles"]


PLANS = [(name, text) for name, case in CASES.items() for text in plans_for(case)]


def lines_for(case: Case, model: Any) -> list[list[Any]]:
    first, second, third = case.pictures(model)
    return [[3, first, 4], [2, second, 1, third, 6], [5], [1, second, first, 2]]


def cast(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def double(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return cast(inputs, torch.float64)


@pairs(("name", "text"), PLANS)
def test_rows_of_a_batch_equal_the_reference(name, text):
    case, plan = CASES[name], adsc.PruningPlan.parse(text)
    plain = case.model()
    lines = lines_for(case, plain)
    known = [groups_of(plain, plan, line) for line in lines]
    # Eager attention of a padded batch in float64 is no number at padding.
    dtype = torch.float32 if name == "paligemma2" else torch.float64
    plain = plain.to(dtype)
    model = adsc.attach(case.model("eager" if name == "paligemma2" else "sdpa").to(dtype), plan)
    stages = [(layer, float(keep)) for layer, keep in plan.stages]
    for side in ("left", "right"):
        inputs = case.batch(lines, side)
        with torch.no_grad():
            output = model(**cast(inputs, dtype))
        for index, line in enumerate(lines):
            kept = output.kept_positions[-1][index]
            numbers = inputs["attention_mask"][index].cumsum(0) - 1
            wanted, columns = reference(case, plain, line, stages, plan.anchor, None, known[index])
            assert numbers[kept[kept >= 0]].tolist() == columns
            torch.testing.assert_close(output.logits[index][kept >= 0], wanted, **EXACT)


@pairs(("name", "text"), PLANS)
def test_each_cache_layer_holds_what_its_layer_saw(name, text):
    case, plan = CASES[name], adsc.PruningPlan.parse(text)
    plain = case.model()
    line = lines_for(case, plain)[0]
    groups = groups_of(plain, plan, line)
    plain, model = plain.double(), adsc.attach(case.model().double(), plan)
    config = model.config.get_text_config()
    cache = DynamicCache()
    with torch.no_grad():
        model(**double(case.batch([line])), past_key_values=cache, use_cache=True)
    saw: list[Any] = []
    stages = [(layer, float(keep)) for layer, keep in plan.stages]
    reference(case, plain, line, stages, plan.anchor, None, groups, saw=saw)
    decoder = getattr(plain.model, "text_model", None) or plain.model.language_model
    first = stages[0][0]
    for number, (states, _) in enumerate(saw, start=first):
        layer = decoder.layers[number]
        with torch.no_grad():
            values = layer.self_attn.v_proj(layer.input_layernorm(states))
        values = values.unflatten(-1, (config.num_key_value_heads, -1)).transpose(0, 1)
        torch.testing.assert_close(cache.layers[number].values[0], values, **EXACT)
        assert cache.layers[number].keys.shape == cache.layers[number].values.shape
    tokens = sum(line[1].units)
    text_tokens = case.batch([line])["input_ids"].shape[1] - tokens
    if plan.exit is not None:
        assert cache.layers[-1].keys.shape[-2] == text_tokens
    assert cache.layers[0].keys.shape[-2] == text_tokens + sum(
        plan.tokens_per_layer(n, len(cache.layers))[0] for n in line[1].units
    )


@pairs(("name", "text"), PLANS)
def test_generation_with_a_cache_equals_generation_without(name, text):
    case = CASES[name]
    lines = lines_for(case, case.model())
    model = adsc.attach(case.model("eager" if name == "paligemma2" else "sdpa"), text)
    inputs = case.batch(lines)
    cached = model.generate(**inputs, max_new_tokens=3, **GREEDY)
    plain = model.generate(**inputs, max_new_tokens=3, use_cache=False, **GREEDY)
    assert cached.tolist() == plain.tolist()
    # And both are those of the reference, whose groups come from pixels, not from `generate`'s.
    wanted, plan, line = case.model().double(), adsc.PruningPlan.parse(text), lines[1]
    groups = groups_of(case.model(), plan, line)
    stages = [(layer, float(keep)) for layer, keep in plan.stages]
    logits, _ = reference(case, wanted, line, stages, plan.anchor, None, groups)
    assert cached[1, inputs["input_ids"].shape[1]] == logits[-1].argmax()


@matrix(name=["llava", "llava_next", "qwen2_5_vl", "gemma3"], number=[0, 1, 2])
def test_gradients_equal_the_reference_and_reach_every_member(name, number):
    case = CASES[name]
    plan = adsc.PruningPlan.parse(plans_for(case)[number])
    plain = case.model()
    line = lines_for(case, plain)[1]
    groups = groups_of(plain, plan, line)
    plain = plain.double()
    model = adsc.attach(case.model().double().train(), plan)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = double(case.batch([line]))
    weights = None
    stages = [(layer, float(keep)) for layer, keep in plan.stages]
    wanted, _ = reference(case, plain, line, stages, plan.anchor, None, groups, grad=True)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0)).double()
    (wanted * weights).sum().backward()
    (model(**inputs, use_cache=False).logits[0] * weights).sum().backward()
    mine = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    theirs = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert mine.keys() == theirs.keys() and len(mine) > 20
    for key, gradient in mine.items():
        scale = max(1.0, float(theirs[key].abs().max()))
        torch.testing.assert_close(gradient / scale, theirs[key] / scale, **EXACT)


def test_gradients_reach_every_member_of_a_group():
    model = adsc.attach(llava(), "2:1/4,4:0;pool=tiles")
    seen: list[torch.Tensor] = []

    def watch(_: Any, args: Any, kwargs: Any) -> None:
        args[0].retain_grad()
        seen.append(args[0])

    layer = model.model.language_model.layers[1]
    layer.register_forward_pre_hook(watch, with_kwargs=True)
    model(**batch([row(3, 0, 5)])).logits.sum().backward()
    assert seen[0].shape[1] == 24
    assert (seen[0].grad[0].abs().sum(-1) > 0).all()


# One family in every situation that drops know.

POOLED = ["1:1/4;pool=tiles", "2:1/3,4:0;pool=tiles", "0:0.4,3:1/2;pool=runs;anchor=first", "4:0"]
MIXED = [row(3, 0, 5), row(2, 0, 3, 0, 4), row(6)]


@matrix(
    text=POOLED,
    how={"beams": {"num_beams": 3, "num_return_sequences": 2}, "greedy": {}},
    positions=["keep", "reindex"],
)
def test_beams_and_positions(text, how, positions):
    inputs = batch(MIXED)
    model = adsc.attach(llava(), adsc.PruningPlan.parse(text, positions=positions))
    cached = model.generate(**inputs, max_new_tokens=5, **GREEDY, **how)
    plain = model.generate(**inputs, max_new_tokens=5, use_cache=False, **GREEDY, **how)
    assert cached.tolist() == plain.tolist()


@pytest.mark.parametrize("text", POOLED[:2])
def test_static_caches(text):
    inputs = batch([row(3, 0, 5), row(2, 0, 4)])
    model = adsc.attach(llava(), text)
    wanted = model.generate(**inputs, max_new_tokens=4, **GREEDY)
    got = model.generate(**inputs, cache_implementation="static", max_new_tokens=4, **GREEDY)
    assert got.tolist() == wanted.tolist()
    cache = adsc.static_cache(model, inputs["input_ids"].shape[1] + 4, [TOKENS])
    got = model.generate(**inputs, past_key_values=cache, max_new_tokens=4, **GREEDY)
    assert got.tolist() == wanted.tolist()
    vision = adsc.plan_of(model).tokens_per_layer(TOKENS, LAYERS)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [n + 8 + 4 for n in vision]


@pytest.mark.parametrize(
    "text", [pytest.param(t, marks=() if t == POOLED[1] else pytest.mark.slow) for t in POOLED]
)
@torch.no_grad()
def test_prefill_compiles_into_one_graph(text):
    torch._dynamo.reset()
    model, graphs = adsc.attach(llava(), text), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled, first = torch.compile(model, backend=backend, fullgraph=True), 0
    for seed in range(3):
        inputs = batch([row(3, 0, 5, seed=seed), row(1, 0, 7, seed=seed)], seed=seed)
        del inputs["attention_mask"]
        wanted = model(**inputs, use_cache=False)
        got = compiled(**inputs, use_cache=False)
        assert torch.equal(got.logits, wanted.logits)
        first = first or len(graphs)
    assert len(graphs) == first


@pytest.mark.parametrize("text", POOLED)
def test_gradient_checkpointing_and_labels(text):
    inputs = batch(MIXED, "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    gradients, losses = [], []
    for reentrant in (None, False, True):
        model = adsc.attach(llava().train(), text)
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        output = model(**inputs, labels=labels)
        output.loss.backward()
        losses.append(output.loss.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for one, loss in zip(gradients[1:], losses[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=0, atol=1e-6)
        assert one.keys() == gradients[0].keys()
        for name, gradient in one.items():
            torch.testing.assert_close(gradient, gradients[0][name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", ["0:0", "1:1/4,3:0;pool=tiles"])
def test_a_label_that_nothing_predicts_counts_for_nothing(text):
    """The first word behind an exit of a row that begins with an image, in a batch padded on the
    left as alone."""
    rows = [row(0, 2), row(0, 0, 5), row(6)]
    model = adsc.attach(llava(), text)
    inputs = batch(rows)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    output = model(**inputs, labels=labels)
    sums = torch.zeros(2)
    for index in range(len(rows)):
        single = alone(inputs, index)
        loss = model(**single, labels=single["input_ids"], num_items_in_batch=1).loss
        words = int((single["input_ids"] != 90).sum()) - 1
        sums += torch.tensor([loss.item(), words])
    torch.testing.assert_close(output.loss.item(), (sums[0] / sums[1]).item(), rtol=0, atol=1e-5)
    made = hidden_states(model, inputs | {"labels": labels}).before(labels.shape[1])
    assert ((labels != -100) & (labels != 90) & (made >= 0)).sum(1).tolist() == [1, 4, 5]


@pytest.mark.parametrize("text", POOLED)
def test_packed_samples_are_as_if_alone(text):
    samples = [row(3, 0, 5), row(2, 0, 0, 4), row(4)]
    ids = torch.tensor([[word for sample in samples for word in sample]])
    restart = torch.tensor([[i for sample in samples for i in range(len(sample))]])
    model = adsc.attach(llava(), text)
    pictures = batch([samples[0], samples[1]])["pixel_values"]
    with torch.no_grad():
        output = model(input_ids=ids, position_ids=restart, pixel_values=pictures, use_cache=False)
    kept, start, image = output.kept_positions[-1][0], 0, 0
    for sample in samples:
        single = {"input_ids": torch.tensor([sample])}
        if count := sample.count(90) // TOKENS:
            single["pixel_values"] = pictures[image : image + count]
            image += count
        with torch.no_grad():
            wanted = model(**single, use_cache=False)
        mine = (kept >= start) & (kept < start + len(sample))
        torch.testing.assert_close(output.logits[0, mine], wanted.logits[0], rtol=0, atol=5e-5)
        start += len(sample)


@pytest.mark.parametrize("text", POOLED)
def test_a_conversation_goes_on_on_the_same_cache(text):
    model = adsc.attach(llava(), text)
    cache = DynamicCache(config=model.config.get_text_config())
    inputs = batch([row(3, 0, 5)])
    generated = model.generate(**inputs, past_key_values=cache, max_new_tokens=3, **GREEDY)
    follow = batch([row(2, 0, 3, seed=5)], seed=8)
    whole = torch.cat([generated, follow["input_ids"]], dim=1)
    given = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    pictures = torch.cat([inputs["pixel_values"], follow["pixel_values"]])
    got = model.generate(
        **given,
        pixel_values=follow["pixel_values"],
        past_key_values=cache,
        max_new_tokens=3,
        **GREEDY,
    )
    plain = model.generate(
        **given, pixel_values=pictures, use_cache=False, max_new_tokens=3, **GREEDY
    )
    assert got.tolist() == plain.tolist()


def test_a_chunk_that_cuts_an_image_is_refused():
    model = adsc.attach(llava(), POOLED[0])
    inputs = batch([row(3, 0, 5)])
    with pytest.raises(adsc.VisionTokenError, match=r"rows hold \[10\] vision tokens"):
        model(input_ids=inputs["input_ids"][:, :13], pixel_values=inputs["pixel_values"])
    with pytest.raises(adsc.VisionTokenError, match="leave prefill_chunk_size out"):
        model.generate(**inputs, prefill_chunk_size=8, max_new_tokens=2)


def test_a_masked_vision_token_is_refused():
    inputs = batch([row(3, 0, 5)])
    inputs["attention_mask"][0, 7] = 0
    with pytest.raises(adsc.VisionTokenError, match=r"rows hold \[15\] vision tokens"):
        adsc.attach(llava(), POOLED[0])(**inputs)


def test_an_exit_that_leaves_a_row_empty_is_refused():
    model = adsc.attach(llava(), "1:1/4,4:0")
    with pytest.raises(adsc.VisionTokenError, match="row 1 has only vision tokens"):
        model(**batch([row(3, 0, 5), row(0)]))
    assert model(**batch([row(3, 0, 5), row(0, 1)])).logits.isfinite().all()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="has only vision tokens"):
        compiled(**{k: v for k, v in batch([row(0)]).items() if k != "attention_mask"})


def test_half_precision_takes_means_in_full_precision():
    model = adsc.attach(llava(), "0:1/16;pool=tiles").bfloat16()
    inputs = {
        k: v.bfloat16() if v.is_floating_point() else v for k, v in batch([row(1, 0, 1)]).items()
    }
    seen: list[torch.Tensor] = []
    layers = model.model.language_model.layers
    layers[0].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        features = model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        model(**inputs)
        mean = features.double().mean(0).bfloat16()
        wanted = layers[0].input_layernorm(mean)
    assert seen[0].shape[1] == 3
    assert torch.equal(seen[0][0, 1], wanted)


def test_a_class_token_is_a_part_of_its_own():
    model = llava()
    model.config.vision_feature_select_strategy = "full"
    adsc.attach(model, "1:4/17;pool=tiles")
    ids = torch.tensor([[5, *[90] * 17, 6, 7]])
    output = model(input_ids=ids, pixel_values=batch([row(1, 0, 1)])["pixel_values"])
    # The class token, and 3 tiles of 4 x 4.
    assert output.kept_positions[-1][0].tolist()[:2] == [0, 1]
    assert output.kept_positions[-1].shape[1] == 3 + 4


@pytest.mark.parametrize("name", ["fastv", "pool"])
def test_methods_keep_at_least_one_token(name):
    method = adsc.peers.make(name, llava(), average=8)
    with pytest.raises(adsc.PlanError, match="an exit is for plans"):
        type(method)(stages=((2, 0),))


def test_empty_pools_are_refused_by_the_checkpoint_too():
    with pytest.raises(adsc.PlanError, match="pool 'mean'"):
        adsc.PruningPlan.from_dict({"stages": [[1, "1/2"]], "pool": "mean"})


def test_tables_made_in_inference_mode_serve_in_training():
    model = adsc.attach(llava(), "1:5/16;pool=tiles")
    inputs = batch([row(3, 0, 5)])
    with torch.inference_mode():
        model(**inputs)
    model(**inputs).logits.sum().backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_lora_moves_through_a_pool():
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj")
    torch.manual_seed(0)
    model = get_peft_model(adsc.attach(llava(), "1:1/4,4:0;pool=tiles"), config)
    inputs = batch(MIXED, "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    rate = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        rate.step()
        rate.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    merged = model.merge_and_unload()
    assert adsc.plan_of(merged) == adsc.PruningPlan.parse("1:1/4,4:0;pool=tiles")


def test_rows_that_are_all_padding_are_refused_only_where_there_is_an_exit():
    """Batches are filled up with such rows, and their outputs are never read."""
    columns = torch.tensor([[False, True, True, True, True, False], [False] * 6])
    valid = torch.tensor([[True] * 6, [False] * 6])
    vision = [(columns, [Image(4, (2, 2))])]
    (segment,) = survivors(vision, valid, PruningPlan.parse("1:1/2"))
    assert segment.valid is not None and segment.valid.sum(1).tolist() == [4, 0]


def test_the_heaviest_stage_is_never_milder_than_the_target():
    plans = curriculum("2:1/144", "reverse", stages=2)
    assert [str(plan) for plan in plans] == ["2:1/144", "2:1/144"]
