"""What differs between model families, in one table: where the decoder is, and which tokens are
vision tokens.

A row holds names and small functions of a model's config and of one call's inputs. It deliberately
holds no behaviour of dropping: a new family is a row here and a row in the tests.

What counts as one image, to be downsampled on its own: a picture, with all its any-resolution
crops (LLaVA-NeXT, LLaVA-OneVision); a tile, where tiles are pictures to the model (InternVL,
SmolVLM, Idefics3); a frame, or the frames that the model merged in time (Qwen), of a video.

Legend: B rows, S columns, n vision tokens of one image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from adsc.tiles import Region

Inputs = Mapping[str, Any]
# On the output of a vision tower: the grids (t, h, w) and the (height, width) it was called with.
GRID, SIZE = "adsc_grid", "adsc_size"


class UnsupportedModel(TypeError):
    """The model is of no family in the table, or is arranged as dropping can't serve it."""


class VisionTokenError(ValueError):
    """Vision tokens and images (or video frames) of a call can't be reconciled."""


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


@dataclass(frozen=True)
class Placeholder:
    """One id that stands for vision tokens.

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
            _features(inputs, self.encoded) is not None
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
            columns = _columns(model, inputs, getattr(config, kind.token))
            images = kind.images(config, inputs)
            if regions and kind.locate is not None and isinstance(images, list):
                images = kind.locate(config, inputs, images)
            if images:
                found.append((columns, images))
        return found


def _columns(model: nn.Module, inputs: Inputs, token: int) -> Tensor:
    """(B, S) bool: where a token is; told from its embedding where a call has no ids."""
    if (ids := inputs.get("input_ids")) is not None:
        return ids == token
    embeds = inputs["inputs_embeds"]
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    place = table(torch.full((), token, dtype=torch.long, device=embeds.device))
    return (embeds == place.to(embeds.dtype)).all(-1)


def _features(inputs: Inputs, kind: str) -> Any:
    """What `generate` has encoded beforehand, since transformers 5.2x."""
    encoded = inputs.get("mm_encoder_outputs")
    return encoded.get(kind) if isinstance(encoded, Mapping) else None


def _encoded_images(inputs: Inputs) -> list[Image]:
    """One image for each (n, D) of the encoded features."""
    output = _whole(_features(inputs, "image"))
    return [Image(len(features)) for features in output.pooler_output]


def _whole(output: Any) -> Any:
    """Refuse features that chunked prefill has cut: where an image begins is lost."""
    if not hasattr(output, SIZE):
        raise VisionTokenError(
            "images were encoded before this call, but not by this model's vision tower, or cut "
            "into chunks since; pass pixel values, and leave prefill_chunk_size out of `generate`"
        )
    return output


def _pixels(inputs: Inputs) -> tuple[int, int, int]:
    """Number, height and width of a call's images."""
    if (pixels := inputs.get("pixel_values")) is not None:
        return pixels.shape[0], pixels.shape[-2], pixels.shape[-1]
    output = _whole(_features(inputs, "image"))
    return (len(output.pooler_output), *getattr(output, SIZE))


def _rows(given: Any) -> list[Any]:
    """Numbers of a call's images as lists, from a tensor, or from one for each image."""
    if isinstance(given, Tensor):
        return given.tolist()
    return [one.tolist() if hasattr(one, "tolist") else one for one in given]


def _side(config: Any) -> int:
    """Patches along a side of the vision tower's own square."""
    return config.vision_config.image_size // config.vision_config.patch_size


