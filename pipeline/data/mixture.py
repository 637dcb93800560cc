"""Mixtures: which records of several named sources are taken, from weights, caps and a seed.

No record is taken twice. The choice depends on the sources' sizes, the seed and each source's name
only, never on the order in which anything ran.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.config import Config

if TYPE_CHECKING:
    import numpy as np


class Source(Config):
    """One source of records in a mixture."""

    data: str
    """File, glob or folder of records: relative to the data folder, or absolute; or the address of
    a file or glob, such as gs://bucket/part-*.parquet."""
    images: str | None = None
    """Root of its pictures; null takes `prepare.images`."""
    weight: float | None = Field(None, gt=0)
    """Its share relative to other weighted sources': as many records are taken as these shares
    allow without taking one twice. null takes every record."""
    cap: int | None = Field(None, gt=0)
    """Most records taken from it; null is no bound."""


def sizes(sources: Mapping[str, Source], available: Mapping[str, int]) -> dict[str, int]:
    """How many records are taken of each source.

    >>> one, two = Source(data="a", weight=1), Source(data="b", weight=3)
    >>> sizes({"a": one, "b": two}, {"a": 100, "b": 150})
    {'a': 50, 'b': 150}
    """
    most = {name: min(available[name], sources[name].cap or available[name]) for name in sources}
    weights = {name: source.weight for name, source in sources.items() if source.weight}
    if weights:
        unit = min(most[name] / weight for name, weight in weights.items())
        most |= {name: round(unit * weight) for name, weight in weights.items()}
    return most


def choose(name: str, available: int, taken: int, seed: int) -> np.ndarray | None:
    """The indices taken of a source, ascending, shape (taken,); None for all of them."""
    if taken == available:
        return None
    import numpy as np  # configs name sources without it

    digest = hashlib.sha256(name.encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])
    return np.sort(rng.choice(available, size=taken, replace=False))
