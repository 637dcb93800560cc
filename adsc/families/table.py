"""What differs between model families: one file a family, in one table.

A new family is a file here, a row of `FAMILIES`, and a row in the tests (docs/extending.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adsc.errors import CostError, UnsupportedModel
from adsc.families.family import Family, ImageCost, ImageInput
from adsc.families.gemma3 import GEMMA3
from adsc.families.idefics3 import IDEFICS3, SMOLVLM
from adsc.families.internvl import INTERNVL
from adsc.families.llava import LLAVA
from adsc.families.llava_next import LLAVA_NEXT
from adsc.families.llava_onevision import LLAVA_ONEVISION
from adsc.families.paligemma import PALIGEMMA
from adsc.families.qwen import QWEN2_5_VL, QWEN2_VL, QWEN3_VL

if TYPE_CHECKING:
    from torch import nn

FAMILIES: tuple[Family, ...] = (
    LLAVA,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    QWEN2_VL,
    QWEN2_5_VL,
    QWEN3_VL,
    INTERNVL,
    SMOLVLM,
    IDEFICS3,
    GEMMA3,
    PALIGEMMA,
)


def first_legal_layer(config: Any) -> int:
    """The first decoder layer before which tokens may be dropped, from a whole model's config."""
    return next((f.first_layer(config) for f in FAMILIES if f.model_type == config.model_type), 0)


def find_family(model: nn.Module) -> tuple[Family, nn.Module]:
    """The family of a model and its inner model (the one that holds the decoder).

    Raises:
        UnsupportedModel: no row fits; the message lists what was looked for.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for family in FAMILIES:
        if family.model_type != model_type:
            continue
        for inner in (model, getattr(model, "model", None)):
            if hasattr(inner, family.text_model):
                return family, inner  # type: ignore[return-value]
    looked_for = ", ".join(
        f"{family.model_type} ({family.name}: model.{family.text_model}.layers)"
        for family in FAMILIES
    )
    raise UnsupportedModel(
        f"{type(model).__name__} with config.model_type {model_type!r} has no known family; "
        f"looked for {looked_for}. A new family is a file in adsc/families."
    )


def image_cost(config: Any, image: ImageInput) -> ImageCost:
    """Tokens and MACs of one image.

    Where a processor cuts an image into tiles that the model takes for images (InternVL, SmolVLM,
    Gemma 3's pan and scan), this is the cost of one tile.

    Raises:
        CostError: the family, or its vision tower, is not among those counted.
    """
    costs = {family.model_type: family.cost for family in FAMILIES}
    model_type = getattr(config, "model_type", None)
    if model_type not in costs:
        raise CostError(
            f"no exact cost for model type {model_type!r}: supported are {', '.join(sorted(costs))}"
        )
    return costs[model_type](config, image)
