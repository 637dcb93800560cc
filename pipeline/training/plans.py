"""Which plan each step of a training runs under: always the same, drawn, or growing.

A step's plan follows from the config and the step's number alone, so every worker finds the same,
and a resumed run continues with it. The plan is switched for the calls of a step (`adsc.running`);
what is attached to the model stays the target.
"""

from collections import Counter
from typing import Any

from torch import nn

from adsc.attachment.attach import check_plan
from adsc.curriculum import drawn_name, grown_plan
from adsc.method import Method
from adsc.plan import PlanError, PruningPlan
from pipeline.evaluation.methods import build_method
from pipeline.training.config import DENSE, TrainConfig

SAMPLED = 1000
"""Steps that represent a growing training when its plans are counted."""


class StepPlans:
    """The plans of a training's steps.

    Args:
        config: of the training.
        model: that is trained; a peer is fitted to it, and all plans must fit it.
        steps: of the whole training.

    Raises:
        PlanError: a plan that the model can't run with.
    """

    def __init__(self, config: TrainConfig, model: nn.Module, steps: int) -> None:
        self._config, self._steps = config, steps
        self.target: PruningPlan | Method = build_method(config, model)
        """What the finished model runs with; to be attached."""
        self._named = {name: PruningPlan.parse(plan) for name, plan in config.plans.items()}
        self._weights: dict[str, float] = {}
        if self._named:
            given = dict.fromkeys(self._named, 1.0) | config.weights
            self._weights = {name: given[name] for name in sorted(given)}
        if config.grow is not None and self.target.stages:
            check_plan(model, self._grown(0))
        for name, plan in self._named.items():
            try:
                check_plan(model, plan)
            except PlanError as error:
                raise PlanError(
                    f"the elastic plan {name!r}: {error}; one checkpoint can only carry plans that "
                    "its model allows: change this one, or leave it out"
                ) from error

    def __call__(self, step: int) -> PruningPlan | Method:
        """The plan of a step, counted from 0; an empty one trains without a drop."""
        if self._named:
            return self._plan_named(drawn_name(self._weights, self._config.seed, step))
        if self._config.grow is not None and self.target.stages:
            return self._grown(step)
        return self.target

    def shares(self) -> list[tuple[PruningPlan | Method, float]]:
        """Each plan with the share of the steps that it is expected to have."""
        if self._named:
            total = sum(self._weights.values())
            each = self._weights.items()
            return [(self._plan_named(name), weight / total) for name, weight in each if weight]
        if self._config.grow is None or not self.target.stages:
            return [(self.target, 1.0)]
        count = min(self._steps, SAMPLED)
        seen = Counter(self._grown(self._steps * part // count) for part in range(count))
        return [(plan, times / count) for plan, times in seen.items()]

    def _plan_named(self, name: str) -> PruningPlan:
        return PruningPlan() if name == DENSE else self._named[name]

    def _grown(self, step: int) -> PruningPlan:
        grow: Any = self._config.grow
        assert isinstance(self.target, PruningPlan)
        growing = (1 - grow.settle) * self._steps
        return grown_plan(self.target, step / growing, grow.extreme)
