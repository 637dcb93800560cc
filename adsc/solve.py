"""Which layers to drop at, so that a plan meets a budget: exhaustive search on exact integers.

A budget is the mean over decoder layers of the vision tokens entering each, the number that tables
of this field should share; `PlacementSearch` takes any other cost of layers. The search lists every
placement that meets it; it does not say which is best for accuracy, only which are possible.

Legend: n vision tokens of one image, L decoder layers, total = sum over layers of the tokens that
enter each = average * L.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate, pairwise, product
from math import ceil, floor

from adsc.plan import PlanError, PruningPlan
from adsc.tiles import are_whole

ANY = tuple(Fraction(1, n) for n in (2, 3, 4, 6, 8, 9, 16, 36))
"""The ratios that keep `any` tries at every drop."""
ANY_KEEP, MOST_ANY = "any", 3


def solve_plans(
    num_layers: int,
    num_vision_tokens: int,
    average: float,
    drops: int = 3,
    keep: float | str | Fraction | Sequence[float | str | Fraction] = 0.5,
    tolerance: float = 0.01,
    *,
    first_layer: int = 0,
    limit: int | None = None,
    anchor: str = "last",
    pool: str | None = None,
    exit_layer: int | None = None,
    lattice: tuple[int, int] | None = None,
) -> list[PruningPlan]:
    """All placements of `drops` drops whose layer average is within `tolerance` of `average`.

    Args:
        num_layers: L of the decoder.
        num_vision_tokens: of one image, before any drop.
        average: the budget, in vision tokens per layer.
        drops: how many layers drop tokens.
        keep: the share of tokens that stays at every drop, or one share per drop, in order; `any`
            tries all shares in ANY at each.
        tolerance: relative to `average`; 0.01 accepts 190.08..193.92 for 192.
        first_layer: the first layer at which a drop is legal; models that inject vision features
            into their first layers (Qwen3-VL) need one above 0.
        limit: only that many of the first; None for all of them.
        anchor: of the plans.
        pool: `tiles` or `runs` for plans that average instead of dropping.
        exit_layer: the plans end with an exit before this layer: their drops come before it, and
            no vision tokens are left from it on. None for plans without an exit.
        lattice: (height, width) of the image's tokens; with pool `tiles`, plans all of whose tiles
            are whole and alike (24 x 24 to 12 x 12, 8 x 8, 6 x 6) come first.

    Returns:
        Plans, the closest to the budget first, equally close ones by their layers.

    Raises:
        PlanError: arguments out of range, or no placement meets the budget; the message then names
            the nearest average that can be reached, and its plan.

    >>> [str(plan) for plan in solve_plans(32, 576, 192, drops=1, keep="1/9")]
    ['8:1/9']
    >>> how = {"pool": "tiles", "lattice": (24, 24), "tolerance": 0}
    >>> [str(plan) for plan in solve_plans(32, 576, 128, 1, "any", **how)]
    ['4:1/9;pool=tiles']
    """
    shapes = _ratios(drops, keep)
    last = _check_exit(exit_layer, num_layers)
    _check_counts(last, num_vision_tokens, drops, first_layer, limit)
    target, slack = _as_fraction("average", average), _as_fraction("tolerance", tolerance)
    if target <= 0 or slack < 0:
        raise PlanError(
            f"average {average} must be above 0 and tolerance {tolerance} at least 0: "
            "write average=192, tolerance=0.01"
        )
    leave = () if exit_layer is None else ((exit_layer, Fraction(0)),)
    words = PruningPlan(stages=leave, anchor=anchor, pool=pool)
    slack_total = slack * target * num_layers
    searches = list(_searches(shapes, num_vision_tokens, last, first_layer, target * num_layers))
    found = (
        (uneven, distance, layers, ratios)
        for ratios, counts, search in searches
        for uneven in [pool == "tiles" and not (lattice and are_whole(lattice, counts))]
        for distance, layers in search.within(slack_total)
    )
    best = sorted(found) if limit is None else heapq.nsmallest(limit, found)
    if best:
        return [_plan(layers, ratios, words) for *_, layers, ratios in best]
    raise PlanError(
        f"no placement of {drops} {'drop' if drops == 1 else 'drops'} keeping "
        f"{keep if keep == ANY_KEEP else _listed(shapes[0])} "
        f"of {num_vision_tokens} vision tokens in {num_layers} layers"
        + ("" if exit_layer is None else f" with an exit before layer {exit_layer}")
        + f" averages {float(target):g} within {float(slack):.3g}; the nearest is "
        + _nearest(searches, slack_total, target * num_layers, num_layers, words)
        + ": change drops, keep or tolerance"
    )


def _searches(
    shapes: Sequence[tuple[Fraction, ...]], n: int, layers: int, first: int, target: Fraction
) -> Iterator[tuple[tuple[Fraction, ...], list[int], PlacementSearch]]:
    """Ratios, the tokens that each leaves, and the search of their placements; ratios that leave as
    many as others once."""
    seen = set()
    for ratios in shapes:
        # The plan itself says how ratios are rounded; layers don't matter for the counts.
        counts = PruningPlan(stages=tuple(enumerate(ratios))).tokens_after_drops(n)
        if tuple(counts) not in seen:
            seen.add(tuple(counts))
            costs = [[count] * layers for count in (n, *counts)]
            yield ratios, counts, PlacementSearch(costs, first, target)


def _nearest(
    searches: Sequence[tuple[tuple[Fraction, ...], list[int], PlacementSearch]],
    slack: Fraction,
    target: Fraction,
    num_layers: int,
    words: PruningPlan,
) -> str:
    """The nearest average that one reaches, and its plan."""
    each = ((*search.nearest(slack), ratios) for ratios, _, search in searches)
    total, layers, ratios = min(each, key=lambda one: (abs(one[0] - target), one[1]))
    return f"{total / num_layers:.6g} with plan {str(_plan(layers, ratios, words))!r}"


def _listed(ratios: Sequence[Fraction]) -> str:
    return ", ".join(map(str, ratios))


class PlacementSearch:
    """Depth-first over increasing layers, cutting branches whose totals can't come close enough.

    Args:
        costs: row s holds, for each decoder layer, what the layer costs after s drops, in whole
            units (tokens, FLOPs, bytes); no row may cost more in any layer than the one before it.
        first_layer: the first layer at which a drop is legal.
        target: of the sum over layers.
    """

    def __init__(self, costs: Sequence[Sequence[int]], first_layer: int, target: Fraction):
        self.drops, self.num_layers = len(costs) - 1, len(costs[0])
        self.first_layer = first_layer
        self.target = target
        self._sums = [list(accumulate(row, initial=0)) for row in costs]

    def _cost(self, stage: int, start: int, end: int) -> int:
        """Of layers start..end-1 after `stage` drops."""
        return self._sums[stage][end] - self._sums[stage][start]

    def _bounds(self, stage: int, start: int, total: int) -> tuple[int, int]:
        """Smallest and largest total when drops `stage`.. go to layers >= `start`, the layers
        before `start` summing to `total`: as early, and as late, as they fit."""
        left, end = range(self.drops - stage), self.num_layers
        # A drop at a layer already shortens it, so its own layer costs what comes after it.
        early = sum(self._cost(stage + 1 + i, start + i, start + i + 1) for i in left)
        early += self._cost(self.drops, start + len(left), end)
        first = end - len(left)
        late = sum(self._cost(stage + 1 + i, first + i, first + i + 1) for i in left)
        late += self._cost(stage, start, first)
        return total + early, total + late

    def within(self, slack: Fraction) -> Iterator[tuple[Fraction, tuple[int, ...]]]:
        """Every placement at most `slack` from the target, as (distance, layers)."""
        opening = self._cost(0, 0, self.first_layer)
        # Comparing whole numbers is much faster than comparing fractions.
        least, most = ceil(self.target - slack), floor(self.target + slack)
        pending: list[tuple[tuple[int, ...], int, int]] = [((), self.first_layer, opening)]
        while pending:
            layers, start, total = pending.pop()
            stage = len(layers)
            low, high = self._bounds(stage, start, total)
            if low > most or high < least:
                continue
            if stage == self.drops:
                yield abs(low - self.target), layers
                continue
            last = self.num_layers - (self.drops - stage)
            for layer in range(start, last + 1):
                before = total + self._cost(stage, start, layer)
                after = before + self._cost(stage + 1, layer, layer + 1)
                pending.append(((*layers, layer), layer + 1, after))

    def nearest(self, slack: Fraction) -> tuple[int, tuple[int, ...]]:
        """The total nearest to the target and its first layers, when `slack` is known to be too
        little: widened until something is found, so that the search stays cut tightly."""
        while True:
            slack = max(2 * slack, Fraction(1))
            closest = min(self.within(slack), default=None)
            if closest is not None:
                return self.total(closest[1]), closest[1]

    def total(self, layers: Sequence[int]) -> int:
        """What all layers cost together under this placement."""
        edges = [0, *layers, self.num_layers]
        return sum(self._cost(stage, *edge) for stage, edge in enumerate(pairwise(edges)))


def _plan(layers: Sequence[int], ratios: Sequence[Fraction], words: PruningPlan) -> PruningPlan:
    """Drops before `layers`, then the exit of `words` if it has one, and its other options."""
    return replace(words, stages=(*zip(layers, ratios, strict=True), *words.stages))


def _check_exit(exit_layer: int | None, num_layers: int) -> int:
    """How many layers drops may go to."""
    if exit_layer is None:
        return num_layers
    if isinstance(exit_layer, bool) or not isinstance(exit_layer, int) or exit_layer < 1:
        raise PlanError(f"exit_layer {exit_layer!r} must be a whole number from 1")
    if exit_layer >= num_layers:
        raise PlanError(f"exit_layer {exit_layer}, but the decoder has layers 0..{num_layers - 1}")
    return exit_layer


def _as_fraction(name: str, value: object) -> Fraction:
    try:
        return Fraction(value).limit_denominator(10**6)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        raise PlanError(f"{name} {value!r} is not a number") from None


def _ratios(drops: int, keep: object) -> list[tuple[Fraction, ...]]:
    """The ratios of all drops, or all those to try."""
    if isinstance(drops, bool) or not isinstance(drops, int) or drops < 1:
        raise PlanError(f"drops {drops!r} must be a whole number from 1")
    if keep == ANY_KEEP:
        if drops > MOST_ANY:
            raise PlanError(
                f"keep 'any' tries {len(ANY)} ratios at each of {drops} drops, which are too many: "
                f"use at most {MOST_ANY} drops, or name the ratios"
            )
        return list(product(ANY, repeat=drops))
    if isinstance(keep, Sequence) and not isinstance(keep, str):
        if len(keep) != drops:
            raise PlanError(
                f"keep has {len(keep)} ratios for {drops} drops: give one ratio, or one per drop"
            )
        each: Sequence[object] = keep
    else:
        each = [keep] * drops
    ratios = tuple(ratio for _, ratio in PruningPlan(stages=tuple(enumerate(each))).stages)  # type: ignore[arg-type]
    if 0 in ratios:
        raise PlanError(
            "keep 0 is an exit, whose layer is given: give the ratios of the other drops, and the "
            "exit as exit_layer (adsc plan --exit LAYER)"
        )
    return [ratios]


def _check_counts(
    num_layers: int, num_vision_tokens: int, drops: int, first_layer: int, limit: int | None
) -> None:
    counts = [
        ("num_layers", num_layers, 1),
        ("num_vision_tokens", num_vision_tokens, 1),
        ("first_layer", first_layer, 0),
        ("limit", 1 if limit is None else limit, 1),
    ]
    for name, count, least in counts:
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise PlanError(f"{name} {count!r} must be a whole number from {least}")
    if drops > num_layers - first_layer:
        raise PlanError(
            f"{drops} drops don't fit into layers {first_layer}..{num_layers - 1}: each drop needs "
            "a layer of its own"
        )
