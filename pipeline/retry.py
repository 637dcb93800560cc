"""Calls that are repeated after transient errors. The caller says which errors those are, and gives
the pauses; nothing here knows of stores or of Ray.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Result = TypeVar("Result")


def retried(
    call: Callable[[], Result],
    transient: Callable[[Exception], bool],
    pauses: Iterable[float],
    note: Callable[[Exception], object] = lambda error: None,
) -> Result:
    """The result of `call`, which is repeated after each of `pauses` (seconds) while its error is
    `transient`; the last error is raised.

    Args:
        note: called with each error before its pause.

    >>> attempts = iter([ValueError("busy"), 7])
    >>> def call():
    ...     if isinstance(found := next(attempts), Exception):
    ...         raise found
    ...     return found
    >>> retried(call, lambda error: str(error) == "busy", pauses=[0.0])
    7
    """
    for pause in pauses:
        try:
            return call()
        except Exception as error:
            if not transient(error):
                raise
            note(error)
        time.sleep(pause)
    return call()


def every(seconds: float, at_most: float) -> Iterator[float]:
    """Pauses of the same length, for `at_most` seconds from now."""
    give_up = time.monotonic() + at_most
    while time.monotonic() < give_up:
        yield seconds


def backoff(times: int, first: float, longest: float = 30.0) -> Iterator[float]:
    """So many random pauses, whose bound doubles from `first` to `longest` seconds."""
    for number in range(times):
        yield random.random() * min(longest, first * 2**number)
