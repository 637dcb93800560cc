"""The learning rate over a stage, as a share of its peak."""

import math


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """A linear rise over `warmup` (a share of the steps), then half a cosine to zero.

    >>> [round(rate_factor(step, 10, 0.2), 2) for step in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.04]
    """
    rising = max(1, round(warmup * steps)) if warmup else 0
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
