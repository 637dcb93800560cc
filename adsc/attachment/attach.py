"""Attach a pruning plan to a model, detach it, read it; give a model plans by name.

Attaching installs hooks on a transformers model as it is and writes the plan into its config; it
makes no subclass, replaces no method and keeps no state of a call.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from adsc.dropping.decoders import bare, check_attention, check_decoder, gathered
from adsc.dropping.hooks import (
    EnterDecoder,
    EnterLayer,
    EnterModel,
    EnterVision,
    LeaveModel,
    LeaveVision,
)
from adsc.families.family import Family
from adsc.families.table import find_family
from adsc.method import Method, MethodHook, from_dict
from adsc.named import CONFIG_FIELD, PLANS_FIELD, find_plan, names_in, read_names
from adsc.plan import PlanError, PruningPlan, as_plan

_HOOKS = (EnterModel, EnterDecoder, EnterLayer, EnterVision, LeaveModel, LeaveVision, MethodHook)
M = TypeVar("M", bound=nn.Module)


def attach(
    model: M,
    plan: PruningPlan | Method | str | Iterable[tuple[int, float]],
    *,
    logits: str | None = None,
) -> M:
    """Make a model drop vision tokens by a plan or a method, in place.

    Attaching again replaces the plan; an empty plan installs no hook at all. The plan is saved with
    the model's config.

    Args:
        model: a multimodal transformers model, also inside PEFT, DDP or torch.compile.
        plan: a plan, its text form, pairs (layer, keep), a method from `adsc.peers.make`; or the
            name of one of the model's own plans (`plans_of`), or `dense`.
        logits: `kept` returns logits (B, K, V) of the K tokens that are left; `full` returns
            (B, S, V), for callers that pair logits with input columns: a dropped column has those
            of the last kept column before it. None keeps the current setting, initially `kept`.
            Not saved with the model.

    Returns:
        The same model.

    Raises:
        UnsupportedModel: an unknown architecture.
        PlanError: the plan does not fit the model, or the model has none of that name.
    """
    if logits not in (None, "kept", "full"):
        raise PlanError(f"logits {logits!r} is unknown; choose one of kept, full")
    base = base_model(model)
    family, inner = find_family(base)
    if isinstance(plan, str):
        plan = find_plan(plan, base.config)
    plan = plan if isinstance(plan, Method) else as_plan(plan)
    decoder = family.decoder(inner)
    check_decoder(decoder)
    if isinstance(plan, Method) and plan.reads_attention:
        check_attention(plan.name, decoder)
    layers = [gathered(layer) for layer in decoder.layers]
    check_plan(base, plan)
    full = logits == "full" if logits is not None else _has_full_logits(base)
    _remove_hooks(base)
    setattr(base.config, CONFIG_FIELD, plan.to_dict())
    if not plan.stages:
        return model
    at = [layer for layer, _ in plan.stages]
    for module, path in {id(base): (base, "model"), id(inner): (inner, "")}.values():
        names = tuple(inspect.signature(bare(module).forward).parameters)
        path = "" if module is inner else path
        head = "none" if module is inner else _head_of(base)
        enter = EnterModel(family, plan, path, names, head, full)
        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(LeaveModel(module is inner), with_kwargs=True)
    for part in inner.children():
        if part is not decoder:
            part.register_forward_pre_hook(EnterVision(), with_kwargs=True)
            part.register_forward_hook(LeaveVision(), with_kwargs=True)
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(EnterLayer(number), with_kwargs=True)
    if isinstance(plan, Method):
        if at[0] == 0:
            decoder.register_forward_pre_hook(EnterDecoder(), with_kwargs=True)
        plan.install(inner)
    return model


def check_plan(model: nn.Module, plan: PruningPlan | Method) -> None:
    """Raise PlanError if a plan or method does not fit a model."""
    base = base_model(model)
    family, inner = find_family(base)
    plan.check_layers(len(family.decoder(inner).layers))
    _check_family(family, base.config, plan)


def _head_of(base: Any) -> str:
    """`lm` where the top model makes logits of its vocabulary, else `other`: a classifier, which
    looks for the last token of its own input."""
    return "lm" if base.get_output_embeddings() is not None else "other"


def _check_family(family: Family, config: Any, plan: PruningPlan | Method) -> None:
    if isinstance(plan, Method):
        plan.check_family(family)
    first = family.first_layer(config)
    if plan.stages and plan.stages[0][0] < first:
        raise PlanError(
            f"plan {str(plan)!r} drops before layer {plan.stages[0][0]}, but {family.name} adds "
            f"image features to its vision tokens after layers 0..{first - 1}: the first layer "
            f"for a drop is {first}"
        )
    if plan.stages and plan.positions == "reindex" and family.axes > 1:
        raise PlanError(
            f"positions 'reindex' has no meaning for {family.name}, whose tokens have "
            f"{family.axes} position ids each (time, height, width); use positions='keep'"
        )


def detach(model: M) -> M:
    """Remove the plan from a model, in place.

    Named plans are removed too; `attach(model, "dense")` runs dense and keeps them. No hook is left
    to check later calls: do not continue a cache that was filled under the plan.
    """
    base = base_model(model)
    _remove_hooks(base)
    for name in (CONFIG_FIELD, PLANS_FIELD):
        if hasattr(base.config, name):
            delattr(base.config, name)
    return model


def name_plans(
    model: M, plans: Mapping[str, PruningPlan | Method | str | Iterable[tuple[int, float]]]
) -> M:
    """Set the named plans of a model, replacing existing ones; they are saved with its config. The
    current plan stays in force: `attach(model, name)` changes it.

    Args:
        model: as `attach` takes it.
        plans: by name, in the order in which they are displayed; empty removes all names.

    Raises:
        PlanError: an invalid name, or a plan that does not fit the model.
    """
    base = base_model(model)
    found = read_names(plans)
    _check_named(base, found)
    if found:
        setattr(base.config, PLANS_FIELD, {name: plan.to_dict() for name, plan in found.items()})
    elif hasattr(base.config, PLANS_FIELD):
        delattr(base.config, PLANS_FIELD)
    return model


def plans_of(model: nn.Module) -> dict[str, PruningPlan | Method]:
    """The named plans of a model, any of which `attach` takes by its name; empty if it has none."""
    return names_in(base_model(model).config)


def check_named_plans(model: nn.Module) -> None:
    """Raise PlanError if one of a model's named plans does not fit it."""
    base = base_model(model)
    _check_named(base, names_in(base.config))


