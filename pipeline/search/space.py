"""The space of a search: every plan that meets the budget, from the exact solver, and how near two
plans are.

A trial can't miss the budget, since only these plans exist; what a sampler proposes is a point, and
the trial is the plan nearest to it. The point's coordinates say at which depth the vision tokens
fall to given shares: plans that keep nearly the same tokens nearly as long are near, whatever their
number of drops. Nothing here knows models' weights, Optuna or Ray.

Legend: n vision tokens of one picture, L decoder layers, N placements (plans without anchor).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from typing import Any, NamedTuple

import numpy as np

import adsc
from adsc.costs.geometries import geometry
from adsc.families.family import ImageInput
from adsc.families.table import image_cost
from adsc.plan import PlanError, PruningPlan, kept_count
from adsc.solve import PlacementSearch
from adsc.tiles import are_whole
from pipeline.search.config import UNITS, SearchConfig

SHARES = (0.75, 0.5, 0.35, 0.25, 0.125, 0.0625)
"""Shares of the vision tokens whose depths are a plan's coordinates."""
KNOWN_AT_MOST = 0.05
"""How far a known placement's ratio may leave it from the budget, as a share of it, where counts of
tokens are too coarse for the tolerance."""


class Candidate(NamedTuple):
    """A plan of the space, or a known one."""

    plan: str
    cost: float
    """In the budget's unit."""
    code: tuple[float, ...]
    """Depth (share of the decoder, 1 is its end) at which each of SHARES is reached."""


@dataclass(frozen=True)
class _Everywhere:
    """A stand-in for a plan: so many vision tokens in all layers."""

    count: int

    def tokens_per_layer(self, num_vision_tokens: int, num_layers: int) -> list[int]:
        return [self.count] * num_layers


class Costs:
    """Costs of layers in the budget's unit, as whole numbers.

    Args:
        model: a transformers config, or the name of a geometry.
        config: budget, text tokens and picture size.
        prefill: for `prefill_ms`: vision tokens in every layer -> milliseconds of the prefill, for
            a few numbers of tokens (pipeline/search/trial.py measures them).
    """

    def __init__(
        self, model: Any, config: SearchConfig, prefill: dict[int, float] | None = None
    ) -> None:
        self.unit = config.budget[0]
        self._how: dict[str, Any] = {
            "text_tokens": config.text_tokens,
            "image_size": config.image_size,
        }
        self._model = model
        dense = adsc.estimate_cost(model, None, **self._how)
        self.num_layers = len(dense.per_layer)
        self.num_vision_tokens = dense.per_layer[0].vision_tokens
        self.lattice = lattice_of(model, config.image_size)
        self._rows: dict[int, list[int]] = {}
        self._outside = dense.vision_flops + dense.logits_flops if self.unit == "gflops" else 0
        self._scale = {
            "average": self.num_layers, "gflops": 10**9, "kv_mib": 2**20, "prefill_ms": 10**6,
        }[self.unit]  # fmt: skip
        self._prefill = None if prefill is None else _rising(prefill)
        if self.unit == "prefill_ms" and prefill is None:
            raise ValueError("a budget of measured prefill time needs the times; run the search")

    def row(self, count: int) -> list[int]:
        """The cost of each layer when `count` vision tokens enter it."""
        if count not in self._rows:
            self._rows[count] = self._row(count)
        return self._rows[count]

    def _row(self, count: int) -> list[int]:
        if self.unit == "average":
            return [count] * self.num_layers
        if self._prefill is not None:
            # A layer's share of a prefill whose layers all see `count` tokens, in nanoseconds.
            time = 10**6 * np.interp(count, *self._prefill) / self.num_layers
            return [round(time)] * self.num_layers
        layers = adsc.estimate_cost(self._model, _Everywhere(count), **self._how).per_layer
        if self.unit == "gflops":
            return [layer.flops for layer in layers]
        return [layer.kv_cache_bytes for layer in layers]

    def value(self, total: int | Fraction) -> float:
        """A sum over layers, in the budget's unit."""
        return float((total + self._outside) / self._scale)

    def total(self, value: float) -> Fraction:
        """The inverse of `value`."""
        return Fraction(value).limit_denominator(10**9) * self._scale - self._outside

    def of(self, plan: PruningPlan) -> float:
        """The cost of a plan."""
        counts = plan.tokens_per_layer(self.num_vision_tokens, self.num_layers)
        return self.value(sum(self.row(count)[layer] for layer, count in enumerate(counts)))