def _llava(config: Any, inputs: Inputs) -> Images:
    """A fixed patch grid; the tower's class token goes (`default`) or stays (`full`)."""
    patch = config.vision_config.patch_size
    if (sizes := inputs.get("image_sizes")) is not None:  # towers of native resolution (Pixtral)
        grids = [(int(h) // patch, int(w) // patch) for h, w in _rows(sizes)]
        return [Image(h * w, (h, w)) for h, w in grids]
    strategy = inputs.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
    has_class_token = "clip" in config.vision_config.model_type
    if config.vision_config.model_type == "pixtral":  # encoded beforehand
        return _encoded_images(inputs)
    number, height, width = _pixels(inputs)
    height, width = height // patch, width // patch
    tokens = height * width + has_class_token - (strategy == "default")
    if tokens == height * width:
        return [Image(tokens, (height, width))] * number
    before = tokens - height * width  # the class token
    regions = (Region(1, before, 0, before), Region(height, width, before, width))
    return [Image(tokens, None, regions if before > 0 else ())] * number


def _llava_next(config: Any, inputs: Inputs) -> Images:
    """Any resolution: an overview, then crops without their padding, a newline after each row."""
    if inputs.get("pixel_values") is None:
        return _encoded_images(inputs)
    sizes = _rows(inputs["image_sizes"])
    return [_anyres(config, size, None) for size in sizes]


def _llava_onevision(config: Any, inputs: Inputs) -> Images:
    """As LLaVA-NeXT, with a bound on crops; several images in a sample may come without crops."""
    if inputs.get("pixel_values") is None:
        return _encoded_images(inputs)
    sizes = _rows(inputs["image_sizes"])
    numbers = inputs.get("batch_num_images")
    cropped = [True] * len(sizes)
    if numbers is not None:
        cropped = [n == 1 for n in _rows(numbers) for _ in range(n)]
    # The forward passes no aspect ratio on, so the config's is what counts.
    bound = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    return [
        _anyres(config, size, bound) if crops else _packed(_side(config), 0, 0)
        for size, crops in zip(sizes, cropped, strict=True)
    ]


def _anyres(config: Any, size: list[int], bound: int | None) -> Image:
    """One image of `size` (height, width), counted with transformers' own geometry."""
    tile, side = config.vision_config.image_size, _side(config)
    if image_size_to_num_patches(size, config.image_grid_pinpoints, tile) == 1:
        return _packed(side, 0, 0)
    rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, tile)
    height, width = unpad_image(torch.empty(0, rows * side, columns * side), size).shape[1:]
    if bound is not None:
        ratio = math.sqrt(height * width / (bound * side**2))
        if ratio > 1.1:
            height, width = int(height // ratio), int(width // ratio)
    return _packed(side, height, width)


def _packed(side: int, height: int, width: int) -> Image:
    """An overview, and what the model makes of all crops: one lattice with a token at the end of
    each row. Without crops one such token follows the overview."""
    start = side**2
    overview = Region(side, side, 0, side)
    if not height:
        return Image(start + 1, None, (overview, Region(1, 1, start, 1)))
    stride = width + 1
    ends = Region(height, 1, start + width, stride)
    regions = (overview, Region(height, width, start, stride), ends)
    return Image(start + height * stride, None, regions)


def _find_row_ends(config: Any, inputs: Inputs, images: list[Image]) -> list[Image]:
    """Regions of images that were encoded beforehand: `generate` forgets sizes, but all row ends
    equal an image's last token. One read from the device for all."""
    if _features(inputs, "image") is None or torch.compiler.is_compiling():
        return images
    features = _features(inputs, "image").pooler_output
    flags = torch.cat([(one == one[-1:]).all(-1) for one in features]).tolist()
    found, start = [], 0
    for image in images:
        ends = [at for at in range(image.tokens) if flags[start + at]]
        start += image.tokens
        width = ends[1] - ends[0] - 1 if len(ends) > 1 else 0
        packed = _packed(_side(config), len(ends) if width else 0, width)
        found.append(packed if packed.tokens == image.tokens else image)
    return found


def _llava_onevision_video(config: Any, inputs: Inputs) -> Images:
    """Frames pooled to half their side, and one newline at the end of a video."""
    side = math.ceil(_side(config) / 2)
    if (pixels := inputs.get("pixel_values_videos")) is not None:
        videos, frames = pixels.shape[:2]
    else:
        features = _whole(_features(inputs, "video")).pooler_output
        videos, frames = len(features), (features[0].shape[0] - 1) // side**2
    return ([Image(side**2, (side, side))] * frames + [Image(1, (1, 1))]) * videos


def _qwen(config: Any, inputs: Inputs) -> Images:
    return _qwen_grids(config, inputs, "image")


def _qwen_video(config: Any, inputs: Inputs) -> Images:
    return _qwen_grids(config, inputs, "video")


def _qwen_grids(config: Any, inputs: Inputs, kind: str) -> Images:
    """Native resolution: t x h x w patches, merged by squares in space."""
    merge = config.vision_config.spatial_merge_size
    if (given := inputs.get(f"{kind}_grid_thw")) is not None:
        grids = _rows(given)
    else:
        # Encoded beforehand: the tower's output tells the grids, in the order of distinct features
        # (beams share theirs).
        output = _whole(_features(inputs, kind))
        distinct = list({id(one): None for one in output.pooler_output})
        known = dict(zip(distinct, getattr(output, GRID), strict=True))
        grids = [known[id(one)] for one in output.pooler_output]
    return [
        Image(h * w // merge**2, (h // merge, w // merge)) for t, h, w in grids for _ in range(t)
    ]


def _internvl(config: Any, inputs: Inputs) -> Images:
    """Tiles of a fixed size, each shuffled to a quarter of its patches (`downsample_ratio`)."""
    number, _, width = _pixels(inputs)
    patch = config.vision_config.patch_size
    patch = patch if isinstance(patch, int) else patch[0]
    side = int(width // patch * config.downsample_ratio)
    return [Image(side**2, (side, side))] * number


def _idefics(config: Any, inputs: Inputs) -> Images:
    """Tiles between words; some of `pixel_values` only pad, so their number is not asked."""
    if inputs.get("pixel_values") is None:
        _whole(_features(inputs, "image"))
    side = _side(config) // config.scale_factor
    return Image(side**2, (side, side))


def _gemma(config: Any, inputs: Inputs) -> Images:
    """A fixed number of tokens, pooled from the patches."""
    side = math.isqrt(config.mm_tokens_per_image)
    return [Image(side**2, (side, side))] * _pixels(inputs)[0]


def _paligemma(config: Any, inputs: Inputs) -> Images:
    """One token for each patch."""
    return [Image(_side(config) ** 2, (_side(config), _side(config)))] * _pixels(inputs)[0]


def _gemma_blocks(inputs: Inputs, past: int, width: int) -> Tensor | None:
    """Each run of image tokens attends to itself both ways."""
    if (types := inputs.get("token_type_ids")) is None:
        return None
    image = types[:, -width:] == 1
    starts = image & ~nn.functional.pad(image, (1, 0))[:, :-1]
    return torch.where(image, starts.cumsum(1) - 1, -1)


def _paligemma_blocks(inputs: Inputs, past: int, width: int) -> Tensor | None:
    """The prefix, image and question, attends to itself both ways; the answer is causal."""
    types = inputs.get("token_type_ids")
    return None if types is None else torch.where(types[:, -width:] == 0, 0, -1)


def _deepstack_layers(config: Any) -> int:
    """Image features are added to all vision tokens after each of these layers."""
    return len(config.vision_config.deepstack_visual_indexes)


def _image(
    images: Callable[[Any, Inputs], Images],
    locate: Callable[[Any, Inputs, list[Image]], list[Image]] | None = None,
) -> Placeholder:
    return Placeholder("image_token_id", ("pixel_values",), "image", images, locate)


def _video(images: Callable[[Any, Inputs], Images]) -> Placeholder:
    return Placeholder("video_token_id", ("pixel_values_videos",), "video", images)


_QWEN = (_image(_qwen), _video(_qwen_video))

FAMILIES: tuple[Family, ...] = (
    Family(name="LLaVA-1.5", model_type="llava", placeholders=(_image(_llava),)),
    Family(
        name="LLaVA-NeXT",
        model_type="llava_next",
        placeholders=(_image(_llava_next, _find_row_ends),),
    ),
    Family(
        name="LLaVA-OneVision",
        model_type="llava_onevision",
        placeholders=(_image(_llava_onevision, _find_row_ends), _video(_llava_onevision_video)),
    ),
    Family(name="Qwen2-VL", model_type="qwen2_vl", placeholders=_QWEN, axes=3),
    Family(name="Qwen2.5-VL", model_type="qwen2_5_vl", placeholders=_QWEN, axes=3),
    Family(
        name="Qwen3-VL",
        model_type="qwen3_vl",
        placeholders=_QWEN,
        axes=3,
        first_layer=_deepstack_layers,
    ),
    Family(name="InternVL", model_type="internvl", placeholders=(_image(_internvl),)),
    Family(
        name="SmolVLM",
        model_type="smolvlm",
        placeholders=(_image(_idefics),),
        text_model="text_model",
    ),
    Family(
        name="Idefics3",
        model_type="idefics3",
        placeholders=(_image(_idefics),),
        text_model="text_model",
    ),
    Family(
        name="Gemma 3",
        model_type="gemma3",
        placeholders=(_image(_gemma),),
        blocks=_gemma_blocks,
        window_cuts_blocks=True,
        rotary_by_layer_type=True,
    ),
    Family(
        name="PaliGemma",
        model_type="paligemma",
        placeholders=(_image(_paligemma),),
        blocks=_paligemma_blocks,
    ),
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
        f"{type(model).__name__} with config.model_type {model_type!r} is of no known family; "
        f"looked for {looked_for}. A new family is a row in adsc/families.py."
    )
