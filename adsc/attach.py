"""Attach a pruning plan to a model, take it off again, or ask for it.

Attaching installs hooks on a transformers model as it is and writes the plan into its config; it
makes no subclass, replaces no method and keeps no state of a call.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from adsc.decoders import bare, check_attention, check_decoder, gathered
from adsc.drop import (
    EnterDecoder,
    EnterLayer,
    EnterModel,
    EnterVision,
    LeaveModel,
    LeaveVision,
)
from adsc.families import Family, find_family
from adsc.method import Method, MethodHook, from_dict
from adsc.plan import PlanError, PruningPlan, as_plan

CONFIG_FIELD = "adsc"  # where the plan stands in a checkpoint's config.json
_HOOKS = (EnterModel, EnterDecoder, EnterLayer, EnterVision, LeaveModel, LeaveVision, MethodHook)
M = TypeVar("M", bound=nn.Module)


def attach(
    model: M,
    plan: PruningPlan | Method | str | Iterable[tuple[int, float]],
    *,
    logits: str = "kept",
) -> M:
    """Make a model drop vision tokens by a plan or a method, in place.

    Attaching again replaces the plan; an empty plan installs no hook at all. The plan is saved with
    the model's config.

    Args:
        model: a multimodal transformers model, also inside PEFT, DDP or torch.compile.
        plan: a plan, its text form, pairs (layer, keep), or a method from `adsc.peers.make`.
        logits: `kept` computes logits of the tokens that are left; `full` hands out as many as
            there are columns, for a caller that pairs them with columns from the front: a dropped
            one has those of the last before it that was kept. Not saved with the model.

    Returns:
        The same model.

    Raises:
        UnsupportedModel: the architecture is not one of those that are known.
        PlanError: the plan does not fit the model.
    """
    if logits not in ("kept", "full"):
        raise PlanError(f"logits {logits!r} is unknown; choose one of kept, full")
    plan = plan if isinstance(plan, Method) else as_plan(plan)
    base = base_model(model)
    family, inner = find_family(base)
    decoder = family.decoder(inner)
    check_decoder(decoder)
    if isinstance(plan, Method) and plan.reads_attention:
        check_attention(plan.name, decoder)
    layers = [gathered(layer) for layer in decoder.layers]
    plan.check_layers(len(layers))
    _check_family(family, base.config, plan)
    _remove_hooks(base)
    setattr(base.config, CONFIG_FIELD, plan.to_dict())
    if not plan.stages:
        return model
    at = [layer for layer, _ in plan.stages]
    drops = tuple(sum(layer <= number for layer in at) - 1 for number in range(len(layers)))
    for module, path in {id(base): (base, "model"), id(inner): (inner, "")}.values():
        names = tuple(inspect.signature(bare(module).forward).parameters)
        path = "" if module is inner else path
        head = "none" if module is inner else _head_of(base)
        enter = EnterModel(family, plan, path, names, head, logits == "full")
        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(LeaveModel(drops, module is inner), with_kwargs=True)
    for part in inner.children():
        if part is not decoder:
            part.register_forward_pre_hook(EnterVision(), with_kwargs=True)
            part.register_forward_hook(LeaveVision(), with_kwargs=True)
    for number, layer in enumerate(layers):
        hook = EnterLayer(number, drops[number], number in at)
        layer.register_forward_pre_hook(hook, with_kwargs=True)
    if isinstance(plan, Method):
        if at[0] == 0:
            decoder.register_forward_pre_hook(EnterDecoder(), with_kwargs=True)
        plan.install(inner)
    return model


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
    """Take the plan off a model, in place; the model is what it was.

    Nothing of this package is left to see a later call, so a cache that was filled under the plan
    must not be continued without it.
    """
    base = base_model(model)
    _remove_hooks(base)
    if hasattr(base.config, CONFIG_FIELD):
        delattr(base.config, CONFIG_FIELD)
    return model


def plan_of(model: nn.Module) -> PruningPlan | Method | None:
    """The plan or method that a model runs with; None if it has none."""
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
