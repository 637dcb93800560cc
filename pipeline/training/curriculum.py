"""The curriculum as config: from a target plan to the plan and the settings of each training stage.

The arithmetic of plans is adsc.curriculum's. A recipe makes stages of it, a search trials.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from adsc.curriculum import curriculum
from adsc.plan import PlanError, PruningPlan
from pipeline.config import ADDED, Config, ConfigError, edit
from pipeline.evaluation.methods import FoundPlan
from pipeline.training.config import GrowSettings, PlanName, TrainConfig, check_plans

WITHIN_ONE = ("elastic", "grow")
"""Orders with one training stage, in which plans change from step to step."""


class CurriculumConfig(Config):
    """The way to the target plan; see adsc.curriculum."""

    order: Literal["reverse", "forward", "fixed", "explicit", "elastic", "grow"] = "reverse"
    """reverse: heaviest compression first. forward: mild first. fixed: the target throughout.
    explicit: the plans in `plans`. elastic: each step draws one of the plans in `elastic`, for one
    checkpoint that serves them all. grow: from mild to the target step by step, in one stage."""
    stages: int = Field(3, ge=1)
    """Training stages, each one Ray Train run; `explicit` has one for each of its plans, `elastic`
    and `grow` have one."""
    extreme: float = Field(1.5, gt=1)
    """The first stage's (for `grow` the first step's) keep ratios are the target's to this power
    (or its inverse)."""
    settle: float = Field(0.25, ge=0, lt=1, json_schema_extra=ADDED)
    """For `grow`: share of the steps, the last ones, that train with the target itself."""
    elastic: dict[PlanName, str] = Field({}, json_schema_extra=ADDED)
    """For `elastic`: plans by name, such as `{"128": "4:1/9", "64": "2:1/9"}`; the target is one of
    them. The checkpoint carries them all."""
    weights: dict[PlanName, float] = Field({}, json_schema_extra=ADDED)
    """For `elastic`: how often each plan is drawn, in proportion, 1 where a name is left out;
    `dense` means steps without a plan."""
    plans: tuple[str, ...] = ()
    """For `explicit`: the plan of each training stage; the last is the target."""
    training: tuple[dict[str, Any], ...] = ()
    """Changes of `train` for single stages, one mapping each: `[{learning_rate: 1e-4}, {}, {}]`;
    empty trains all alike."""

    @model_validator(mode="after")
    def _plans_belong_to_explicit(self) -> Self:
        if bool(self.plans) != (self.order == "explicit"):
            raise ValueError(
                f"curriculum.order = {self.order} with {len(self.plans)} plans: list the plans of "
                "`explicit`, and of no other order, in curriculum.plans"
            )
        if bool(self.elastic) != (self.order == "elastic"):
            raise ValueError(
                f"curriculum.order = {self.order} with {len(self.elastic)} named plans: name the "
                "plans of `elastic`, and of no other order, in curriculum.elastic"
            )
        check_plans(self.elastic, self.weights)
        return self


def plans_of(config: CurriculumConfig, target: str) -> list[str]:
    """The plan of each training stage.

    Raises:
        PlanError: a malformed plan, an explicit list that does not end with the target, elastic
            plans without it.
    """
    plan = PruningPlan.parse(target)
    if config.order == "elastic" and plan not in map(PruningPlan.parse, config.elastic.values()):
        named = ", ".join(f"{name}: {one}" for name, one in config.elastic.items())
        raise PlanError(
            f"the target {target!r} is none of curriculum.elastic ({named}): name it there, or set "
            "plan to the one that the checkpoint is to run with by default"
        )
    if config.order in WITHIN_ONE:
        return [str(plan)]
    if config.order != "explicit":
        return [str(one) for one in curriculum(plan, config.order, config.stages, config.extreme)]
    plans = [PruningPlan.parse(one) for one in config.plans]
    if plans[-1] != plan:
        raise PlanError(
            f"curriculum.plans end with {config.plans[-1]!r}, the target is {target!r}: the last "
            "training stage has to train what the finished model runs with"
        )
    return [str(one) for one in plans]


def configs_of(
    config: CurriculumConfig, train: TrainConfig, plans: Sequence[str | FoundPlan]
) -> list[TrainConfig]:
    """The config of each training stage: `train`, changed as the curriculum says.

    Stages without a plan, a dense control's, have no teacher and no other plans either.

    Raises:
        ConfigError: changes for another number of stages, or keys that `train` lacks.
        PlanError: a teacher that is heavier than a plan that it teaches.
    """
    changes = config.training or ({},) * len(plans)
    if len(changes) != len(plans):
        raise ConfigError(
            f"curriculum.training has {len(changes)} entries for {len(plans)} training stages; "
            "write one for each, {} where nothing changes"
        )
    filled = sorted(
        {"plan", "seed", "plans", "weights", "grow"} & {key for change in changes for key in change}
    )
    if filled:
        raise ConfigError(f"curriculum.training may not set {', '.join(filled)}")
    pruned: dict[str, Any] = {}
    if config.order == "elastic":
        pruned = {"plans": dict(config.elastic), "weights": dict(config.weights)}
    elif config.order == "grow":
        pruned = {"grow": GrowSettings(extreme=config.extreme, settle=config.settle)}
    made = [
        edit(train, change).model_copy(
            # Each stage draws its own batches.
            update={"plan": plan, "seed": 1000 * train.seed + number}
            | (pruned if plan else {"distill": None})
        )
        for number, (plan, change) in enumerate(zip(plans, changes, strict=True), 1)
    ]
    for one in made:
        one.check_teacher()
    return made
