"""Ways to run a model in which a plan can't be kept, refused in a sentence before anything runs.

Each would otherwise end in an error of torch's own, in one that is hidden in a result, or in
numbers for another input.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from transformers.generation.continuous_batching.continuous_api import ContinuousMixin

from adsc.families import UnsupportedModel
from adsc.held import CacheError


def check_call(decoder: Any) -> None:
    """Refuse a call whose decoder is traced or compiled on its own.

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
    for name, module in (("the decoder", decoder), ("a decoder layer", decoder.layers[0])):
        if _is_compiled(module):
            raise UnsupportedModel(
                f"{name} is compiled on its own, and a call's schedule can't cross its border: "
                "compile the whole model instead, model = torch.compile(model), or call "
                "torch.compile before attaching where layers are wrapped one by one"
            )


def _is_compiled(module: nn.Module) -> bool:
    if isinstance(module, OptimizedModule):
        return not _outside(module)
    return module._compiled_call_impl is not None


def _outside(module: nn.Module) -> bool:
    """Whether our hook is on the wrapper itself, so that it runs before what is compiled."""
    from adsc.drop import EnterLayer

    return any(isinstance(hook, EnterLayer) for hook in module._forward_pre_hooks.values())


def refuse_continuous_batching() -> None:
    """Make transformers' continuous batching refuse an attached model; again is no more."""
    begin = ContinuousMixin.init_continuous_batching
    if hasattr(begin, "adsc_wraps"):
        return

    @wraps(begin)
    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        from adsc.attach import attached_plan

        if (plan := attached_plan(self)) is not None:
            raise CacheError(
                f"continuous batching (generate_batch, paged caches) with plan {str(plan)!r}: its "
                "blocks are as long in every layer, and it brings no images; use model.generate, "
                "or adsc.detach(model) to run text dense"
            )
        return begin(self, *args, **kwargs)

    init_continuous_batching.adsc_wraps = True  # type: ignore[attr-defined]
    ContinuousMixin.init_continuous_batching = init_continuous_batching  # type: ignore[method-assign]
