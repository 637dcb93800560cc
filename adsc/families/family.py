"""What a model family is to a plan: where its decoder is, which tokens are vision tokens, and what
an image costs.

A family holds names and small functions of a model's config and of one call's inputs, and no
behaviour of dropping.

What counts as one image, to be downsampled on its own: a picture, with all its any-resolution
crops (LLaVA-NeXT, LLaVA-OneVision); a tile, where tiles are pictures to the model (InternVL,
SmolVLM, Idefics3); a frame, or the frames that the model merged in time (Qwen), of a video.

Legend: B rows, S columns, n vision tokens of one image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adsc.errors import VisionTokenError
from adsc.tiles import Region

if TYPE_CHECKING:
    from torch import Tensor, nn

Inputs = Mapping[str, Any]
# On the output of a vision tower: the grids (t, h, w) and the (height, width) it was called with.
GRID, SIZE = "adsc_grid", "adsc_size"


@dataclass(frozen=True)
class Image:
    """One image, or one group of video frames: its tokens, and their h x w lattice if any.

    `regions` are the lattices of an image that has several (overview, crops, row ends): tokens of
    different regions are never averaged together.
    """

    tokens: int
    lattice: tuple[int, int] | None = None
    regions: tuple[Region, ...] = ()


# The images of a call in the order of their tokens, row by row; or the one kind that all are of,
# where their number is no matter of shapes.
Images = list[Image] | Image


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """What a family may need to know of an image.

    Attributes:
        size: (height, width) in pixels, None for the family's usual size.
        images_in_row: LLaVA-OneVision cuts an image into tiles only when it is alone in its row.
    """

    size: tuple[int, int] | None = None
    images_in_row: int = 1


@dataclass(frozen=True, kw_only=True)
class ImageCost:
    """One image: `tokens` vision tokens in the decoder, and MACs to make them, half of what
    torch's FlopCounterMode reports for the same work; `lattice` is the tokens' (height, width) if
    they lie on one."""

    tokens: int
    tower_macs: int
    projector_macs: int
    lattice: tuple[int, int] | None = None

    @property
    def macs(self) -> int:
        return self.tower_macs + self.projector_macs


@dataclass(frozen=True)
class Placeholder:
    """One id that marks vision tokens.

    Args:
        token: attribute of the config that holds the id.
        inputs: the names under which a call may carry what stands behind it.
        encoded: the key of its features in `mm_encoder_outputs`.
        images: the images that a call brings, from the model's config and the call's inputs.
        locate: gives these images the regions that are not known by shapes alone; it may read from
            the device.
    """

    token: str
    inputs: tuple[str, ...]
    encoded: str
    images: Callable[[Any, Inputs], Images]
    locate: Callable[[Any, Inputs, list[Image]], list[Image]] | None = None

    def given(self, inputs: Inputs) -> bool:
        """Whether a call brings any; without, the id is plain text to a model."""
        return any(inputs.get(name) is not None for name in self.inputs) or (
            features_of(inputs, self.encoded) is not None
        )


def _causal(inputs: Inputs, past: int, width: int) -> Tensor | None:
    return None


def _any_layer(config: Any) -> int:
    return 0


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    Args:
        name: as in the documentation.
        model_type: `config.model_type` of its models.
        placeholders: its kinds of vision tokens.
        cost: what one image costs, from the config and what is known of the image.
        text_model: attribute of the inner model (`model.model`) that holds the decoder.
        blocks: (B, S) number of the block in which each column attends both ways, -1 for none;
            None where attention is causal.
        window_cuts_blocks: whether a sliding window also cuts attention inside a block.
        first_layer: the first decoder layer before which a drop may be, from the config.
        axes: how many position ids a token has.
        rotary_by_layer_type: whether full and sliding layers turn differently.
    """

    name: str
    model_type: str
    placeholders: tuple[Placeholder, ...]
    cost: Callable[[Any, ImageInput], ImageCost]
    text_model: str = "language_model"
    blocks: Callable[[Inputs, int, int], Tensor | None] = _causal
    window_cuts_blocks: bool = False
    first_layer: Callable[[Any], int] = _any_layer
    axes: int = 1
    rotary_by_layer_type: bool = False

    def decoder(self, model: nn.Module) -> Any:
        """The text model inside the inner model: it has `layers`, `rotary_emb` and a `config`."""
        return getattr(model, self.text_model)

    def vision(
        self, model: nn.Module, inputs: Inputs, regions: bool = False
    ) -> list[tuple[Tensor, Images]]:
        """For each kind of vision token that a call brings: its columns (B, S) bool, its images;
        with all their `regions` if a plan averages over these."""
        config = model.config
        found: list[tuple[Tensor, Images]] = []
        for kind in self.placeholders:
            if not kind.given(inputs):
                continue
            columns = columns_of(model, inputs, getattr(config, kind.token))
            images = kind.images(config, inputs)
            if regions and kind.locate is not None and isinstance(images, list):
                images = kind.locate(config, inputs, images)
            if images:
                found.append((columns, images))
        return found


