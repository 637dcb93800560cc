"""Which plan calls run under in the blocks that are open (`adsc.running`): kept in the context of
whoever opens one, and read by the hooks when a call begins. It knows nothing of attaching."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

from adsc.method import Method
from adsc.plan import PruningPlan

_open = 0
"""Blocks that are open, of all threads. torch.compile can't trace context variables: while none is
open it traces on without, guards on this number, and leaves calls within a block to be run eagerly
(or refuses them, with `fullgraph=True`)."""
_LOCK = threading.Lock()
# The innermost block last: the modules at which calls of a model begin, and their plan.
_BLOCKS: ContextVar[tuple[tuple[tuple[nn.Module, ...], PruningPlan | Method], ...]] = ContextVar(
    "adsc_running", default=()
)


@contextmanager
def block(modules: tuple[nn.Module, ...], plan: PruningPlan | Method) -> Iterator[None]:
    _count(1)
    token = _BLOCKS.set((*_BLOCKS.get(), (modules, plan)))
    try:
        yield
    finally:
        _BLOCKS.reset(token)
        _count(-1)


def _count(change: int) -> None:
    global _open
    with _LOCK:
        _open += change


def current(module: nn.Module, attached: PruningPlan | Method) -> PruningPlan | Method:
    """The plan under which a call that begins at `module` runs."""
    if not _open:
        return attached
    for modules, plan in reversed(_BLOCKS.get()):
        if any(module is one for one in modules):
            return plan
    return attached


def is_replaced(module: nn.Module) -> bool:
    """Whether the hooks of the attached method on `module` have no say, because a block runs its
    model under another plan."""
    if not _open:
        return False
    for modules, plan in reversed(_BLOCKS.get()):
        if any(module is one for one in modules):
            return not isinstance(plan, Method)
    return False
