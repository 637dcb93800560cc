"""The plan travels with whatever is saved of a model, and is in force, or warned of, wherever
something that holds one is loaded or built.

A plan is stored in a checkpoint's config.json, and in an adapter's adapter_config.json under the
same name; plain transformers and PEFT ignore it. transformers and PEFT have no hook for what
happens on their own paths (the Auto classes, pipelines, `Trainer` checkpoints, `from_config`,
`PeftModel.from_pretrained`), so a handful of their methods are wrapped once both are imported:
`import adsc` alone imports neither. No weight is read or written here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from adsc.attachment.after_import import after_import
from adsc.method import from_dict
from adsc.named import CONFIG_FIELD as FIELD
from adsc.named import PLANS_FIELD, names_in


class PlanWarning(UserWarning):
    """What is saved or loaded differs from what the model does."""


def keep_plans() -> None:
    """Wrap methods of transformers and PEFT, each as soon as it is imported; again is no more."""
    after_import("transformers.modeling_utils", _wrap_models)
    after_import("transformers.integrations.peft", _wrap_adapters)
    after_import("peft", _wrap_peft)


def _wrap_models(modeling: ModuleType) -> None:
    _wrap(modeling.PreTrainedModel, "post_init", _after_building)
    _wrap(modeling.PreTrainedModel, "save_pretrained", _around_saving)
    _wrap_class_method(modeling.PreTrainedModel, "from_pretrained", _after_loading)


def _wrap_adapters(integration: ModuleType) -> None:
    _wrap(integration.PeftAdapterMixin, "load_adapter", _around_loading)


def _wrap_peft(peft: ModuleType) -> None:
    _wrap(peft.config.PeftConfigMixin, "to_dict", _with_plan)
    _wrap(peft.PeftModel, "save_pretrained", _around_saving)
    _wrap(peft.PeftModel, "load_adapter", _around_loading)
    _wrap_class_method(peft.config.PeftConfigMixin, "from_peft_type", _without_plan)


def _wrap(owner: Any, name: str, around: Callable[[Any], Any]) -> None:
    method = getattr(owner, name)
    if not hasattr(method, "adsc_wraps"):
        setattr(owner, name, _marked(wraps(method)(around(method))))


def _wrap_class_method(owner: Any, name: str, around: Callable[[Any], Any]) -> None:
    method = getattr(owner, name).__func__
    if not hasattr(method, "adsc_wraps"):
        setattr(owner, name, classmethod(_marked(wraps(method)(around(method)))))


def _marked(method: Any) -> Any:
    method.adsc_wraps = True
    return method


def _after_building(post_init: Any) -> Any:
    """A model that is built from a config with a plan drops by it: it would be saved with it."""

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        post_init(self, *args, **kwargs)
        _attach_own(self)

    return build


def _after_loading(load: Any) -> Any:
    """A model was trained to live with its checkpoint's plan, so it is loaded with it."""

    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        loaded = load(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        _attach_own(model)
        if getattr(model.config, PLANS_FIELD, None) is not None:
            from adsc.attachment.attach import check_named_plans

            check_named_plans(model)
        return loaded

    return from_pretrained


def _attach_own(model: Any) -> None:
    """Attach the plan in a model's config, if there is one."""
    data = getattr(model.config, FIELD, None)
    if data is not None:
        from adsc.attachment.attach import attach

        attach(model, from_dict(data))


def _around_saving(save: Any) -> Any:
    """What is saved says what the model does."""

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        from adsc.attachment.attach import attached_plan, base_model

        base = base_model(self)
        plan, data = attached_plan(base), getattr(base.config, FIELD, None)
        if plan is not None:
            setattr(base.config, FIELD, plan.to_dict())
        elif data is not None and from_dict(data).stages:
            warnings.warn(
                f"{type(base).__name__} runs dense, but its config holds plan "
                f"{str(from_dict(data))!r}, by which what is saved now will drop when it is loaded:"
                " adsc.attach(model, plan) puts the plan in force, adsc.detach(model) takes it out",
                PlanWarning,
                stacklevel=3,
            )
        named = getattr(base.config, PLANS_FIELD, None)
        for config in (getattr(self, "peft_config", None) or {}).values():
            _note(config, FIELD, None if plan is None else plan.to_dict())
            _note(config, PLANS_FIELD, named)
        return save(self, *args, **kwargs)

    return save_pretrained


def _note(config: Any, field: str, data: Any) -> None:
    if data is not None:
        setattr(config, field, data)
    elif hasattr(config, field):
        delattr(config, field)


def _around_loading(load: Any) -> Any:
    """An adapter that was trained under a plan brings it to a dense base."""

    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = set(getattr(self, "peft_config", None) or {})
        loaded = load(self, *args, **kwargs)
        configs = getattr(self, "peft_config", None) or {}
        name = kwargs.get("adapter_name") or (args[1] if len(args) > 1 else None)
        fresh = set(configs) - before or {name or "default"}
        for one in fresh & set(configs):
            _apply(self, getattr(configs[one], FIELD, None))
            _name(self, getattr(configs[one], PLANS_FIELD, None))
        return loaded

    return load_adapter


def _apply(model: Any, data: Any) -> None:
    if data is None:
        return
    from adsc.attachment.attach import attach, attached_plan, base_model

    plan, base = from_dict(data), base_model(model)
    current = attached_plan(base)
    if current is None and getattr(base.config, FIELD, None) is None:
        attach(model, plan)
    elif current is None or current != plan:
        has = "is dense on purpose (an empty plan)" if current is None else f"drops by {current!s}"
        warnings.warn(
            f"the adapter was trained under plan {str(plan)!r}, but its base {has}; what it "
            "learned may not hold there: adsc.attach(model, plan) puts another plan in force",
            PlanWarning,
            stacklevel=4,
        )


def _name(model: Any, data: Any) -> None:
    """An adapter's named plans go to a base without any."""
    if data is None:
        return
    from adsc.attachment.attach import base_model, name_plans

    base = base_model(model)
    named, current = names_in({PLANS_FIELD: data}), names_in(base.config)
    if not current:
        name_plans(model, named)
    elif current != named:
        warnings.warn(
            f"the adapter was trained for the plans {', '.join(named)}, and its base has others, "
            f"{', '.join(current)}, which stay: adsc.name_plans(model, plans) changes them",
            PlanWarning,
            stacklevel=4,
        )


def _with_plan(to_dict: Any) -> Any:
    def with_plan(self: Any) -> dict[str, Any]:
        fields: dict[str, Any] = to_dict(self)
        plans = {field: getattr(self, field, None) for field in (FIELD, PLANS_FIELD)}
        return fields | {field: data for field, data in plans.items() if data is not None}

    return with_plan


def _without_plan(from_peft_type: Any) -> Any:
    """PEFT's configs know no plan: it is put on them once they are made."""

    def without_plan(cls: Any, **kwargs: Any) -> Any:
        plans = {field: kwargs.pop(field, None) for field in (FIELD, PLANS_FIELD)}
        config = from_peft_type(cls, **kwargs)
        for field, data in plans.items():
            _note(config, field, data)
        return config

    return without_plan
