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
from pipeline.training.config import TrainConfig


class CurriculumConfig(Config):
    """The way to the target plan; see adsc.curriculum."""

    order: Literal["reverse", "forward", "fixed", "explicit", "elastic"] = "reverse"
    """reverse: heaviest compression first. forward: mild first. fixed: the target throughout.
    explicit: the plans in `plans`."""
    stages: int = Field(3, ge=1)
    """Training stages, each one Ray Train run; `explicit` has one for each of its plans."""
    extreme: float = Field(1.5, gt=1)
    """The first stage's keep ratios are the target's to this power (or its inverse)."""
    plans: tuple[str, ...] = ()
    """For `explicit`: the plan of each training stage; the last is the target."""
    elastic: dict[str, str] = Field({}, json_schema_extra=ADDED)
    """For `elastic`: the plans by name; the target is one of them."""
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
        return self


def plans_of(way: CurriculumConfig, target: str) -> list[str]:
    """The plan of each training stage.

    Raises:
        PlanError: a malformed plan, or an explicit list that does not end with the target.
    """
    plan = PruningPlan.parse(target)
    if way.order == "elastic":
        return [target]
    if way.order != "explicit":
        return [str(one) for one in curriculum(plan, way.order, way.stages, way.extreme)]
    plans = [PruningPlan.parse(one) for one in way.plans]
    if plans[-1] != plan:
        raise PlanError(
            f"curriculum.plans end with {way.plans[-1]!r}, the target is {target!r}: the last "
            "training stage has to train what the finished model runs with"
        )
    return [str(one) for one in plans]


def configs_of(
    way: CurriculumConfig, train: TrainConfig, plans: Sequence[str | FoundPlan]
) -> list[TrainConfig]:
    """The config of each training stage: `train`, changed as the curriculum says.

    Raises:
        ConfigError: changes for another number of stages, or keys that `train` lacks.
    """
    changes = way.training or ({},) * len(plans)
    if len(changes) != len(plans):
        raise ConfigError(
            f"curriculum.training has {len(changes)} entries for {len(plans)} training stages; "
            "write one for each, {} where nothing changes"
        )
    filled = sorted({"plan", "seed"} & {key for change in changes for key in change})
    if filled:
        raise ConfigError(f"curriculum.training may not set {', '.join(filled)}")
    return [
        # Each stage draws its own batches.
        edit(train, change).model_copy(update={"plan": plan, "seed": 1000 * train.seed + number})
        for number, (plan, change) in enumerate(zip(plans, changes, strict=True), 1)
    ]
