"""The fast part of a matrix of cases leaves out no value, and the whole no case."""

from itertools import product
from typing import Any

from tests.matrix import matrix, pairs


def cases_of(mark: Any) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """All cases of a parametrization, and those that are not slow."""
    _, cases = mark.args
    return [case.values for case in cases], [case.values for case in cases if not case.marks]


def test_every_value_is_in_a_fast_case_and_every_case_is_there() -> None:
    axes = {"a": range(7), "b": {"x": 10, "y": 20}, "c": ("left", "right"), "d": range(3)}
    whole, fast = cases_of(matrix(**axes))
    assert whole == list(product(range(7), (10, 20), ("left", "right"), range(3)))
    assert [set(values) for values in zip(*fast, strict=True)] == [
        set(range(7)), {10, 20}, {"left", "right"}, set(range(3)),
    ]  # fmt: skip
    assert len(fast) == 7
    # Two axes of two values are not in step: each pair of their values is there.
    assert {(b, c) for _, b, c, _ in fast} == set(product((10, 20), ("left", "right")))
    assert matrix(**axes).args[1][0].id == "0-x-left-0"


def test_every_value_of_pairs_is_in_a_fast_one() -> None:
    given = [(a, b) for a in "abcde" for b in "xyz" if (a, b) != ("a", "x")]
    whole, fast = cases_of(pairs(("a", "b"), given))
    assert whole == given
    assert {a for a, _ in fast} == set("abcde") and {b for _, b in fast} == set("xyz")
    assert len(fast) < len(whole)
