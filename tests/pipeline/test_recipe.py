"""The recipe: what the curriculum makes of a config, and what it refuses."""

from __future__ import annotations

import pytest

from adsc.plan import PlanError
from pipeline.config import ConfigError
from pipeline.durable.stage import Stage
from pipeline.evaluation.config import EvaluateConfig
from pipeline.kinds.merge import MergeConfig
from tests.pipeline.recipes import training_configs
from workflows.demo.workflow import demo_paper as demo

TARGET = "2:1/4,4:1/4"


def test_an_explicit_curriculum_trains_its_plans() -> None:
    plans = ["2:1/8,4:1/8", "2:1/8", TARGET]
    found = training_configs(curriculum__order="explicit", curriculum__plans=plans)
    assert [found[f"train-{number}"].plan for number in (1, 2, 3)] == plans
    assert [found[f"control-{number}"].plan for number in (1, 2, 3)] == ["", "", ""]


def test_single_stages_have_their_own_settings() -> None:
    found = training_configs(
        curriculum__stages=2,
        curriculum__training="[{learning_rate: 1e-3, lora.rank: 4}, {steps: 7}]",
    )
    for branch in ("train", "control"):  # the control trains alike
        first, second = found[f"{branch}-1"], found[f"{branch}-2"]
        assert (first.learning_rate, first.steps, first.lora and first.lora.rank) == (1e-3, 100, 4)
        assert (second.learning_rate, second.steps) == (2e-3, 7)
    assert found["train-1"].seed == found["control-1"].seed != found["train-2"].seed


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"curriculum__order": "explicit"}, ConfigError, "with 0 plans"),
        ({"curriculum__plans": [TARGET]}, ConfigError, "reverse with 1 plans"),
        (
            {"curriculum__order": "explicit", "curriculum__plans": [TARGET, "2:1/8"]},
            PlanError,
            f"end with '2:1/8', the target is '{TARGET}'",
        ),
        ({"curriculum__training": [{}]}, ConfigError, "1 entries for 3 training stages"),
        ({"curriculum__training": [{"plan": ""}, {}, {}]}, ConfigError, "may not set plan"),
        (
            {"curriculum__training": [{"learning_rat": 1}, {}, {}]},
            ConfigError,
            "did you mean learning_rate",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        training_configs(**changes)


ELASTIC = {"22": TARGET, "9": "1:1/8,4:1/4"}


def elastic(**changes: object) -> dict[str, Stage]:
    given = {"curriculum__order": "elastic", "curriculum__elastic": ELASTIC} | changes
    stages = demo().edit({key.replace("__", "."): it for key, it in given.items()}).stages()
    return {stage.name: stage for stage in stages}


def test_an_elastic_checkpoint_is_merged_with_its_names_and_evaluated_with_all() -> None:
    found = elastic()
    merged, control = found["merge"].config, found["merge-control"].config
    assert isinstance(merged, MergeConfig) and isinstance(control, MergeConfig)
    assert (merged.plan, merged.plans) == (TARGET, ELASTIC)
    assert (control.plan, control.plans) == ("", {})
    evaluate = found["evaluate"].config
    assert isinstance(evaluate, EvaluateConfig) and evaluate.control == "dense_lora"
    assert [(arm.name, arm.checkpoint, arm.plan, arm.budget) for arm in evaluate.arms] == [
        ("dense", "base", "", ""),
        ("dense_lora", "merge-control", "", ""),
        ("plan_untrained", "base", TARGET, ""),
        ("elastic_22", "merge", TARGET, "22"),
        ("elastic_9", "merge", ELASTIC["9"], "9"),
        ("elastic_dense", "merge", "", "dense"),
    ]
    assert {arm.curve for arm in evaluate.arms if arm.budget} == {"elastic checkpoint"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": "2:1/2"}, r"target '2:1/2' is none of curriculum\.elastic"),
        ({"curriculum__elastic": {"22": TARGET, "dense": "1:1/8"}}, "'dense' can't name a plan"),
        ({"curriculum__elastic": {"22": TARGET, "9": "12:1/8"}}, r"layers 0\.\.7"),
        ({"plan": "search", "search__average": 22}, "elastic contradict"),
    ],
)
def test_elastic_plans_that_can_not_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises((ConfigError, PlanError), match=message):
        elastic(**changes)


@pytest.mark.parametrize("name", ["plan_trained", "dense_lora", "elastic_64", "elastic_dense"])
def test_a_compared_recipe_has_no_name_of_another_arm(name: str) -> None:
    elastic = {"curriculum.order": "elastic", "curriculum.elastic": {"64": TARGET}}
    compared = {"compare": {name: {"label": "other", "plan": "1:1/4"}}}
    with pytest.raises(ConfigError, match=rf"compare\.{name}: that name is taken"):
        demo().edit(elastic | compared)
    demo().edit({"compare": {"elastic_64": {"label": "other", "plan": "1:1/4"}}})
