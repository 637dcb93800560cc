"""What encoding one image costs, per model family: vision tower and projector, counted matmul by
matmul.

It reads configs and does integer arithmetic. It is not a profiler, builds no model and opens no
image: the size of the picture is all it needs, and only for families whose token count depends on
    it. Every count is in MACs
(multiply-accumulates) and equals half of what torch.utils.flop_counter.FlopCounterMode reports for
the same forward.

A family is one function and one row of `FAMILIES`.

Legend: n patches (tokens inside the tower), d width of the tower, m its MLP width, D width of the
    decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adsc.cost_error import CostError


@dataclass(frozen=True, kw_only=True)
class ImageCost:
    """One image, as the decoder sees it and as the tower pays for it.

    Attributes:
        spans: lengths of the runs of vision tokens that the image becomes; a plan downsamples each
            run on its own.
        tower_macs: patch embedding and encoder layers, all of them: transformers runs the whole
            tower even where `vision_feature_layer` picks an earlier layer.
        projector_macs: from the tower's features to the decoder's width.
    """

    spans: tuple[int, ...]
    tower_macs: int
    projector_macs: int

    @property
    def macs(self) -> int:
        return self.tower_macs + self.projector_macs


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """What the caller says of an image; a family uses what its token count depends on."""

    size: tuple[int, int] | None = None


def image_cost(config: Any, image: ImageInput) -> ImageCost:
    """Tokens and MACs of one image.

    Args:
        config: the transformers config of the whole model.
        image: size in pixels (height, width), where the family needs it.

    Raises:
        CostError: the family, or its vision tower, is not among those counted.
    """
    family = getattr(config, "model_type", None)
    if family not in FAMILIES:
        raise CostError(
            f"no exact cost for model type {family!r}: supported are "
            f"{', '.join(sorted(FAMILIES))}; a family is one function in adsc/vision_cost.py"
        )
    return FAMILIES[family](config, image)


def first_legal_layer(config: Any) -> int:
    """The first decoder layer before which tokens may be dropped.

    Qwen3-VL adds deepstack features to the vision tokens after each of its first layers, so all of
    them must still be there.
    """
    return len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ())


def encoder_macs(n: int, d: int, m: int, layers: int, *, attended: int | None = None) -> int:
    """Plain transformer encoder: q, k, v, output projections, scores, weighted sum, two MLP
    matrices per layer.

    Args:
        attended: sum over tokens of the tokens that each attends to; n * n where attention is
            global.
    """
    return layers * (
        4 * n * d * d + 2 * (n * n if attended is None else attended) * d + 2 * n * d * m
    )


def _fixed_size_tower(config: Any) -> tuple[int, int]:
    """Sequence length and MACs of a CLIP or SigLIP tower for one square tile of its own size."""
    tower = config.vision_config
    kind = getattr(tower, "model_type", None)
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise CostError(
            f"no exact cost for vision tower {kind!r} in {config.model_type!r}: counted towers are "
            "clip_vision_model and siglip_vision_model"
        )
    d, m = tower.hidden_size, tower.intermediate_size
    patches = (tower.image_size // tower.patch_size) ** 2
    macs = patches * tower.num_channels * tower.patch_size**2 * d
    n = patches + (kind == "clip_vision_model")  # CLIP's class token
    macs += encoder_macs(n, d, m, tower.num_hidden_layers)
    if kind == "siglip_vision_model" and getattr(tower, "vision_use_head", True):
        # Attention pooling with one learnt query: it runs, though these models do not use its
        # output.
        macs += 2 * d * d + 2 * n * d * d + 2 * n * d + 2 * d * m
    return n, macs


def _selected_features(config: Any, sequence: int) -> tuple[int, int]:
    """Tokens that leave the tower, and their width, by LLaVA's feature selection."""
    layers = config.vision_feature_layer
    width = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
    return sequence - (config.vision_feature_select_strategy == "default"), width


def _llava(config: Any, image: ImageInput) -> ImageCost:
    sequence, tower = _fixed_size_tower(config)
    n, width = _selected_features(config, sequence)
    d = config.text_config.hidden_size
    return ImageCost(spans=(n,), tower_macs=tower, projector_macs=n * (width * d + d * d))


FAMILIES: dict[str, Callable[[Any, ImageInput], ImageCost]] = {
    "llava": _llava,
}
