"""A static cache sized layer by layer, so that memory is saved there too, and decoding compiles.

Everything else about static caches is transformers': this only makes its layers shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import StaticCache

from adsc.attachment.attach import base_model, plan_of
from adsc.dropping.blocks import current
from adsc.dropping.cache_record import CacheError
from adsc.dropping.call import first_full_layer
from adsc.families.table import find_family


def static_cache(model: nn.Module, max_cache_len: int, vision_tokens: Sequence[int]) -> StaticCache:
    """A static cache for one prompt, or a batch of prompts, and the answer.

    Args:
        model: a model with a plan.
        max_cache_len: columns of the whole uncompressed conversation: prompt and new tokens.
        vision_tokens: vision tokens of each image in a row; in a batch, of the row that drops the
            fewest.

    Raises:
        CacheError: the model has no plan, or one that drops too early, or the length is too short.

    >>> cache = static_cache(model, max_cache_len=1024, vision_tokens=[576])  # doctest: +SKIP
    >>> model.generate(**inputs, past_key_values=cache)  # doctest: +SKIP
    """
    plan = plan_of(model)
    if plan is None:
        raise CacheError("this model has no plan; attach one, or make a transformers StaticCache")
    if max_cache_len <= sum(vision_tokens):
        raise CacheError(
            f"max_cache_len {max_cache_len} has no room beside {sum(vision_tokens)} vision tokens"
        )
    base = base_model(model)
    family, inner = find_family(base)
    plan = current(base, plan)
    config = family.decoder(inner).config
    if plan.stages and plan.stages[0][0] <= first_full_layer(config):
        raise CacheError(
            f"plan {str(plan)!r} drops before layer {plan.stages[0][0]}, but a static cache needs "
            f"layer {first_full_layer(config)} whole: masks are made for it; drop after it"
        )
    cache = StaticCache(config, max_cache_len=max_cache_len)
    kept = [plan.tokens_per_layer(n, len(cache.layers)) for n in vision_tokens]
    layer: Any  # every layer of a StaticCache has max_cache_len
    for number, layer in enumerate(cache.layers):
        dropped = sum(n - of[number] for n, of in zip(vision_tokens, kept, strict=True))
        # A sliding layer holds no more than its window anyway.
        layer.max_cache_len = min(layer.max_cache_len, max_cache_len - dropped)
    return cache
