"""Plans that change from step to step: drawn (`elastic`) or growing (`grow`)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText

import adsc
from adsc.curriculum import drawn_name, grown_plan
from adsc.plan import PlanError, PruningPlan
from pipeline.config import ConfigError, edit
from pipeline.durable.identity import digest
from pipeline.kinds.merge import MergeConfig
from pipeline.stages.merge import merge
from pipeline.training.config import DistillSettings, GrowSettings, TrainConfig
from pipeline.training.curriculum import CurriculumConfig
from pipeline.training.loop import train
from pipeline.training.plans import StepPlans
from tests.adsc.zoo import CASES
from tests.pipeline.contexts import DATA, stage_context
from tests.pipeline.recipes import training_configs
from tests.pipeline.training.training_runs import (
    CONFIG,
    DISTILL,
    LORA,
    Logged,
    Plain,
    sources,
    trained,
    worst_difference,
)
from tests.small import Small
from workflows.demo.workflow import demo_paper as demo

NAMED = {"32": "1:1/2", "16": "1:1/4", "8": "0:1/8"}
WEIGHTS = {"32": 2.0, "dense": 1.0}
ELASTIC = CONFIG.model_copy(update={"plan": "1:1/4", "plans": NAMED, "weights": WEIGHTS})
GROWING = CONFIG.model_copy(update={"plan": "1:1/4", "grow": GrowSettings(extreme=2, settle=0.5)})
YAML = '{64: "2:1/4", 32: "1:1/4"}'


@pytest.fixture(scope="module")
def model(small: Small) -> Any:
    return AutoModelForImageTextToText.from_pretrained(small.base)


def test_draws_follow_the_weights_the_seed_and_the_step_alone() -> None:
    weights = {"a": 2.0, "b": 1.0, "c": 0.0, "dense": 1.0}
    drawn = [drawn_name(weights, seed=3, step=step) for step in range(4000)]
    count = Counter(drawn)
    assert count["c"] == 0
    for name, share in (("a", 0.5), ("b", 0.25), ("dense", 0.25)):
        assert count[name] / 4000 == pytest.approx(share, abs=0.03)
    assert drawn[5:9] == [drawn_name(weights, seed=3, step=step) for step in range(5, 9)]
    assert drawn != [drawn_name(weights, seed=4, step=step) for step in range(4000)]


def test_an_elastic_training_has_its_plans_in_their_shares(model: Any) -> None:
    plans = StepPlans(ELASTIC, model, 6)
    expected = dict(plans.shares())
    assert expected == {
        PruningPlan.parse("1:1/2"): 2 / 5,
        PruningPlan.parse("1:1/4"): 1 / 5,
        PruningPlan.parse("0:1/8"): 1 / 5,
        PruningPlan(): 1 / 5,
    }
    assert {plans(step) for step in range(60)} == set(expected)
    # The order in which a config names them does not matter.
    turned = ELASTIC.model_copy(update={"plans": dict(reversed(NAMED.items()))})
    again = StepPlans(turned, model, 6)
    assert [again(step) for step in range(60)] == [plans(step) for step in range(60)]


def test_a_growing_training_ends_with_its_target(model: Any) -> None:
    plans = StepPlans(GROWING, model, 40)
    averages = [plans(step).average_tokens(64, 4) for step in range(40)]
    assert averages == sorted(averages, reverse=True)
    assert str(plans(0)) == "1:1/2" and len(set(averages[:20])) > 5
    assert {str(plans(step)) for step in range(20, 40)} == {"1:1/4"}
    assert sum(share for _, share in plans.shares()) == pytest.approx(1)
    assert dict(plans.shares())[PruningPlan.parse("1:1/4")] == pytest.approx(0.5)
    assert grown_plan(PruningPlan.parse("2:1/4;anchor=first"), 0, 2) == PruningPlan.parse(
        "2:1/2;anchor=first"
    )


class Watched(Logged):
    """Notes the vision tokens of each step."""

    @property
    def tokens(self) -> list[float]:
        return [line["average_vision_tokens"] for line in self.metrics]


@pytest.fixture(scope="module")
def whole(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    context = Watched(tmp_path_factory.mktemp("whole"))
    train(ELASTIC, sources(small), context)
    return context


def test_each_step_runs_under_its_plan(model: Any, whole: Watched) -> None:
    plans = StepPlans(ELASTIC, model, 6)
    assert whole.tokens == [plans(step).average_tokens(64, 4) for step in range(6)]
    assert len(set(whole.tokens)) > 2


def test_a_resumed_elastic_training_equals_an_uninterrupted_one(
    small: Small, tmp_path: Path, whole: Watched
) -> None:
    with pytest.raises(InterruptedError):
        train(ELASTIC, sources(small), Plain(tmp_path, die_at=4))
    train(ELASTIC, sources(small), Plain(tmp_path))
    assert worst_difference(trained(tmp_path), trained(whole.folder)) == 0


@pytest.mark.parametrize("config", [ELASTIC, GROWING], ids=["elastic", "grow"])
def test_micro_batches_and_a_teacher_go_with_changing_plans(
    small: Small, tmp_path: Path, config: TrainConfig
) -> None:
    changes = {"lora": LORA.model_copy(update={"dropout": 0.0}), "distill": DISTILL}
    for name, more in (("one", {}), ("four", {"accumulate": 4, "activation_checkpointing": True})):
        context = Logged(tmp_path / name)
        train(config.model_copy(update=changes | more), sources(small), context)
        taught = [line["divergence"] > 0 for line in context.metrics]
        dense = [line["average_vision_tokens"] == 64 for line in context.metrics]
        assert [not one for one in dense] == taught
    assert worst_difference(trained(tmp_path / "one"), trained(tmp_path / "four")) < 5e-4


def test_the_merged_checkpoint_carries_the_named_plans(
    small: Small, whole: Watched, tmp_path: Path
) -> None:
    inputs = {
        "base": (small.base, {}),
        "data": (small.prepared, DATA),
        "trained": (whole.folder / "step-0000006", {}),
    }
    context = stage_context("merge", tmp_path / "out", inputs)
    merge(context, MergeConfig(plan="1:1/4", plans=NAMED))
    loaded = adsc.from_pretrained(context.out)
    assert adsc.plan_of(loaded) == PruningPlan.parse("1:1/4")
    named = {n: PruningPlan.from_dict(plan) for n, plan in loaded.config.adsc_plans.items()}
    assert named == {name: PruningPlan.parse(plan) for name, plan in NAMED.items()}
    assert sorted(named) == sorted(NAMED)  # saving sorts a config's keys


def test_plans_that_the_family_does_not_allow_are_refused() -> None:
    config = ELASTIC.model_copy(update={"plan": "3:1/2", "plans": {"mild": "3:1/2", "hard": "1:1"}})
    with pytest.raises(
        PlanError, match=r"elastic plan 'hard': .*the first layer for a drop is 2.*"
    ):
        StepPlans(config, CASES["qwen3_vl"].model(), 6)


def test_a_recipe_trains_one_stage_and_a_dense_control() -> None:
    found = training_configs(
        plan="1:1/4", curriculum__order="elastic", curriculum__elastic=YAML,
        curriculum__weights="{64: 3}", train__distill="{weight: 0.5}",
    )  # fmt: skip
    assert set(found) == {"train-1", "control-1"}
    one, control = found["train-1"], found["control-1"]
    assert (one.plan, one.plans) == ("1:1/4", {"64": "2:1/4", "32": "1:1/4"})
    assert one.weights == {"64": 3} and one.distill == DistillSettings(weight=0.5)
    assert (control.plan, control.plans, control.weights, control.distill) == ("", {}, {}, None)
    (merging,) = [
        stage.config
        for stage in demo()
        .edit(
            {
                "plan": "1:1/4",
                "curriculum.order": "elastic",
                "curriculum.elastic": YAML,
            }
        )
        .stages()
        if stage.name == "merge"
    ]
    assert merging.plans == one.plans
    grown = training_configs(curriculum__order="grow", curriculum__settle=0.1)
    assert set(grown) == {"train-1", "control-1"} and grown["control-1"].grow is None
    assert grown["train-1"].grow == GrowSettings(extreme=1.5, settle=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": "elastic"}, "with 0 named plans"),
        ({"elastic": YAML}, "reverse with 2 named plans"),
        ({"order": "elastic", "elastic": '{dense: "2:1/4"}'}, "'dense' can't name a plan"),
        ({"order": "elastic", "elastic": '{"a b": "2:1/4"}'}, "'a b' can't name a plan"),
        ({"order": "elastic", "elastic": '{a: ""}'}, "the plan 'a' drops nothing"),
        ({"order": "elastic", "elastic": '{a: "2:x"}'}, "keep ratio 'x'"),
        (
            {"order": "elastic", "elastic": YAML, "weights": "{65: 1}"},
            "weights for 65, which no plan is named; there are 64, 32, dense",
        ),
        (
            {"order": "elastic", "elastic": YAML, "weights": "{64: 0, 32: 0, dense: 1}"},
            "would be published and never trained",
        ),
        ({"order": "elastic", "elastic": YAML, "weights": "{64: -1}"}, "weights of 64"),
        ({"weights": "{dense: 1}"}, "without plans"),
    ],
)
def test_curricula_that_can_not_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        edit(CurriculumConfig(), changes)


def test_a_target_outside_of_the_elastic_plans_is_refused() -> None:
    with pytest.raises(PlanError, match=r"the target '2:1/4,4:1/4' is none of curriculum.elastic"):
        training_configs(curriculum__order="elastic", curriculum__elastic=YAML)
    with pytest.raises(ConfigError, match=r"plan = search and curriculum.order = elastic contra"):
        training_configs(plan="search", curriculum__order="elastic", curriculum__elastic=YAML)


def test_old_fingerprints_stay() -> None:
    """Fields that came later are in no fingerprint while they have their defaults. The digests
    were taken before there were any."""
    assert digest(TrainConfig())[:12] == "11a444d3acc8"
    assert digest(CurriculumConfig())[:12] == "a752e4a2dcf9"
    assert digest(MergeConfig())[:12] == "f73aaa491c1d"
    assert digest(TrainConfig(grow=GrowSettings()))[:12] != digest(TrainConfig())[:12]
