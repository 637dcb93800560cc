"""Attention probabilities of a few queries of a layer, from that layer's own projections.

What eager attention would return in the rows of these queries, without a map for all of them and
without leaving the kernel that the model runs with: q of the queries, k of all tokens, rotary
positions, softmax over everything that a query sees, the cache's keys included. Nothing is
differentiated; dropout inside adapters is off.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adsc.dropping.cache_record import CacheError
from adsc.dropping.call import is_sliding

if TYPE_CHECKING:
    from adsc.dropping.choice import Scene

# Families whose vision tokens or prefixes attend both ways: a score from causal attention, which
# the papers use, has no counterpart there.
BOTH_WAYS = ("Gemma 3", "PaliGemma")
WHY = "its prefix attends both ways, and the method's score is defined on causal attention"


@contextmanager
def looking(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """No gradient, no dropout in `modules`, and no cast weights left behind in autocast's cache,
    where those made without gradients would be found by the layer itself."""
    training = [module for one in modules for module in one.modules() if module.training]
    kind = device.type
    cast: Any = nullcontext()
    if torch.is_autocast_enabled(kind):
        cast = torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), cast:
            yield
    finally:
        for module in training:
            module.training = True


def keys(scene: Scene) -> Tensor:
    """(B, heads, Q, d) the keys of a layer's input, turned."""
    attention, (cos, sin) = _attention(scene), _rotary(scene)
    with looking(scene.device, attention.k_proj):
        key = _heads(scene.layer.input_layernorm(scene.hidden), attention, "k")  # type: ignore
        return _turned(attention, key, cos, sin)


def content_keys(layer: Any, states: Tensor) -> Tensor:
    """(T, d) keys that a layer makes of states (T, D), before they are turned: mean over heads."""
    attention = layer.self_attn
    with looking(states.device, attention.k_proj):
        return _heads(layer.input_layernorm(states[None]), attention, "k")[0].mean(0)


def probabilities(scene: Scene, rows: Tensor, slots: Tensor) -> Tensor:
    """(N, T, Q) attention of queries at `slots` (N, T) of `rows` (N,), mean over heads."""
    attention, (cos, sin) = _attention(scene), _rotary(scene)
    call = scene.call
    if call.square is not None:
        raise CacheError(
            f"{call.plan.name} scores tokens by causal attention; it can't with a 4-D attention "  # type: ignore[union-attr]
            "mask: pass a 2-D one"
        )
    key = keys(scene)
    with looking(scene.device, attention.q_proj):
        normed = scene.layer.input_layernorm(scene.hidden)  # type: ignore[union-attr, operator]
        query = _heads(normed[rows.unsqueeze(1), slots], attention, "q")  # (N, H, T, d)
        index = slots[None, ..., None].expand(1, *slots.shape, cos.shape[-1])
        cos, sin = (table.expand(len(normed), -1, -1)[rows] for table in (cos, sin))
        cos, sin = (table.gather(1, index[0]) for table in (cos, sin))
        query = _turned(attention, query, cos, sin)
        past = 0
        if scene.cache is not None and scene.number < len(scene.cache.layers):
            past = int(scene.cache.get_seq_length(scene.number))
            cached = scene.cache.layers[scene.number].keys
            past = min(past, cached.shape[-2]) if past else 0
            if past:
                key = torch.cat([cached[..., :past, :].to(key), key], dim=2)
        groups = query.shape[1] // key.shape[1]
        query = query.unflatten(1, (key.shape[1], groups)).flatten(2, 3)  # (N, kv, G * T, d)
        scores = query @ key[rows].transpose(-1, -2) * attention.scaling
        scores = scores.unflatten(2, (groups, -1)).float()  # (N, kv, G, T, P + Q)
        seen = _seen(scene, rows, slots, past)[:, None, None]
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        return scores.softmax(-1).flatten(1, 2).mean(1)[..., past:]


def _seen(scene: Scene, rows: Tensor, slots: Tensor, past: int) -> Tensor:
    """(N, T, P + Q) which slots each query sees."""
    call, device, width = scene.call, scene.device, scene.hidden.shape[1]
    places = torch.arange(past + width, device=device)
    at = slots.unsqueeze(-1) + past
    seen = places <= at
    if is_sliding(call.decoder.config, scene.number):
        seen = seen & (places > at - call.decoder.config.sliding_window)
    if scene.drop >= 0:
        valid = call.keys(scene.drop, scene.number, scene.hidden, scene.cache)
    else:
        valid = call.seen
        if valid is not None:  # a sliding layer's cache holds the last ones only
            total = int(scene.cache.get_seq_length(scene.number)) if past else 0
            valid = valid[:, : total + width]
    if valid is not None:
        valid = valid.to(device)[:, -(past + width) :]
        seen = seen & valid[rows].unsqueeze(1)
    if call.samples is not None:
        samples = call.samples.to(device)
        if scene.drop >= 0:
            samples = samples.gather(1, call.segments[scene.drop].columns.to(device))
        mine = samples[rows]
        seen = seen & (mine.unsqueeze(1) == mine.gather(1, slots).unsqueeze(-1))
    return seen


def _attention(scene: Scene) -> Any:
    return scene.layer.self_attn  # type: ignore[union-attr]


def _rotary(scene: Scene) -> tuple[Tensor, Tensor]:
    assert scene.rotary is not None
    return scene.rotary


def _heads(hidden: Tensor, attention: Any, kind: str) -> Tensor:
    """(N, T, D) -> (N, heads, T, d), normed where the family does so."""
    heads = getattr(attention, f"{kind}_proj")(hidden).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{kind}_norm", None)
    return (heads if norm is None else norm(heads)).transpose(1, 2)


def _turned(attention: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions by the family's own function."""
    return sys.modules[type(attention).__module__].apply_rotary_pos_emb(heads, heads, cos, sin)[0]
