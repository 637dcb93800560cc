"""The plan itself: its definition on integers, its text form, what is refused."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

import adsc
from tests.adsc.attached import rows_of
from tests.adsc.tiny import TOKENS, batch, kept_of, llava, row
from tests.adsc.zoo import CASES

PLANS = ["", "0:1/2", "8:1/2,16:1/2,24:1/2", "2:1/3;anchor=first", "1:0.25;positions=reindex"]


@pytest.mark.parametrize("text", PLANS)
def test_text_and_dict_forms_round_trip(text):
    plan = adsc.PruningPlan.parse(text)
    assert adsc.PruningPlan.parse(str(plan)) == plan
    assert adsc.PruningPlan.from_dict(plan.to_dict()) == plan


def test_a_float_is_the_ratio_that_it_was_typed_for():
    plan = adsc.PruningPlan(stages=[(1, 1 / 3), (2, 0.1)])
    assert plan.stages == ((1, Fraction(1, 3)), (2, Fraction(1, 10)))


@pytest.mark.parametrize("anchor", ["last", "first", "center"])
@pytest.mark.parametrize("n", [1, 2, 7, 16, 576])
@pytest.mark.parametrize("keep", [1, 0.5, 0.34, 0.01])
def test_one_token_of_each_equal_group_stays(anchor, n, keep):
    plan = adsc.PruningPlan(stages=[(0, keep), (1, keep)], anchor=anchor)
    first, second = plan.kept_indices(n)
    assert list(first) == kept_of(n, keep, anchor)
    assert list(second) == [first[i] for i in kept_of(len(first), keep, anchor)]
    assert plan.tokens_after_drops(n) == [len(first), len(second)]


def test_the_last_token_of_an_image_always_stays_with_anchor_last():
    plan = adsc.PruningPlan(stages=[(0, 0.3), (1, 0.3), (2, 0.3)])
    assert all(kept[-1] == 575 for kept in plan.kept_indices(576))


def test_known_budgets():
    plan = adsc.PruningPlan.parse("8:1/2,16:1/2,24:1/2")
    assert plan.average_tokens(576, 32) == 270
    assert plan.tokens_per_layer(576, 32) == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert plan.reduction(576, 32) == pytest.approx(1 - 270 / 576)


def test_the_grid_thins_out_evenly_in_both_directions():
    half, quarter = adsc.PruningPlan.parse("0:1/2,1:1/2;anchor=grid").kept_indices(64, (8, 8))
    assert all((i // 8 + i % 8) % 2 == 0 for i in half)  # a checkerboard
    assert {(i // 8 % 2, i % 8 % 2) for i in quarter} == {(1, 1)}  # every other row and column
    assert len(quarter) == 16
    with pytest.raises(adsc.PlanError, match="h x w lattice, but 10 tokens"):
        adsc.PruningPlan.parse("0:1/2;anchor=grid").kept_indices(10, (3, 3))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([(2, 0.5), (2, 0.5)], "strictly increasing"),
        ([(4, 0.5), (2, 0.5)], "strictly increasing"),
        ([(-1, 0.5)], "layer -1 must be a whole number"),
        ([(1.5, 0.5)], "layer 1.5 must be a whole number"),
        ([(1, 0), (2, 0.5)], "layer 2 after an exit"),
        ([(1, -0.5)], r"must be in \(0, 1\]"),
        ([(1, 1.01)], r"must be in \(0, 1\]"),
        ([(1, float("nan"))], "is not a number"),
        ([(1, "half")], "is not a number"),
        ([3], "not a pair"),
    ],
)
def test_bad_stages_are_refused(stages, message):
    with pytest.raises(adsc.PlanError, match=message):
        adsc.PruningPlan(stages=stages)


def test_the_least_ratio_is_a_millionth_and_stages_must_be_pairs():
    assert str(adsc.PruningPlan.parse("8:1e-9")) == "8:1/1000000"
    with pytest.raises(adsc.PlanError, match="not pairs"):
        adsc.PruningPlan(stages=None)
    with pytest.raises(adsc.PlanError, match="not pairs"):
        adsc.attach(llava(), 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8", "is not layer:keep"),
        ("a:1/2", "is not layer:keep"),
        ("1:1/2;anchor=middle", "choose one of last, first, center, grid"),
        ("1:1/2;positions=new", "choose one of keep, reindex"),
        ("1:1/2;colour=red", "option 'colour=red'"),
    ],
)
def test_bad_texts_are_refused(text, message):
    with pytest.raises(adsc.PlanError, match=message):
        adsc.PruningPlan.parse(text)


def test_unknown_fields_of_a_checkpoint_are_refused():
    with pytest.raises(adsc.PlanError, match="unknown fields"):
        adsc.PruningPlan.from_dict({"stages": [], "anker": "last"})


def test_a_grid_plan_runs_and_generates():
    plan = "2:1/2,4:1/4;anchor=grid"
    inputs = batch([row(3, 0, 5), row(2, 0, 0, 4)])
    model = adsc.attach(llava(), plan)
    kept = adsc.PruningPlan.parse(plan).kept_indices(TOKENS, (4, 4))[-1]
    with torch.no_grad():
        _, columns = rows_of(model(**inputs), inputs)[0]
    assert columns == [0, 1, 2, *(3 + i for i in kept), *range(19, 24)]
    how = {"max_new_tokens": 3, "do_sample": False}
    cached = model.generate(**inputs, **how)
    assert cached.tolist() == model.generate(**inputs, use_cache=False, **how).tolist()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "smolvlm", "gemma3", "paligemma"])
def test_grid_plans_on_families_with_a_lattice(name):
    case = CASES[name]
    first, second, third = case.pictures(case.model())
    inputs = case.batch([[3, first, 4], [2, second, third, 5]])
    model = adsc.attach(case.model(), "3:1/2;anchor=grid")
    how = {"max_new_tokens": 3, "do_sample": False}
    cached = model.generate(**inputs, **how)
    assert cached.tolist() == model.generate(**inputs, use_cache=False, **how).tolist()
