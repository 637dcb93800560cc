"""Run calls of an attached model under another plan, or under none, without attaching again.

Which plan a call runs under belongs to the context that makes it (`contextvars`), never to the
model: blocks nest, and other threads and tasks see nothing of them. A call takes its plan when it
begins and carries it along, so a layer that gradient checkpointing runs again later finds the plan
that it ran under. This is not how a model is given its plan: `adsc.attach` does that.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

from torch import nn

from adsc.attachment.attach import attached_plan, base_model, check_plan
from adsc.dropping.blocks import block
from adsc.families.table import find_family
from adsc.method import Method, MethodHook
from adsc.named import find_plan
from adsc.plan import PlanError, PruningPlan, as_plan


def running(
    model: nn.Module, plan: PruningPlan | Method | str | Iterable[tuple[int, float]]
) -> AbstractContextManager[None]:
    """A context manager: calls of `model` in its block run under `plan` instead of the model's own.

    Args:
        model: as `adsc.attach` takes it; a plan that drops anything needs one that is attached.
        plan: as `adsc.attach` takes it, also by name; empty runs dense. A peer only if it is the
            attached one.

    Raises:
        PlanError: the plan does not fit the model, or the model has no plan attached.

    >>> with adsc.running(model, "2:1/9"):  # doctest: +SKIP
    ...     output = model(**inputs)
    """
    base = base_model(model)
    if isinstance(plan, str):
        plan = find_plan(plan, base.config)
    plan = plan if isinstance(plan, Method) else as_plan(plan)
    if plan.stages:
        check_plan(base, plan)
        has = attached_plan(base)
        if has is None:
            raise PlanError(
                f"plan {str(plan)!r} for a call of a model that has no plan: attach one first "
                "(adsc.attach), whichever; it installs what dropping needs"
            )
        if isinstance(plan, Method) and plan != has:
            raise PlanError(
                f"calls can't run under {str(plan)!r} while the model has {str(has)!r}: a method "
                "installs its own hooks, so attach it (adsc.attach)"
            )
    _, inner = find_family(base)
    return block((base, inner, *_hooked(base)), plan)


def suspended(model: nn.Module) -> AbstractContextManager[None]:
    """A context manager: calls of `model` in its block run dense, whatever its plan."""
    return running(model, PruningPlan())


def _hooked(base: nn.Module) -> list[nn.Module]:
    """The modules on which the attached method has hooks of its own."""
    if not isinstance(attached_plan(base), Method):
        return []
    return [
        module
        for module in base.modules()
        if any(isinstance(hook, MethodHook) for hook in module._forward_pre_hooks.values())
    ]
