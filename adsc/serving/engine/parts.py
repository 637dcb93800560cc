"""The layers of one part of the decoder as a module of their own, which torch.compile sees whole.

Between two drops nothing but the number of rows changes from step to step, and that is a dynamic
dimension. Drops, means and slots stay outside, in `model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile


def make_part(layers: Sequence[nn.Module], first: int, vllm_config: Any) -> nn.Module:
    """The module of layers `first`, `first` + 1, ... Their owner keeps them registered.

    vLLM drops all guards of what it compiles, and finds compiled code again by the qualified name
    of a forward and by the model tag. Parts that shared these would run each other's code.
    """
    name = f"Layers{first}To{first + len(layers) - 1}"
    code = _forward.__code__.replace(co_name=name, co_qualname=name)
    forward = FunctionType(code, _forward.__globals__, name)
    kind = type(name, (nn.Module,), {"forward": forward})
    compiled: Any = support_torch_compile(dynamic_arg_dims={"positions": 0, "hidden": 0})(kind)
    with set_model_tag(name):
        part: nn.Module = compiled(vllm_config=vllm_config)
    part.layers = tuple(layers)  # type: ignore[assignment]  # a tuple registers nothing
    return part


def _forward(self: Any, positions: Tensor, hidden: Tensor) -> Tensor:
    """(M,), (M, D) of the residual stream -> (M, D) of the residual stream."""
    residual: Any = None
    for layer in self.layers:
        hidden, residual = layer(positions, hidden, residual)
    summed: Tensor = hidden + residual
    return summed
