"""What differs between model families, in one table: where the decoder is, and which tokens are
vision tokens.

A row holds paths and small functions of the model's config and of one call's inputs. It
deliberately holds no behaviour of dropping: a new family is a row here and a row in the tests.

Legend: B rows, S columns, n vision tokens of one image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Any]


class UnsupportedModel(TypeError):
    """The model is of no family in the table, or is arranged in a way that dropping can't serve."""


class VisionTokenError(ValueError):
    """Vision tokens and images (or video frames) of a call can't be reconciled."""


@dataclass(frozen=True)
class Image:
    """One image, or one group of video frames: its tokens, and their h x w lattice if any."""

    tokens: int
    lattice: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    Args:
        name: as in the documentation.
        model_type: `config.model_type` of its models.
        text_model: attribute of the inner model (`model.model`) that holds the decoder.
        token_ids: ids in `input_ids` that stand for one vision token each, from the config.
        images: the images of a call in the order of their tokens, from the config and the call's
            inputs.
        inputs: the names under which a call carries images; none of them given means no vision
            tokens.
    """

    name: str
    model_type: str
    text_model: str
    token_ids: Callable[[Any], tuple[int, ...]]
    images: Callable[[Any, Inputs], list[Image]]
    inputs: tuple[str, ...] = ("pixel_values",)

    def decoder(self, model: nn.Module) -> Any:
        """The text model inside the inner model: it has `layers`, `rotary_emb` and a `config`."""
        return getattr(model, self.text_model)

    def has_images(self, inputs: Inputs) -> bool:
        """Whether a call brings images; without any, placeholder ids are plain text to a model."""
        return any(inputs.get(name) is not None for name in self.inputs) or any(
            output is not None for output in (inputs.get("mm_encoder_outputs") or {}).values()
        )

    def vision_mask(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """(B, S) bool: which columns are vision tokens, by id, or by embedding without ids."""
        ids = self.token_ids(model.config)
        if (input_ids := inputs.get("input_ids")) is not None:
            return _any(input_ids == token for token in ids)
        embeds = inputs["inputs_embeds"]
        table = model.get_input_embeddings()  # type: ignore[operator]
        places = (
            table(torch.tensor(token, device=embeds.device)).to(embeds.dtype) for token in ids
        )
        return _any((embeds == place).all(-1) for place in places)


def _any(masks: Iterable[Tensor]) -> Tensor:
    first, *rest = masks
    for mask in rest:
        first = first | mask
    return first


def _encoded(inputs: Inputs) -> list[Image] | None:
    """Images whose features `generate` has computed beforehand: one (n, D) tensor each."""
    output = (inputs.get("mm_encoder_outputs") or {}).get("image")
    if output is None:
        return None
    return [Image(features.shape[0]) for features in output.pooler_output]


def _square(tokens: int, height: int, width: int) -> Image:
    return Image(tokens, (height, width) if tokens == height * width else None)


def _llava_images(config: Any, inputs: Inputs) -> list[Image]:
    """A fixed patch grid; the tower's class token goes (`default`) or stays (`full`)."""
    if (pixels := inputs.get("pixel_values")) is None:
        return _encoded(inputs) or []
    patch = config.vision_config.patch_size
    if (
        sizes := inputs.get("image_sizes")
    ) is not None:  # towers of native resolution, such as Pixtral's
        grids = [(int(h) // patch, int(w) // patch) for h, w in torch.as_tensor(sizes).tolist()]
        return [Image(h * w, (h, w)) for h, w in grids]
    strategy = inputs.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
    has_class_token = "clip" in config.vision_config.model_type
    height, width = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    tokens = height * width + has_class_token - (strategy == "default")
    return [_square(tokens, height, width)] * pixels.shape[0]


FAMILIES: tuple[Family, ...] = (
    Family(
        name="LLaVA-1.5",
        model_type="llava",
        text_model="language_model",
        token_ids=lambda config: (config.image_token_id,),
        images=_llava_images,
    ),
)


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
        f"{type(model).__name__} with config.model_type {model_type!r} is of no known family; "
        f"looked for {looked_for}. "
        "A new family is a row in adsc/families.py."
    )
