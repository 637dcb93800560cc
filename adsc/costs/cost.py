"""FLOPs and KV-cache bytes of a forward pass under a pruning plan, each convention by name.

Closed form, on integers, from a config alone: no weights, no tensors, no measurement. Time is not
predicted here. Published FLOPs of this field follow at least three formulas that disagree by a
factor of two, so a number without its convention means nothing; `docs/cost.md` reconciles them.

Sources: FastV (arXiv 2403.06764), PyramidDrop (arXiv 2410.17247), SparseVLM (arXiv 2410.04417);
`exact` is torch.utils.flop_counter.

Legend: n tokens entering a layer, v vision tokens among them, d hidden width, m MLP width,
L decoder layers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from adsc.costs.decoder import Decoder
from adsc.costs.geometries import shape
from adsc.costs.scoring import Sizes
from adsc.errors import CostError
from adsc.families.family import ImageInput
from adsc.families.table import image_cost
from adsc.method import Method
from adsc.plan import as_plan

CONVENTIONS = {
    "exact": "2 x MACs of every matmul: tower, projector, decoder, lm_head; text and vision tokens",
    "fastv": "MACs, 4nd^2 + 2n^2d + 2ndm per layer; text and vision tokens (FastV, VisionZip)",
    "pdrop": "MACs, 4nd^2 + 2n^2d + 3ndm per layer; vision tokens only (PyramidDrop, HiDrop)",
    "sparsevlm": "MACs, 4nd^2 + 2n^2d + 3ndm per layer; text and vision tokens (SparseVLM's code)",
}
LOGITS = ("last", "kept", "full")


class LayerCost(NamedTuple):
    """One decoder layer. `tokens` and `vision_tokens` are per row and enter the layer in the
    prefill; the rest is for the whole batch, decode steps included."""

    tokens: int
    vision_tokens: int
    flops: int
    kv_cache_bytes: int


class Reductions(NamedTuple):
    """Shares saved against a reference, 0 = the same, 1 = all of it; negative where it costs
    more."""

    flops: float
    kv_cache_bytes: float
    vision_tokens: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a prefill, and of `new_tokens` decode steps if given.

    Attributes:
        flops: the total in `convention`: exact counts FLOPs, the other conventions the MACs that
            their papers call FLOPs.
        kv_cache_bytes: all keys and values after the last step, text included, whatever the
            convention.
        per_layer: one entry per decoder layer.
        vision_flops: tower and projector; 0 except in `exact`.
        logits_flops: lm_head; 0 except in `exact`.
        scoring_flops: for choosing and merging tokens by a peer; 0 except in `exact`.
    """

    convention: str
    flops: int
    kv_cache_bytes: int
    per_layer: tuple[LayerCost, ...]
    vision_flops: int
    logits_flops: int
    scoring_flops: int = 0

    @property
    def average_vision_tokens(self) -> float:
        """Mean over layers of the vision tokens of one row entering each layer."""
        return sum(layer.vision_tokens for layer in self.per_layer) / len(self.per_layer)

    def versus(self, dense: Cost) -> Reductions:
        """Shares (0 to 1) saved relative to `dense`, which must use the same convention.

        >>> dense = estimate_cost("llava-1.5-7b", None, text_tokens=0, convention="pdrop")
        >>> pruned = estimate_cost("llava-1.5-7b", "8:1/2,16:1/2,24:1/2", 0, convention="pdrop")
        >>> round(pruned.versus(dense).flops, 3)
        0.534
        """
        if self.convention != dense.convention:
            raise CostError(
                f"a cost in convention {self.convention!r} cannot be compared with one in "
                f"{dense.convention!r}: estimate both in the same convention"
            )

        def saved(mine: float, reference: float) -> float:
            return 1 - mine / reference if reference else 0.0

        return Reductions(
            flops=saved(self.flops, dense.flops),
            kv_cache_bytes=saved(self.kv_cache_bytes, dense.kv_cache_bytes),
            vision_tokens=saved(self.average_vision_tokens, dense.average_vision_tokens),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        layers = [layer._asdict() for layer in self.per_layer]
        average = self.average_vision_tokens
        return {**asdict(self), "per_layer": layers, "average_vision_tokens": average}


def estimate_cost(
    config_or_model: Any,
    plan: Any = None,
    text_tokens: int = 101,
    num_images: int = 1,
    batch_size: int = 1,
    convention: str = "exact",
    logits: str = "last",
    new_tokens: int = 0,
    *,
    image_size: tuple[int, int] | None = None,
) -> Cost:
    """Estimate the cost of `batch_size` equal rows, each with `num_images` images and `text_tokens`
    other tokens.

    Args:
        config_or_model: a transformers config, a model, or the name of a geometry such as
            "llava-1.5-7b".
        plan: a PruningPlan or its text; anything with `tokens_per_layer(num_vision_tokens,
            num_layers)` works too. None or "" is the dense model.
        text_tokens: every position of a row that is not a vision token.
        num_images: images per row; for models that treat tiles as images (InternVL, SmolVLM,
            Gemma 3's pan and scan), tiles per row.
        batch_size: rows; padding is not modelled.
        convention: exact, fastv, pdrop or sparsevlm, as in CONVENTIONS.
        logits: where the lm_head runs in the prefill, for `exact`: on the `last` position
            (generation), on every `kept` position (training), or on the `full` uncompressed length
            (the accounting that fits the paper's numbers).
        new_tokens: decode steps with a cache after the prefill, each feeding one token. The first
            token of a generation comes from the prefill, so max_new_tokens=k means k-1 steps.
        image_size: (height, width) in pixels, for families whose token count depends on it.

    Returns:
        The cost; `exact` equals torch's FlopCounterMode and the bytes of the cache's tensors, to
        the unit. LoRA adapters that are not merged, dtype conversions and elementwise work are not
        counted, nor are the n * d additions of a drop that averages n tokens (`pool`), so such a
        plan costs as much as a plain one.

    Raises:
        CostError: an unsupported model, an unknown word, a count out of range.
        PlanError: a plan that does not fit the decoder.

    >>> dense = estimate_cost("llava-1.5-7b")
    >>> dense.kv_cache_bytes == (576 + 101) * 524_288
    True
    """
    _check_words(convention, logits)
    _check_counts(text_tokens, num_images, batch_size, new_tokens, image_size)
    config, kv_bytes = _config_and_bytes(config_or_model)
    image = image_cost(config, ImageInput(size=image_size, images_in_row=num_images))
    decoder = Decoder.from_config(config.get_text_config())
    vision = _vision_tokens_per_layer(plan, image.tokens, num_images, decoder.num_layers)
    bytes_per_token = 2 * decoder.kv_heads * decoder.head_dim * kv_bytes

    layers = []
    for layer, v in enumerate(vision):
        n = v + text_tokens
        cached = decoder.kept_tokens(layer, n + new_tokens)
        flops = _layer_flops(decoder, layer, convention, n, v, new_tokens)
        layers.append(LayerCost(n, v, batch_size * flops, batch_size * cached * bytes_per_token))

    vision_flops = logits_flops = scoring_flops = 0
    if convention == "exact":
        positions = {"last": 1, "kept": layers[-1].tokens}
        uncompressed = num_images * image.tokens + text_tokens
        at = positions.get(logits, uncompressed) + new_tokens
        vision_flops = 2 * batch_size * num_images * image.macs
        logits_flops = 2 * batch_size * at * decoder.hidden * decoder.vocabulary
        if isinstance(plan, Method) and plan.stages and num_images:
            sizes = Sizes(
                config=config,
                decoder=decoder,
                rows=batch_size,
                images=num_images,
                text=text_tokens,
                tokens=image.tokens,
                counts=plan.counts(image.tokens),
                image=ImageInput(size=image_size, images_in_row=num_images),
            )
            scoring_flops = 2 * plan.scoring_macs(sizes)
    return Cost(
        convention=convention,
        flops=sum(layer.flops for layer in layers) + vision_flops + logits_flops + scoring_flops,
        kv_cache_bytes=sum(layer.kv_cache_bytes for layer in layers),
        per_layer=tuple(layers),
        vision_flops=vision_flops,
        logits_flops=logits_flops,
        scoring_flops=scoring_flops,
    )


def _layer_flops(
    decoder: Decoder, layer: int, convention: str, n: int, v: int, new_tokens: int
) -> int:
    """One row through one layer: the prefill of n tokens, v of them vision, then the decode
    steps."""
    # Every step attends to what the layer's cache holds and to itself.
    steps = sum(decoder.kept_tokens(layer, n + step) + 1 for step in range(new_tokens))
    if convention == "exact":
        return 2 * decoder.layer_macs(n + new_tokens, n * n + steps)
    if convention == "pdrop":  # vision tokens only, and decode steps feed none
        return decoder.formula_macs(v, v * v, mlp_matrices=3)
    matrices = 2 if convention == "fastv" else 3
    return decoder.formula_macs(n + new_tokens, n * n + steps, matrices)


def _vision_tokens_per_layer(
    plan: Any, image_tokens: int, num_images: int, num_layers: int
) -> list[int]:
    if not hasattr(plan, "tokens_per_layer"):
        plan = as_plan(() if plan is None else plan)
    each = plan.tokens_per_layer(image_tokens, num_layers)
    if len(each) != num_layers:
        raise CostError(
            f"{plan!r} gives token counts for {len(each)} layers; the decoder has {num_layers}"
        )
    return [num_images * count for count in each]


_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}


