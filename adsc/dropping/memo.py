"""Remember tensors that are made of numbers alone, without remembering what a tracer made.

A tensor made while something intercepts operators (fake tensors, FLOP counters, tracing) or inside
inference mode may be no ordinary tensor; kept for later calls of the process it would spoil them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


def remembered(make: Callable[..., T], size: int) -> Callable[..., T]:
    """`make`, which makes tensors, with the last `size` results kept; arguments must be hashable.

    While operators are intercepted nothing is looked up or kept, and while a CUDA graph is captured
    nothing is kept: its memory belongs to the graph.
    """
    results: OrderedDict[tuple[Hashable, ...], T] = OrderedDict()
    lock = Lock()

    def recall(*key: Hashable) -> T:
        if _is_intercepted():
            return make(*key)
        with lock:
            if (found := results.get(key)) is not None:
                results.move_to_end(key)
                return found
        with torch.inference_mode(False):
            made = make(*key)
        if _is_ordinary(made) and not _is_captured():
            with lock:
                results[key] = made
                if len(results) > size:
                    results.popitem(last=False)
        return made

    return recall


def _is_ordinary(made: Any) -> bool:
    return all(type(one) is Tensor for one in tree_leaves(made) if isinstance(one, Tensor))


def _is_intercepted() -> bool:
    return _get_current_dispatch_mode() is not None or torch.jit.is_tracing()


def _is_captured() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
