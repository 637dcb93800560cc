"""`solve_plans` against brute force over all placements, and its refusals."""

from fractions import Fraction
from itertools import combinations

import pytest

from adsc.plan import PlanError, PruningPlan
from adsc.solve import solve_plans


def brute_force(num_layers, n, average, ratios, tolerance, first_layer=0):
    """Distances and layers of every placement within the tolerance, from the plan's own counts."""
    found = []
    for layers in combinations(range(first_layer, num_layers), len(ratios)):
        plan = PruningPlan(stages=tuple(zip(layers, ratios, strict=True)))
        mean = Fraction(sum(plan.tokens_per_layer(n, num_layers)), num_layers)
        distance = abs(mean - Fraction(str(average)))
        if distance <= Fraction(str(tolerance)) * Fraction(str(average)):
            found.append((distance, layers))
    return sorted(found)


@pytest.mark.parametrize(
    ("num_layers", "n", "average", "ratios", "tolerance", "first_layer"),
    [
        (10, 576, 192, ("1/2", "1/2", "1/2"), 0.05, 0),
        (10, 577, 290.5, ("3/4", "1/3"), 0.1, 2),  # odd counts: the rounding matters
        (9, 13, 6, ("1/2", "2/3", "1/5", "1"), 0.2, 0),
        (7, 3, 1.5, ("1/9", "1/9"), 0.2, 1),  # already at one token: keeps it
        (12, 64, 30, ("0.3",), 0.15, 0),
        (6, 100, 50, ("1/2",), 0, 0),
    ],
)
def test_equals_brute_force(num_layers, n, average, ratios, tolerance, first_layer):
    ratios = tuple(Fraction(r) for r in ratios)
    expected = brute_force(num_layers, n, average, ratios, tolerance, first_layer)
    if not expected:
        expected = brute_force(num_layers, n, average, ratios, 1000, first_layer)[:1]
        with pytest.raises(PlanError, match="nearest is") as error:
            solve_plans(
                num_layers, n, average, len(ratios), ratios, tolerance, first_layer=first_layer
            )
        assert repr(str(PruningPlan(tuple(zip(expected[0][1], ratios, strict=True))))) in str(
            error.value
        )
        return
    plans = solve_plans(
        num_layers, n, average, len(ratios), ratios, tolerance, first_layer=first_layer
    )
    assert [tuple(layer for layer, _ in plan.stages) for plan in plans] == [x for _, x in expected]
    assert all(tuple(keep for _, keep in plan.stages) == ratios for plan in plans)


def test_the_headline_budget_has_every_placement():
    plans = solve_plans(32, 576, 192)
    expected = brute_force(32, 576, 192, (Fraction(1, 2),) * 3, 0.01)
    assert len(plans) == len(expected) == 96
    assert all(abs(plan.average_tokens(576, 32) - 192) <= 1.92 for plan in plans)
    assert [plan.average_tokens(576, 32) for plan in plans[:1]] == [191.25]


def test_limit_gives_the_closest():
    everything = solve_plans(32, 576, 128, keep=1 / 3, tolerance=0.05)
    assert solve_plans(32, 576, 128, keep=1 / 3, tolerance=0.05, limit=3) == everything[:3]
    assert str(everything[0].stages[0][1]) == "1/3"


@pytest.mark.parametrize("average", [20, 90.1, 401, 570, 1000])
def test_unreachable_names_the_nearest(average):
    keeps = (Fraction(1, 2), Fraction(1, 3))
    distance, layers = brute_force(12, 576, average, keeps, 1000)[0]
    plan = PruningPlan(tuple(zip(layers, keeps, strict=True)))
    with pytest.raises(PlanError) as error:
        solve_plans(12, 576, average, 2, keeps, tolerance=0)
    assert distance > 0
    assert f"{plan.average_tokens(576, 12):.6g} with plan {str(plan)!r}" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drops": 0}, "drops 0 must be a whole number from 1"),
        ({"drops": 33}, r"33 drops don't fit into layers 0\.\.31"),
        ({"keep": (0.5, 0.5)}, "2 ratios for 3 drops"),
        ({"keep": 1.5}, r"keep ratio 1.5 at layer 0 must be in \(0, 1\]"),
        ({"average": 0}, "average 0 must be above 0"),
        ({"average": "many"}, "average 'many' is not a number"),
        ({"tolerance": -0.1}, "tolerance -0.1 at least 0"),
        ({"num_layers": 0}, "num_layers 0"),
        ({"limit": 0}, "limit 0"),
        ({"first_layer": 30}, r"3 drops don't fit into layers 30\.\.31"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = {"num_layers": 32, "num_vision_tokens": 576, "average": 192} | changes
    with pytest.raises(PlanError, match=message):
        solve_plans(**arguments)
