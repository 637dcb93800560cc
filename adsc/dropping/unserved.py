"""Ways to run a model in which a plan can't be kept, refused in a sentence before anything runs.

Each would otherwise end in an error of torch's own, in one that is hidden in a result, or in
numbers for another input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule

from adsc.errors import UnsupportedModel


def check_call(decoder: Any, own: type) -> None:
    """Refuse a call whose decoder is traced or compiled on its own.

    Args:
        own: the class of our hooks on layers.

    Raises:
        UnsupportedModel: the sentence says what to do instead.
    """
    if torch.compiler.is_compiling():
        return
    if torch.jit.is_tracing():
        raise UnsupportedModel(
            "torch.jit.trace records one call's indices as constants, and with a pruning plan they "
            "depend on where images are: the trace would drop wrong tokens of the next input. "
            "Use torch.compile, or trace after adsc.detach(model)"
        )
    layers = ((f"decoder layer {number}", layer) for number, layer in enumerate(decoder.layers))
    for name, module in (("the decoder", decoder), *layers):
        if _is_compiled(module, own):
            raise UnsupportedModel(
                f"{name} is compiled on its own, and a call's schedule can't cross its border: "
                "compile the whole model instead, model = torch.compile(model), or its layers "
                "behind their hooks, adsc.compile_layers(model)"
            )


def _is_compiled(module: nn.Module, own: type) -> bool:
    if isinstance(module, OptimizedModule):
        return not _outside(module, own)
    return module._compiled_call_impl is not None


def _outside(module: nn.Module, own: type) -> bool:
    """Whether our hook is on the wrapper itself, so that it runs before what is compiled."""
    return any(isinstance(hook, own) for hook in module._forward_pre_hooks.values())
