"""Load of the machine while a stage runs, under the names that MLflow shows as system metrics.

Of the stage's own machine only; what a training's workers need is theirs to report.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

_EVERY = 15.0  # seconds between two samples; a shorter stage has none


def sample() -> dict[str, float]:
    """Processor, memory and disk of this machine, and the memory of this process."""
    import psutil

    memory, disk = psutil.virtual_memory(), psutil.disk_usage("/")
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_percentage": memory.percent,
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/disk_usage_percentage": disk.percent,
        "system/process_memory_megabytes": psutil.Process().memory_info().rss / 1e6,
    }


@contextmanager
def sampled(
    send: Callable[[Mapping[str, float], int], object], every: float = _EVERY
) -> Iterator[None]:
    """`send(values, number of the sample)` every so many seconds for the length of a `with`."""
    done = threading.Event()

    def watch() -> None:
        number = 0
        while not done.wait(every):
            send(sample(), number)
            number += 1

    thread = threading.Thread(target=watch, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
