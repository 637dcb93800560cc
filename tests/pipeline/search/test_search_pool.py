"""The search's space with pools and exits."""

from __future__ import annotations

from typing import Any

import pytest

import adsc
from adsc.plan import PlanError, PruningPlan
from adsc.tiles import are_whole
from pipeline.search.config import SearchConfig
from pipeline.search.space import Costs, Space

LLAVA = "llava-1.5-7b"


def space_of(**settings: Any) -> Space:
    config = SearchConfig(**settings)
    return Space(Costs(LLAVA, config), config)


@pytest.mark.parametrize(
    ("budget", "cost"),
    [
        ({"average": 128}, lambda it: it.average_vision_tokens),
        ({"gflops": 3600}, lambda it: it.flops / 1e9),
        ({"kv_mib": 115}, lambda it: it.kv_cache_bytes / 2**20),
    ],
)
def test_every_plan_has_the_exit_and_meets_the_budget(budget: dict[str, Any], cost: Any) -> None:
    found = space_of(
        **budget, drops=(1, 2), keeps=("1/9", "1/4", "1/2"), pool="tiles", exit_layer=24
    )
    _, low, high = found.config.budget
    assert len(found.stages) > 5
    for number in range(len(found.stages)):
        candidate = found.candidate(number, "last")
        plan = PruningPlan.parse(candidate.plan)
        assert plan.pool == "tiles" and plan.exit == 24
        assert low <= cost(adsc.estimate_cost(LLAVA, plan)) <= high
        assert cost(adsc.estimate_cost(LLAVA, plan)) == pytest.approx(candidate.cost, rel=1e-9)
    for one in found.known().values():
        assert PruningPlan.parse(one.plan).exit == 24


def test_placements_with_whole_tiles_come_first() -> None:
    found = space_of(average=128, drops=(1, 2), keeps=("1/9", "1/4", "2/5"), pool="tiles")
    plans = [PruningPlan.parse(found.candidate(i, "last").plan) for i in range(len(found.stages))]
    whole = [are_whole((24, 24), plan.tokens_after_drops(576)) for plan in plans]
    assert "4:1/9;pool=tiles" in map(str, plans)
    assert whole == sorted(whole, reverse=True) and len(set(whole)) == 2
    runs = space_of(average=128, drops=(1, 2), keeps=("1/9", "1/4", "2/5"), pool="runs")
    assert sorted(runs.stages) == sorted(found.stages)


def test_what_cannot_be_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="leave grid out"):
        SearchConfig(average=128, pool="tiles", anchors=("grid",))
    with pytest.raises(PlanError, match=r"exit_layer = 32, but the decoder has layers 0\.\.31"):
        space_of(average=128, exit_layer=32)
    with pytest.raises(PlanError, match=r"nearest is average = .*4:0;pool=runs"):
        space_of(average=300, exit_layer=4, drops=(1,), pool="runs")
