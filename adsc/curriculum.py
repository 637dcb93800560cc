"""Curricula over pruning ratios: the plans that lead to a target plan.

`reverse`, `forward` and `fixed` have a plan for each training stage; `elastic` and `grow` change it
from step to step within one. `reverse` is the paper's word (arXiv 2602.12618): the heaviest
compression first, easing to the target. `forward` goes from mild to the target, `fixed` trains at
the target throughout. How heavy the first stage is, the paper's abstract does not say; here it is a
number that one can set.
"""

import random
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

from adsc.plan import PlanError, PruningPlan, as_plan

ORDERS = ("reverse", "forward", "fixed")


def scale_plan(plan: PruningPlan, pressure: float) -> PruningPlan:
    """The plan with every keep ratio raised to the power `pressure`: above 1 heavier, below milder;
    an exit stays one.

    >>> str(scale_plan(PruningPlan.parse("2:1/4,4:1/2"), 2))
    '2:1/16,4:1/4'
    """
    stages = []
    for layer, keep in plan.stages:
        scaled = Fraction(float(keep) ** pressure).limit_denominator(64)
        # Below 1/64 heavier goes no further; but never milder than the plan itself. An exit, which
        # keeps nothing, stays one.
        stages.append((layer, max(scaled, min(keep, Fraction(1, 64))) if keep else keep))
    return replace(plan, stages=tuple(stages))


def curriculum(
    target: PruningPlan | str, order: str = "reverse", stages: int = 3, extreme: float = 1.5
) -> list[PruningPlan]:
    """The plan of each training stage; the last one is always the target.

    Args:
        target: the plan that the finished model is to run with.
        order: `reverse`, `forward` or `fixed`.
        stages: how many training stages, at least 1.
        extreme: pressure of the first stage of `reverse` (1 / extreme for `forward`), above 1;
            the stages between go from it to 1 in equal steps.

    >>> [str(plan) for plan in curriculum("2:1/4", "reverse", stages=3, extreme=2)]
    ['2:1/16', '2:1/8', '2:1/4']
    """
    plan = as_plan(target)
    each = pressures(order, stages, extreme)
    return [plan if pressure == 1 else scale_plan(plan, pressure) for pressure in each]


def pressures(order: str = "reverse", stages: int = 3, extreme: float = 1.5) -> list[float]:
    """The pressure of each training stage, for targets that aren't known yet; the last is 1.

    >>> pressures("reverse", stages=3, extreme=2)
    [2.0, 1.5, 1.0]
    """
    if order not in ORDERS:
        raise PlanError(f"curriculum {order!r} is unknown; choose one of {', '.join(ORDERS)}")
    if stages < 1:
        raise PlanError(f"a curriculum of {stages} stages trains nothing; use at least 1")
    if not 1 < extreme < float("inf"):
        raise PlanError(f"extreme = {extreme} must be above 1; `fixed` trains at the target alone")
    first = {"reverse": extreme, "forward": 1 / extreme, "fixed": 1.0}[order]
    return [first + (1 - first) * i / (stages - 1) for i in range(stages - 1)] + [1.0]


def grown_plan(target: PruningPlan, progress: float, extreme: float = 1.5) -> PruningPlan:
    """The plan of a step of `grow` (EPIC, arXiv 2510.00515): compression grows within one training.

    Args:
        target: what the training ends with.
        progress: 0 at the mildest plan, 1 at the target.
        extreme: the mildest plan's pressure is 1 / extreme.

    >>> [str(grown_plan(PruningPlan.parse("2:1/4"), x, extreme=2)) for x in (0, 1 / 2, 1)]
    ['2:1/2', '2:6/17', '2:1/4']
    """
    if extreme <= 1:
        raise PlanError(f"extreme = {extreme} must be above 1; at 1 nothing grows")
    if progress >= 1:
        return target
    return scale_plan(target, 1 / extreme + (1 - 1 / extreme) * max(progress, 0.0))


def drawn_name(weights: Mapping[str, float], seed: int, step: int) -> str:
    """The name that step `step` of `elastic` draws, in proportion to the weights. It follows from
    the arguments alone, so every worker, and a resumed run, draws the same.

    >>> [drawn_name({"64": 1, "128": 1, "dense": 2}, seed=0, step=step) for step in range(5)]
    ['dense', 'dense', '64', 'dense', 'dense']
    """
    chance = random.Random(f"elastic {seed} {step}").random() * sum(weights.values())
    for name, weight in weights.items():
        chance -= weight
        if chance < 0:
            return name
    return [name for name, weight in weights.items() if weight > 0][-1]  # rounding