def _check_named(base: Any, plans: Mapping[str, PruningPlan | Method]) -> None:
    for name, plan in plans.items():
        try:
            check_plan(base, plan)
        except ValueError as error:
            raise PlanError(
                f"plan named {name!r} does not fit this model: {error}; all plans of one "
                "checkpoint must fit it: change this one or leave it out"
            ) from error


def plan_of(model: nn.Module) -> PruningPlan | Method | None:
    """The plan or peer that a model runs with; None if it has none."""
    base = base_model(model)
    if (plan := attached_plan(base)) is not None:
        return plan
    data = getattr(base.config, CONFIG_FIELD, None)
    if data is not None and not from_dict(data).stages:
        return from_dict(data)
    return None


def attached_plan(base: nn.Module) -> PruningPlan | Method | None:
    """The plan or method whose hooks are on a model; its config may say something else."""
    hooks = base._forward_pre_hooks.values()
    return next((hook.plan for hook in hooks if isinstance(hook, EnterModel)), None)


def _has_full_logits(base: nn.Module) -> bool:
    hooks = base._forward_pre_hooks.values()
    return any(isinstance(hook, EnterModel) and hook.full for hook in hooks)


def base_model(model: Any) -> Any:
    """The transformers model inside wrappers that keep it under a known name."""
    if hasattr(model, "get_base_model"):  # peft
        return base_model(model.get_base_model())
    for wrapped in ("module", "_orig_mod"):  # DDP and DeepSpeed; torch.compile
        if isinstance(inner := getattr(model, wrapped, None), nn.Module):
            return base_model(inner)
    return model


def _remove_hooks(base: Any) -> None:
    """By type rather than by handle: handles don't survive copies of a model."""
    for module in base.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _HOOKS)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_with_kwargs.pop(key, None)
