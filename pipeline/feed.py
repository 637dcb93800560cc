"""From a loader of steps to the trainer: batches that are ready before they are asked for."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Batch = TypeVar("Batch")


def from_thread(load: Callable[[int], Batch], steps: range, ahead: int = 2) -> Iterator[Batch]:
    """load(step) for each step, in order, made by one thread that runs up to `ahead` ahead."""
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
        left = iter(steps)
        waiting: deque[Future[Batch]] = deque(
            pool.submit(load, step) for step in islice(left, ahead)
        )
        try:
            while waiting:
                batch = waiting.popleft().result()
                waiting.extend(pool.submit(load, step) for step in islice(left, 1))
                yield batch
        finally:
            for future in waiting:
                future.cancel()
