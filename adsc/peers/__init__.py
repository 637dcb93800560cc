"""The peers of the plan: published ways to drop vision tokens, and trivial ones, at equal budgets.

`make` fits a method to a layer average, and `adsc.attach` accepts it like a plan. Each method is
one file, written from its paper's formula; docs/peers.md has the differences from the papers.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from adsc.attachment.attach import base_model
from adsc.families.family import ImageInput
from adsc.families.table import find_family, image_cost
from adsc.method import Budget, Method, as_fraction
from adsc.peers import (
    dart,
    divprune,
    downsample,
    fastv,
    pool,
    pyramiddrop,
    random,
    sparsevlm,
    stride,
    tome,
    visionzip,
)
from adsc.plan import PlanError, PruningPlan

_FIT: dict[str, Callable[..., Method | PruningPlan]] = {
    "stride": stride.fit,
    "random": random.Random.fit,
    "pool": pool.Pool.fit,
    "fastv": fastv.FastV.fit,
    "pyramiddrop": pyramiddrop.PyramidDrop.fit,
    "sparsevlm": sparsevlm.SparseVLM.fit,
    "visionzip": visionzip.VisionZip.fit,
    "dart": dart.DART.fit,
    "divprune": divprune.DivPrune.fit,
    "tome": tome.ToMe.fit,
    "downsample": downsample.Downsample.fit,
}
NAMES = tuple(_FIT)


def make(
    name: str,
    model: nn.Module,
    average: float,
    *,
    num_vision_tokens: int | None = None,
    tolerance: float = 0.01,
    **options: Any,
) -> Method | PruningPlan:
    """A method fitted to a layer average, for `adsc.attach`.

    Args:
        name: one of NAMES.
        model: the model to fit it to, also inside wrappers; it is not changed.
        average: vision tokens of one image that enter a decoder layer, mean over all layers.
        num_vision_tokens: of the image that `average` refers to; by default the model's number, at
            the family's usual size if sizes vary. Other images keep the same shares.
        tolerance: largest difference of the true average, relative to `average`.
        options: the method's own options; the defaults are the published values.

    Raises:
        PlanError: an unknown name or option, a value out of range, or an average that no setting
            reaches; the message names the nearest that can be reached.
        UnsupportedModel: an unknown family, or one that the method doesn't support.

    >>> method = make("fastv", model, average=7)  # doctest: +SKIP
    """
    check_name(name)
    fit = _FIT[name]
    known = [option for option in inspect.signature(fit).parameters if option != "budget"]
    if unknown := sorted(set(options) - set(known)):
        raise PlanError(
            f"options {', '.join(unknown)} of {name} are unknown; it has {', '.join(known)}"
        )
    base = base_model(model)
    family, inner = find_family(base)
    if num_vision_tokens is None:
        num_vision_tokens = image_cost(base.config, ImageInput()).tokens
    budget = Budget(
        average=as_fraction("average", average),
        tokens=num_vision_tokens,
        layers=len(family.decoder(inner).layers),
        tolerance=as_fraction("tolerance", tolerance),
        first=family.first_layer(base.config),
        axes=family.axes,
    )
    if not 0 < budget.average <= budget.tokens:
        raise PlanError(
            f"average {average} must be above 0 and at most {budget.tokens}, the vision tokens of "
            "an image in this model (num_vision_tokens says otherwise)"
        )
    method = fit(budget, **options)
    if isinstance(method, Method):
        method.check_family(family)
    true = method.average_tokens(budget.tokens, budget.layers)
    if abs(true - budget.average) > budget.tolerance * budget.average:
        raise PlanError(
            f"{name} can't average {average:g} of {budget.tokens} vision tokens over "
            f"{budget.layers} layers within {float(budget.tolerance):.2g} of it; the nearest it "
            f"reaches with these options is {true:.6g} ({method}). Ask for that, widen tolerance, "
            f"or change {', '.join(known)}{getattr(method, 'hint', '')}"
        )
    return method


def check_name(name: str) -> None:
    """Raise PlanError if there is no such method."""
    if name not in _FIT:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise PlanError(f"method {name!r} is unknown{hint}; choose one of {', '.join(NAMES)}")
