"""Uniform stride without training: our plan with one drop, the simplest thing to compare with.

The drop is where FastV's is, before layer 2, so that both keep as many tokens in the same layers
and differ only in which. It is a PruningPlan: nothing is scored, nothing is merged.
"""

from __future__ import annotations

from adsc.method import Budget, as_whole
from adsc.plan import PruningPlan

LAYER = 2


def fit(
    budget: Budget, layer: int | None = None, anchor: str = "last", positions: str | None = None
) -> PruningPlan:
    """One drop before `layer`: 2, or the first layer that the family allows if that is later."""
    layer = max(LAYER, budget.first) if layer is None else as_whole("layer", layer, 0)
    return PruningPlan(budget.cut(layer), anchor, budget.positions(positions, "keep"))
