"""Exhaustive matrices of cases: a part of them that has every value once is fast, the rest slow.

`make test` runs the fast part, `make test-slow` the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import pytest


def matrix(**axes: Iterable[Any] | Mapping[str, Any]) -> pytest.MarkDecorator:
    """Parametrize over the product of the axes; each value of each of them is in a fast case.

    The values of a mapping have its keys as ids.
    """
    values = [list(axis.items() if isinstance(axis, Mapping) else axis) for axis in axes.values()]
    fast = _cover([len(axis) for axis in values])
    cases = []
    for places in product(*(range(len(axis)) for axis in values)):
        chosen = [axis[place] for axis, place in zip(values, places, strict=True)]
        named = [
            value if isinstance(axis, Mapping) else (str(value), value)
            for axis, value in zip(axes.values(), chosen, strict=True)
        ]
        cases.append(
            pytest.param(
                *(value for _, value in named),
                id="-".join(name for name, _ in named),
                marks=() if places in fast else pytest.mark.slow,
            )
        )
    return pytest.mark.parametrize(tuple(axes), cases)


def _cover(lengths: Sequence[int]) -> set[tuple[int, ...]]:
    """As many places as the longest axis is long. Axes of one length are turned against each other,
    so that they don't go in step."""
    return {
        tuple((step + turn * (step // size)) % size for turn, size in enumerate(lengths))
        for step in range(max(lengths))
    }


def pairs(names: tuple[str, str], cases: Sequence[tuple[str, str]]) -> pytest.MarkDecorator:
    """Parametrize over pairs; each first and each second value is in a fast one."""
    fast = _one_of_each(cases, 0) | _one_of_each(cases, 1)
    return pytest.mark.parametrize(
        names,
        [pytest.param(*case, marks=() if case in fast else pytest.mark.slow) for case in cases],
    )


def _one_of_each(cases: Sequence[tuple[str, str]], place: int) -> set[tuple[str, str]]:
    """For each value there one pair, its partners in turn."""
    chosen = set()
    for number, value in enumerate(dict.fromkeys(case[place] for case in cases)):
        own = [case for case in cases if case[place] == value]
        chosen.add(own[number % len(own)])
    return chosen
