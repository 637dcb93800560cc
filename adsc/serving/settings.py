"""What a checkpoint's config asks of a serving engine: its plan, and what that leaves of an image.

A plan with d drops cuts the decoder into parts 0..d; a token that is dropped before a layer is gone
in that layer's part and in all later ones. The parts are fixed when a checkpoint is loaded; an
image's tokens follow from its size where a family cuts pictures into crops. What can't be served as
it was trained is refused by name: served without its plan, a checkpoint answers otherwise, without
a warning.

Legend: n vision tokens of one image, P parts of the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from adsc.families.family import Image, side_of
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
DECODERS = ("llama", "qwen2")
SERVED = ("llava", "llava_next", "llava_onevision")
"""Families, by `model_type`."""
BOUND = "anyres_max_9"
PIECES = 3
"""Of an image that has crops: overview, crops and row ends, which no mean mixes."""


class UnservedPlan(ValueError):
    """A checkpoint or a setting that the engine can't serve as it was trained."""


@dataclass(frozen=True)
class Layout:
    """What a plan does to one image.

    Args:
        gone: (P, n) bool, which of its tokens are gone in each part.
        groups: for each part, the groups whose means enter it; none for drops, part 0 and an exit.
    """

    gone: np.ndarray
    groups: tuple[tuple[Group, ...], ...]


@lru_cache(maxsize=256)
def _layout(text: str, at: tuple[int, ...], image: Image) -> Layout:
    plan, parts = PruningPlan.parse(text), len(at) + 1
    gone = np.zeros((parts, image.tokens), dtype=bool)
    entering: list[tuple[Group, ...]] = [()] * parts
    given = (image.tokens, image.lattice, image.regions)
    kept = plan.kept_indices(*given)
    groups = plan.groups(*given) if plan.pool is not None else [()] * len(kept)
    for (layer, _), left, own in zip(plan.stages, kept, groups, strict=True):
        first = at.index(layer) + 1
        gone[first:] = True
        gone[first:, list(left)] = False
        entering[first] = own
    return Layout(gone, tuple(entering))


@dataclass(frozen=True)
class ServedPlan:
    """A plan at work in a decoder.

    Args:
        text: the plan, in its text form; empty for dense.
        layers: of the decoder.
        image: tokens and lattice of one image; the usual one, where they follow from its size.
        at: the layers at which parts 1.. begin; the plan drops at some of them.
        by_size: the config of a family whose images are as large as their pictures ask for.
        choices: plans that a request may name instead. They drop at layers where parts begin, so
            they need no other parts.
    """

    text: str
    layers: int
    image: Image
    at: tuple[int, ...]
    by_size: Any = None
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

    def layout(self, image: Image) -> Layout:
        """What the plan does to an image."""
        return _layout(self.text, self.at, image)

    def image_of(self, inputs: Mapping[str, Any]) -> Image:
        """The image that a model's inputs bring, of one picture."""
        return self.image if self.by_size is None else _image(self.by_size, inputs)

    @property
    def most(self) -> int:
        """No image has more tokens."""
        return self.image.tokens if self.by_size is None else _most(self.by_size)

    @property
    def pools(self) -> bool:
        """Whether an image's tokens must be computed in one step, for their means."""
        return any(self.layout(self.image).groups)

    def too_few(self, tokens: int) -> bool:
        """Whether an image of so many tokens may have more pieces than means are left of it."""
        if not self.pools or self.by_size is None:
            return False
        return any(0 < left < PIECES for left in self.plan.tokens_after_drops(tokens))

    @property
    def keeps_last(self) -> bool:
        """Whether an image's last token reaches the end of the decoder, whatever its size."""
        if self.by_size is not None:
            return not self.plan.stages
        return not self.layout(self.image).gone[-1, -1]


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
    layers = config.text_config.num_hidden_layers
    image = _image(config, _picture(config))
    plan.check_layers(layers)
    at = tuple(layer for layer, _ in plan.stages)
    by_size = None if config.model_type == "llava" else config
    choices = {
        name: ServedPlan(str(other), layers, image, at, by_size)
        for name, other in ((NO_PLAN, PruningPlan()), *names_in(config).items())
        if isinstance(other, PruningPlan)
        and other.positions == "keep"
        and {layer for layer, _ in other.stages} <= set(at)
    }
    found = ServedPlan(str(plan), layers, image, at, by_size, choices)
    for one in (found, *choices.values()):
        one.layout(image)  # a plan that doesn't fit the image fails here, at load
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
    """Raise UnservedPlan for a model that is no LLaVA, or whose parts the engine doesn't know."""
    names = {family.model_type: family.name for family in FAMILIES}
    name = names.get(config.model_type, config.model_type)
    if config.model_type not in SERVED:
        raise UnservedPlan(
            f"{name} with a pruning plan is not served on vLLM yet, only "
            f"{', '.join(names[it] for it in SERVED)} are: serve it through transformers, or "
            f"{DENSE}"
        )
    tower, decoder = config.vision_config.model_type, config.text_config.model_type
    if tower not in TOWERS or decoder not in DECODERS:
        raise UnservedPlan(
            f"{name} with a {tower} and a {decoder} decoder is not served with a pruning plan: the "
            f"tower may be {' or '.join(TOWERS)}, the decoder {' or '.join(DECODERS)}"
        )
    if window := _window(config.text_config):
        raise UnservedPlan(
            f"a decoder with a sliding window of {window} tokens is not "
            "served with a pruning plan: windows count tokens that were dropped"
        )
    bound = getattr(config, "vision_aspect_ratio", BOUND)
    if bound != BOUND:
        raise UnservedPlan(
            f"{name} with vision_aspect_ratio = {bound!r} is not served with a pruning plan: "
            f"vLLM counts tokens by {BOUND!r} alone"
        )


def _window(text_config: Any) -> int | None:
    """Qwen2 writes a window down that it doesn't use."""
    if not getattr(text_config, "use_sliding_window", True):
        return None
    return getattr(text_config, "sliding_window", None)


def _image(config: Any, inputs: Mapping[str, Any]) -> Image:
    """The one image that inputs bring, as the model's own family counts it."""
    (family,) = (it for it in FAMILIES if it.model_type == config.model_type)
    found = family.placeholders[0].images(config, inputs)
    assert isinstance(found, list)
    (image,) = found
    return image


def _picture(config: Any) -> dict[str, Any]:
    """Inputs of a usual picture. LLaVA-1.5 makes all of them the tower's own square; the
    others cut one of twice its side into four crops."""
    side = config.vision_config.image_size
    found: dict[str, Any] = {"pixel_values": torch.empty(1, 3, side, side, device="meta")}
    if config.model_type != "llava":
        found["image_sizes"] = [[2 * side, 2 * side]]
    return found


def _most(config: Any) -> int:
    """Tokens of a picture that fills its crops. Where these are too many they shrink, unless they
    are a tenth more along a side at most."""
    tile, side = config.vision_config.image_size, side_of(config)
    grids = [(h // tile * side, w // tile * side) for h, w in config.image_grid_pinpoints]
    most = max(rows * (columns + 1) for rows, columns in grids)
    if config.model_type == "llava_onevision":
        bound = int(1.21 * int(BOUND.removeprefix("anyres_max_")) * side**2)
        most = min(most, bound + max(rows for rows, _ in grids))
    return side**2 + most