def _config_and_bytes(config_or_model: Any) -> tuple[Any, int]:
    """The whole model's config, and the bytes of a number in its KV cache: 2 where the config names
    no dtype."""
    if isinstance(config_or_model, str):
        config_or_model = shape(config_or_model)
    config = getattr(config_or_model, "config", config_or_model)
    if not hasattr(config, "get_text_config"):
        raise CostError(
            f"cannot cost a {type(config_or_model).__name__}: pass a transformers config, a "
            "transformers model without wrapper, or the name of a geometry"
        )
    if config is not config_or_model:  # a model's weights may have been cast since it was built
        return config, config_or_model.dtype.itemsize
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    # As text where no torch was needed to read it.
    return config, _BYTES.get(dtype, 2) if isinstance(dtype, str) else getattr(dtype, "itemsize", 2)


def _check_words(convention: str, logits: str) -> None:
    for name, word, allowed in (
        ("convention", convention, tuple(CONVENTIONS)),
        ("logits", logits, LOGITS),
    ):
        if word not in allowed:
            raise CostError(f"{name} {word!r} is unknown; choose one of {', '.join(allowed)}")


def _check_counts(
    text_tokens: int,
    num_images: int,
    batch_size: int,
    new_tokens: int,
    image_size: tuple[int, int] | None,
) -> None:
    counts: list[tuple[str, object, int]] = [
        ("text_tokens", text_tokens, 0),
        ("num_images", num_images, 0),
        ("batch_size", batch_size, 1),
        ("new_tokens", new_tokens, 0),
    ]
    if image_size is not None:
        if len(image_size) != 2:
            raise CostError(f"image_size {image_size!r} must be (height, width) in pixels")
        counts += [("image height", image_size[0], 1), ("image width", image_size[1], 1)]
    for name, count, least in counts:
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise CostError(f"{name} {count!r} must be a whole number from {least}")
    if text_tokens + num_images == 0:
        raise CostError("text_tokens and num_images are both 0: there is nothing to count")
