"""Named plans: one checkpoint that was trained for several budgets, and carries a plan for each.

The names are in the config beside the plan that the model runs with, so they are saved and loaded
with it. Nothing here touches a model's modules: `adsc.attach` installs a plan, by its name too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from adsc.method import Method, from_dict
from adsc.plan import PlanError, PruningPlan, as_plan

CONFIG_FIELD = "adsc"  # the plan that a model runs with, in a checkpoint's config.json
PLANS_FIELD = "adsc_plans"  # the named plans, in a checkpoint's config.json
DENSE = "dense"
"""The name of no plan at all: every checkpoint runs dense by it."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def read_names(plans: Mapping[str, Any]) -> dict[str, PruningPlan | Method]:
    """Named plans from texts, plans or methods, in their order.

    Raises:
        PlanError: a name that can't be one, a plan that is malformed or drops nothing.

    >>> {name: str(plan) for name, plan in read_names({"64": "2:1/4", "32": "1:1/4"}).items()}
    {'64': '2:1/4', '32': '1:1/4'}
    """
    found: dict[str, PruningPlan | Method] = {}
    for name, given in plans.items():
        check_name(name)
        try:
            plan = given if isinstance(given, Method) else as_plan(given)
        except PlanError as error:
            raise PlanError(f"plan named {name!r}: {error}") from None
        if not plan.stages:
            raise PlanError(
                f"plan named {name!r} drops nothing: leave it out, every checkpoint runs dense as "
                f"{DENSE!r}"
            )
        found[name] = plan
    return found


def check_name(name: object) -> None:
    """Raise PlanError for what can't name a plan."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise PlanError(
            f"{name!r} can't name a plan: use letters, digits, `_`, `.` and `-`, with a letter or "
            "a digit first, such as 192"
        )
    if name == DENSE:
        raise PlanError(f"{DENSE!r} can't name a plan: it is the model without one")


def names_in(config: Any) -> dict[str, PruningPlan | Method]:
    """The named plans in a model's config, or in what config.json holds; empty if it has none.
    Saving a config sorts its keys, so names that are numbers come the largest first, then others.

    Raises:
        PlanError: what stands there are not named plans.
    """
    known = isinstance(config, Mapping)
    data = config.get(PLANS_FIELD) if known else getattr(config, PLANS_FIELD, None)
    if data is None:
        return {}
    if not isinstance(data, Mapping) or not all(isinstance(it, Mapping) for it in data.values()):
        raise PlanError(f"{PLANS_FIELD} in the config is {data!r}: it maps names to plans")
    names = sorted(data, key=_order)
    return read_names({name: from_dict(dict(data[name])) for name in names})


def _order(name: str) -> tuple[bool, float, str]:
    number = re.fullmatch(r"\d+(\.\d+)?", name)
    return number is None, -float(name) if number else 0, name


def find_plan(text: str, config: Any) -> PruningPlan | Method:
    """The plan that a text means for a model with this config: one of its names, `dense`, or a
    plan as it is written.

    Raises:
        PlanError: an unknown name, with those that are known; a malformed plan.
    """
    text = text.strip()
    if text == DENSE:
        return PruningPlan()
    return plan_named(text, config) if NAME.fullmatch(text) else PruningPlan.parse(text)


def plan_named(name: str, config: Any) -> PruningPlan | Method:
    """The plan of that name for a model with this config.

    Raises:
        PlanError: an unknown name, with those that are known.
    """
    known = names_in(config)
    if name in known:
        return known[name]
    if not known:
        raise PlanError(
            f"plan {name!r}: this model has no named plans; write {DENSE}, or a plan as "
            "layer:keep, such as 8:1/2,16:1/2"
        )
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise PlanError(
        f"plan {name!r} is unknown: {hint}this model has {', '.join(known)} and {DENSE}; a plan "
        "of your own is written layer:keep, such as 8:1/2,16:1/2"
    )