def lattice_of(model: Any, image_size: tuple[int, int] | None) -> tuple[int, int] | None:
    """(height, width) of a picture's vision tokens, if they lie on one lattice."""
    config = geometry(model) if isinstance(model, str) else model
    return image_cost(config, ImageInput(size=image_size)).lattice


def _rising(times: dict[int, float]) -> tuple[list[int], list[float]]:
    """Measured times without the noise by which more tokens would cost less."""
    counts = sorted(times)
    return counts, np.maximum.accumulate([times[count] for count in counts]).tolist()


class Space:
    """All plans that meet a budget.

    Attributes:
        stages: (layer, keep) pairs of each placement.
        costs: (N,) in the budget's unit.
        codes: (N, len(SHARES)) coordinates.
        left_out: known placements that can't meet the budget -> why.

    Raises:
        PlanError: no plan meets it; the message names the nearest budget that one meets.
    """

    def __init__(self, costs: Costs, config: SearchConfig) -> None:
        self.of, self.config, self.anchors = costs, config, config.anchors
        self._words = self._words_of(costs.num_layers)
        self.left_out: dict[str, str] = {}
        if config.plan:
            self._only(PruningPlan.parse(config.plan))
            return
        _, low, high = config.budget
        target = (costs.total(low) + costs.total(high)) / 2
        slack = costs.total(high) - target
        self.stages: list[tuple[tuple[int, Fraction], ...]] = []
        totals: list[int] = []
        nearest: list[tuple[Fraction, int, Any]] = []
        behind = self._behind_exit()
        for ratios, search in self._shapes(target - behind):
            for _, layers in sorted(search.within(slack)):
                self.stages.append((*zip(layers, ratios, strict=True), *self._words.stages))
                totals.append(search.total(layers) + behind)
            if not totals:
                total, layers = search.nearest(slack)
                total += behind
                stages = (*zip(layers, ratios, strict=True), *self._words.stages)
                nearest.append((abs(total - target), total, stages))
        if not totals:
            raise PlanError(self._unreachable(nearest))
        self.costs = np.array([costs.value(total) for total in totals])
        self.codes = np.array([self.code(stages) for stages in self.stages])

    def _only(self, plan: PruningPlan) -> None:
        plan.check_layers(self.of.num_layers)
        if not plan.stages:
            raise PlanError(
                f"search.plan = {self.config.plan!r} drops nothing; give a plan that does"
            )
        self._words, self.stages = plan, [plan.stages]
        self.anchors = (plan.anchor,)  # type: ignore[assignment]
        self.costs = np.array([self.of.of(plan)])
        self.codes = np.array([self.code(plan.stages)])

    def _words_of(self, layers: int) -> PruningPlan:
        """The common part of all plans: their exit and their pool."""
        leave = self.config.exit_layer
        if leave is not None and leave >= layers:
            raise PlanError(
                f"search.exit_layer = {leave}, but the decoder has layers 0..{layers - 1}"
            )
        stages = () if leave is None else ((leave, Fraction(0)),)
        return PruningPlan(stages=stages, pool=self.config.pool)

    def _behind_exit(self) -> int:
        """The cost of the layers after the exit."""
        leave = self.config.exit_layer
        return 0 if leave is None else sum(self.of.row(0)[leave:])

    def _plan(self, stages: Sequence[tuple[int, Fraction]], anchor: str) -> PruningPlan:
        return replace(self._words, stages=tuple(stages), anchor=anchor)

    def _shapes(self, target: Fraction) -> Any:
        """Ratios of each number of drops, with their search; those of equal counts once, and those
        whose tiles are whole first."""
        n, layers, first = self.of.num_vision_tokens, self.of.num_layers, self.config.first_layer
        layers = layers if self.config.exit_layer is None else self.config.exit_layer
        drops = [count for count in self.config.drops if count <= layers - first]
        if not drops:
            raise PlanError(
                f"drops {self.config.drops} don't fit into layers {first}..{layers - 1}: each drop "
                "needs a layer of its own"
            )
        shapes: dict[tuple[int, ...], tuple[Fraction, ...]] = {}
        for count in drops:
            for keeps in product(self.config.keeps, repeat=count):
                shape = PruningPlan(stages=tuple(enumerate(keeps)))  # type: ignore[arg-type]
                counts = (n, *shape.tokens_after_drops(n))
                if len(set(counts)) == len(counts):
                    shapes.setdefault(counts, tuple(ratio for _, ratio in shape.stages))
        for counts in sorted(shapes, key=self._is_uneven):
            costs = [self.of.row(count)[:layers] for count in counts]
            yield shapes[counts], PlacementSearch(costs, first, target)

    def _is_uneven(self, counts: Sequence[int]) -> bool:
        lattice = self.of.lattice
        whole = lattice is not None and are_whole(lattice, counts[1:])
        return self.config.pool == "tiles" and not whole

    def _unreachable(self, nearest: Sequence[tuple[Fraction, int, Any]]) -> str:
        name, low, high = self.config.budget
        config = self.config
        problem = (
            f"no plan of {' or '.join(map(str, config.drops))} drops keeping "
            f"{', '.join(config.keeps)} costs {low:g} to {high:g} {UNITS[name]} "
            f"({self.of.num_vision_tokens} vision tokens, {self.of.num_layers} layers)"
        )
        if not nearest:
            return f"{problem}: these ratios drop nothing; change search.keeps"
        _, total, stages = min(nearest)
        return (
            f"{problem}; the nearest is {name} = {self.of.value(total):.6g} with plan "
            f"{str(self._plan(stages, self.anchors[0]))!r}: change the budget, search.tolerance, "
            "search.drops or search.keeps"
        )

    def __len__(self) -> int:
        """Plans: placements times anchors."""
        return len(self.stages) * len(self.anchors)

    def code(self, stages: Sequence[tuple[int, Fraction]]) -> tuple[float, ...]:
        """Coordinates of a placement; see SHARES."""
        n, depths = self.of.num_vision_tokens, self.of.num_layers
        left, at = n, []
        for layer, keep in stages:
            left = kept_count(left, keep)
            at.append((left / n, layer / depths))
        return tuple(
            next((depth for share_left, depth in at if share_left <= share), 1.0)
            for share in SHARES
        )

    def candidate(self, number: int, anchor: str) -> Candidate:
        """A placement with an anchor."""
        plan = self._plan(self.stages[number], anchor)
        return Candidate(str(plan), float(self.costs[number]), tuple(self.codes[number].tolist()))

    def draw(self, rng: np.random.Generator, without: Collection[str]) -> Candidate | None:
        """A plan that is not in `without`, drawn uniformly; None if none is left."""
        if len(self) > 4 * len(without):
            while True:
                number, anchor = divmod(int(rng.integers(len(self))), len(self.anchors))
                found = self.candidate(number, self.anchors[anchor])
                if found.plan not in without:
                    return found
        each = (self.candidate(i, a) for i in range(len(self.stages)) for a in self.anchors)
        left = [found for found in each if found.plan not in without]
        return left[int(rng.integers(len(left)))] if left else None

    def nearest(
        self, code: Sequence[float], anchor: str, without: Collection[str]
    ) -> Candidate | None:
        """The plan nearest to a point, of those with this anchor that are not among `without`."""
        distance = np.abs(self.codes - np.asarray(code)).sum(1)
        for number in np.argsort(distance, kind="stable"):
            found = self.candidate(int(number), anchor)
            if found.plan not in without:
                return found
        return None

    def known(self) -> dict[str, Candidate]:
        """Placements that people choose by hand, at this budget (of a range, at its ends and its
        middle), by name.

        `thirds` drops at the start of each third of the decoder, `pyramiddrop` where PyramidDrop
        does, both by one ratio that is solved for; `early`, `middle` and `late` are those of the
        solver's with three drops (or the most there are) and one ratio whose first drop comes as
        early, in between, and as late as the budget allows.

        Raises:
            PlanError: a plan of `config.known` that doesn't meet the budget.
        """
        if self.config.plan:
            return {"as configured": self.candidate(0, self.anchors[0])}
        name, low, high = self.config.budget
        levels = [low, (low + high) / 2, high] if self.config.front else [(low + high) / 2]
        found: dict[str, Candidate] = {}
        for text in self.config.known:
            plan = PruningPlan.parse(text)
            plan.check_layers(self.of.num_layers)
            cost = self.of.of(plan)
            if not low <= cost <= high:
                raise PlanError(
                    f"the known plan {text!r} costs {cost:.6g} {UNITS[name]}, the budget is "
                    f"{low:g} to {high:g}: leave it out of search.known, or change the budget"
                )
            found[text] = Candidate(str(plan), cost, self.code(plan.stages))
        for level in levels:
            mark = f"@{level:.4g}" if len(levels) > 1 else ""
            third, quarter = self.of.num_layers / 3, self.of.num_layers / 4
            by_hand = {
                "thirds": [0, round(third), round(2 * third)],
                "pyramiddrop": [round(quarter * i) for i in (1, 2, 3)],
            }
            for title, layers in by_hand.items():
                self._by_hand(found, title + mark, layers, level)
            for title, number in self._by_first_layer(level).items():
                found[title + mark] = self.candidate(number, self.anchors[0])
        once: dict[str, Candidate] = {}
        for title, one in found.items():
            if one.plan not in {other.plan for other in once.values()}:
                once[title] = one
        return once

    def _by_hand(
        self, found: dict[str, Candidate], title: str, layers: Sequence[int], level: float
    ) -> None:
        first = max(self.config.first_layer, layers[0])
        layers = [first, *(layer for layer in layers[1:] if layer > first)]
        ratio = self._common_ratio(layers, level)
        plan = self._at(layers, ratio)
        cost = self.of.of(plan)
        allowed = max(self.config.tolerance, KNOWN_AT_MOST)
        if abs(cost - level) > allowed * level:
            unit = UNITS[self.config.budget[0]]
            self.left_out[title] = f"its nearest cost is {cost:.4g} {unit} ({plan})"
            return
        found[title] = Candidate(str(plan), cost, self.code(plan.stages))

    def _at(self, layers: Sequence[int], ratio: Fraction) -> PruningPlan:
        """One ratio at all these layers, before the exit if there is one."""
        last = self.of.num_layers if self.config.exit_layer is None else self.config.exit_layer
        drops = tuple((layer, ratio) for layer in layers if layer < last)
        return self._plan((*drops, *self._words.stages), self.anchors[0])

    def _common_ratio(self, layers: Sequence[int], level: float) -> Fraction:
        """The ratio of all these drops whose cost is nearest to a level."""
        n = self.of.num_vision_tokens

        def cost(share: Fraction) -> float:
            return self.of.of(self._at(layers, share))

        fine = 4 * n
        low, high = 1, fine  # the cost rises with the ratio
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cost(Fraction(middle, fine)) <= level else (low, middle)
        return min((Fraction(low, fine), Fraction(high, fine)), key=lambda r: abs(cost(r) - level))

    def _by_first_layer(self, level: float) -> dict[str, int]:
        """Numbers of three placements of the solver's; see `known`."""
        _, low, high = self.config.budget
        near = np.abs(self.costs - level) <= max(self.config.tolerance * level, (high - low) / 20)
        near |= np.abs(self.costs - level) == np.abs(self.costs - level).min()
        placed = [[pair for pair in stages if pair[1]] for stages in self.stages]
        drops = np.array([len(stages) for stages in placed])
        wanted = min((abs(3 - count), count) for count in set(drops[near].tolist()))[1]
        even = np.array([len({keep for _, keep in stages}) == 1 for stages in placed])
        pool = near & (drops == wanted)
        if (pool & even).any():
            pool &= even

        def key(number: int) -> tuple[int, ...]:
            return tuple(layer for layer, _ in self.stages[number])

        ordered = sorted(np.flatnonzero(pool).tolist(), key=key)
        return {"early": ordered[0], "middle": ordered[len(ordered) // 2], "late": ordered[-1]}
