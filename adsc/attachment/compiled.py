"""Decoder layers compiled one by one (regional compilation), with the hooks of a plan outside.

torch.compile gets each layer's `forward` and nothing around it: what a plan drops is cut by the
layer's hooks before, in eager mode, so every plan, pooled or not, is to the compiler a sequence of
another length, and length and rows are symbols to it. Layers share their graphs; of a KV cache each
gets its own part alone, since a layer's number is a constant that would make a graph for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from adsc.attachment.attach import base_model
from adsc.dropping.cache_record import CACHE_NAMES
from adsc.dropping.decoders import gathered
from adsc.errors import UnsupportedModel
from adsc.families.table import find_family

LIMIT = 16
"""Most graphs that the layers of a model share. They differ in whether there is a mask, whether the
input has a gradient (behind frozen embeddings the first layer's has none), whether rotary tables
are the same for all rows, and one row or several; under a teacher in being without gradient."""
M = TypeVar("M", bound=nn.Module)


class CompiledForward:
    """Stands in for a layer's `forward`. Copied with its layer, it is the copy's.

    Activation checkpointing is around what is compiled, so that dropout is drawn again as it was
    with every backend; the compiler's own treatment keeps that promise with its default alone.

    Args:
        number: of the layer.
        eager: the layer's own forward.
        compiled: the same without checkpointing, a function of the layer and its arguments.
        checkpoints: whether `eager` checkpoints itself.
    """

    def __init__(
        self, number: int, eager: MethodType, compiled: Callable[..., Any], checkpoints: bool
    ) -> None:
        functools.update_wrapper(self, eager)
        self._number, self._checkpoints = number, checkpoints
        self._eager, self._compiled = eager, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self._eager.__self__
        if kwargs.get("output_attentions"):
            return self._eager(*args, **kwargs)
        for name in CACHE_NAMES:
            if (cache := kwargs.get(name)) is not None:
                if not _grows(cache, self._number):
                    return self._eager(*args, **kwargs)
                kwargs = kwargs | {name: CachePart(cache.layers[self._number])}
        run = functools.partial(self._compiled, layer, **kwargs)
        if self._checkpoints and layer.gradient_checkpointing and layer.training:
            return layer._gradient_checkpointing_func(run, *args)
        return run(*args)


class CachePart:
    """One layer's keys and values, in the place of the whole cache."""

    def __init__(self, layer: DynamicLayer) -> None:
        self.layer = layer

    def update(
        self, keys: Tensor, values: Tensor, _: int, *more: Any, **how: Any
    ) -> tuple[Tensor, Tensor]:
        return self.layer.update(keys, values, *more, **how)


def _grows(cache: Any, number: int) -> bool:
    """Whether a layer's part of a cache is a plain one, which grows; static and quantized caches,
    sliding windows and what is offloaded do more than the part can tell."""
    if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
        return False
    return number < len(cache.layers) and type(cache.layers[number]) is DynamicLayer


def compile_layers(model: M, **options: Any) -> M:
    """Compile each decoder layer of a model on its own, in place.

    Call it before or after `attach`; adapters work too.

    The first calls compile at most `LIMIT` graphs, whatever plans and lengths follow; what would
    need another one runs eagerly, and torch warns. Caches other than the default one also run
    eagerly, as do layers with a sliding window that have a cache.

    Args:
        model: as `attach` takes it.
        options: of torch.compile, such as `backend`; `dynamic` defaults to true.

    Returns:
        The same model.

    Raises:
        UnsupportedModel: an unknown architecture, or a layer whose forward was replaced.
    """
    layers = _layers(uncompile_layers(model))
    for number, layer in enumerate(layers):
        if "forward" in vars(layer):
            raise UnsupportedModel(
                f"something has replaced the forward of decoder layer {number} "
                f"({layer.forward!r}), and compiling the layer would undo it; load the model "
                "without device_map and kernels for layers, or leave its layers eager"
            )
    # A process's setting; torch.compile takes one for a function only from torch 2.13 on.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, LIMIT)
    compiled = functools.cache(lambda f: torch.compile(f, **{"dynamic": True} | options))
    for number, layer in enumerate(layers):
        forward, checkpoints = type(layer).forward, _forward_checkpoints(layer)
        own = compiled(forward.__wrapped__ if checkpoints else forward)
        layer.forward = CompiledForward(number, layer.forward, own, checkpoints)
    return model


def uncompile_layers(model: M) -> M:
    """Undo `compile_layers`, in place."""
    for layer in _layers(model):
        if isinstance(vars(layer).get("forward"), CompiledForward):
            del layer.forward
    return model


def _forward_checkpoints(layer: nn.Module) -> bool:
    """Whether a layer's class has its forward wrapped for activation checkpointing; older
    transformers wrap `__call__`, hooks included."""
    kind = GradientCheckpointingLayer
    return isinstance(layer, kind) and kind.__call__ is nn.Module.__call__


def _layers(model: nn.Module) -> list[Any]:
    family, inner = find_family(base_model(model))
    return [gathered(layer) for layer in family.decoder(inner).layers]
