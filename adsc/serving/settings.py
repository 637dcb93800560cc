"""What a checkpoint's config asks of a serving engine: its plan, for images of one known size.

A plan with d drops cuts the decoder into parts 0..d; a token that is dropped before a layer is gone
in that layer's part and in all later ones. Everything here is fixed when a checkpoint is loaded.
What can't be served as it was trained is refused by name: served without its plan, a checkpoint
answers otherwise, without a warning.

Legend: n vision tokens of one image, P parts of the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from adsc.families.family import Image
from adsc.families.table import FAMILIES
from adsc.method import Method, from_dict
from adsc.named import DENSE as NO_PLAN
from adsc.named import find_plan, names_in
from adsc.plan import PruningPlan
from adsc.tiles import Group

FIELD = "adsc"
"""Where the plan stands in config.json; a string there names one of the checkpoint's plans."""
DENSE = 'dense, with --hf-overrides \'{"adsc": "dense"}\''
"""The way out of every refusal."""
TOWERS = ("clip_vision_model", "siglip_vision_model")
DECODERS = ("llama",)


class UnservedPlan(ValueError):
    """A checkpoint or a setting that the engine can't serve as it was trained."""


@dataclass(frozen=True)
class ServedPlan:
    """A plan at work in a decoder, for images that all have as many tokens.

    Args:
        text: the plan, in its text form; empty for dense.
        layers: of the decoder.
        image: tokens and lattice of one image.
        at: the layers at which parts 1.. begin; the plan drops at some of them.
        choices: plans that a request may name instead. They drop at layers where parts begin, so
            they need no other parts.
    """

    text: str
    layers: int
    image: Image
    at: tuple[int, ...]
    choices: Mapping[str, ServedPlan] = field(default_factory=dict)

    @cached_property
    def plan(self) -> PruningPlan:
        return PruningPlan.parse(self.text)

    @property
    def parts(self) -> int:
        return len(self.at) + 1

    @cached_property
    def part_of(self) -> tuple[int, ...]:
        """The part in which each decoder layer lies."""
        return tuple(sum(layer <= number for layer in self.at) for number in range(self.layers))

    @cached_property
    def gone(self) -> np.ndarray:
        """(P, n) bool: which tokens of an image are gone in each part."""
        mask = np.zeros((self.parts, self.image.tokens), dtype=bool)
        image = self.image
        kept = self.plan.kept_indices(image.tokens, image.lattice, image.regions)
        for (layer, _), left in zip(self.plan.stages, kept, strict=True):
            first = self.at.index(layer) + 1
            mask[first:] = True
            mask[first:, list(left)] = False
        return mask

    @cached_property
    def groups(self) -> list[tuple[Group, ...]]:
        """For each part, the groups whose means enter it; none for drops, part 0 and an exit."""
        found: list[tuple[Group, ...]] = [()] * self.parts
        if self.plan.pool is not None:
            image = self.image
            groups = self.plan.groups(image.tokens, image.lattice, image.regions)
            for (layer, _), own in zip(self.plan.stages, groups, strict=True):
                found[self.at.index(layer) + 1] = own
        return found

    @property
    def pools(self) -> bool:
        """Whether an image's tokens must be computed in one step, for their means."""
        return any(self.groups)

    @property
    def keeps_last(self) -> bool:
        """Whether an image's last token reaches the end of the decoder."""
        return not self.gone[-1, -1]


def served_plan(config: Any) -> ServedPlan | None:
    """The plan of a checkpoint by its transformers config; None if it drops nothing.

    Raises:
        UnservedPlan: a family, decoder, tower, method or plan that the engine can't serve.
        PlanError: a plan that is malformed or doesn't fit the decoder.
    """
    plan = plan_in(config)
    if plan is None:
        return None
    check_family(config)
    layers, image = config.text_config.num_hidden_layers, _image(config)
    plan.check_layers(layers)
    at = tuple(layer for layer, _ in plan.stages)
    choices = {
        name: ServedPlan(str(other), layers, image, at)
        for name, other in ((NO_PLAN, PruningPlan()), *names_in(config).items())
        if isinstance(other, PruningPlan)
        and other.positions == "keep"
        and {layer for layer, _ in other.stages} <= set(at)
    }
    found = ServedPlan(str(plan), layers, image, at, choices)
    for one in (found, *choices.values()):
        _ = one.gone, one.groups  # a plan that doesn't fit the image fails here, at load
    return found


def plan_in(config: Any) -> PruningPlan | None:
    """The plan that a config asks for; None for dense. Of any family."""
    data = getattr(config, FIELD, None)
    if not data:
        return None
    plan = find_plan(data, config) if isinstance(data, str) else from_dict(dict(data))
    if not plan.stages:
        return None
    if isinstance(plan, Method):
        raise UnservedPlan(
            f"this checkpoint drops tokens by {plan.name}, which looks at them: vLLM serves "
            f"pruning plans only; serve it through transformers, or {DENSE}"
        )
    if plan.positions != "keep":
        raise UnservedPlan(
            f"plan {str(plan)!r} renumbers positions after a drop, which is not served on vLLM: "
            "train with positions=keep, the default"
        )
    return plan


def check_family(config: Any) -> None:
    """Raise UnservedPlan for a model that is no LLaVA-1.5 with a LLaMA decoder."""
    if config.model_type != "llava":
        names = {family.model_type: family.name for family in FAMILIES}
        name = names.get(config.model_type, config.model_type)
        raise UnservedPlan(
            f"{name} with a pruning plan is not served on vLLM yet, only LLaVA-1.5 is: serve it "
            f"through transformers, or {DENSE}"
        )
    tower, decoder = config.vision_config.model_type, config.text_config.model_type
    if tower not in TOWERS or decoder not in DECODERS:
        raise UnservedPlan(
            f"LLaVA with a {tower} and a {decoder} decoder is not served with a pruning plan: the "
            f"tower may be {' or '.join(TOWERS)}, the decoder {' or '.join(DECODERS)}"
        )
    if getattr(config.text_config, "sliding_window", None):
        raise UnservedPlan(
            f"a decoder with a sliding window of {config.text_config.sliding_window} tokens is not "
            "served with a pruning plan: windows count tokens that were dropped"
        )


def _image(config: Any) -> Image:
    """One image as the model's own family counts it, by the tower's own square."""
    (family,) = (it for it in FAMILIES if it.model_type == config.model_type)
    side = config.vision_config.image_size
    pixels = torch.empty(1, 3, side, side, device="meta")
    found = family.placeholders[0].images(config, {"pixel_values": pixels})
    assert isinstance(found, list)
    return found[0]