def columns_of(model: nn.Module, inputs: Inputs, token: int) -> Tensor:
    """(B, S) bool: where a token is; found by its embedding if a call has no ids."""
    import torch

    if (ids := inputs.get("input_ids")) is not None:
        return ids == token
    embeds = inputs["inputs_embeds"]
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    place = table(torch.full((), token, dtype=torch.long, device=embeds.device))
    return (embeds == place.to(embeds.dtype)).all(-1)


def features_of(inputs: Inputs, kind: str) -> Any:
    """What `generate` has encoded beforehand, since transformers 5.2x."""
    encoded = inputs.get("mm_encoder_outputs")
    return encoded.get(kind) if isinstance(encoded, Mapping) else None


def encoded_images(inputs: Inputs) -> list[Image]:
    """One image for each (n, D) of the encoded features."""
    output = whole(features_of(inputs, "image"))
    return [Image(len(features)) for features in output.pooler_output]


def whole(output: Any) -> Any:
    """Refuse features that chunked prefill has cut: where an image begins is lost."""
    if not hasattr(output, SIZE):
        raise VisionTokenError(
            "images were encoded before this call, but not by this model's vision tower, or cut "
            "into chunks since; pass pixel values, and leave prefill_chunk_size out of `generate`"
        )
    return output


def pixels_of(inputs: Inputs) -> tuple[int, int, int]:
    """Number, height and width of a call's images."""
    if (pixels := inputs.get("pixel_values")) is not None:
        return pixels.shape[0], pixels.shape[-2], pixels.shape[-1]
    output = whole(features_of(inputs, "image"))
    return (len(output.pooler_output), *getattr(output, SIZE))


def rows_of(given: Any) -> list[Any]:
    """Numbers of a call's images as lists, from a tensor, or from one for each image."""
    from torch import Tensor

    if isinstance(given, Tensor):
        return given.tolist()
    return [one.tolist() if hasattr(one, "tolist") else one for one in given]


def side_of(config: Any) -> int:
    """Patches along a side of the vision tower's own square."""
    return config.vision_config.image_size // config.vision_config.patch_size


def square(n: int) -> tuple[int, int] | None:
    """The square lattice of n tokens, if there is one."""
    side = math.isqrt(n)
    return (side, side) if side**2 == n else None


def image_kind(
    images: Callable[[Any, Inputs], Images],
    locate: Callable[[Any, Inputs, list[Image]], list[Image]] | None = None,
) -> Placeholder:
    return Placeholder("image_token_id", ("pixel_values",), "image", images, locate)


def video_kind(images: Callable[[Any, Inputs], Images]) -> Placeholder:
    return Placeholder("video_token_id", ("pixel_values_videos",), "video", images)
