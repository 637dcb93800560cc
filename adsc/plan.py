"""Pruning plans: at which decoder layers vision tokens are dropped, how many stay, which, and
whether they take the mean of those that go.

A plan is pure data and arithmetic on integers: it knows nothing of models or tensors. The rule is
that of ADSC (Deniz et al., arXiv 2602.12618): a fixed downsampling ratio at selected decoder
layers, independent of content.

Legend: n vision tokens of one image before a drop, m after it; L decoder layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any

from adsc.tiles import Group, Region, Sheet, partition

ANCHORS = ("last", "first", "center", "grid")
POSITIONS = ("keep", "reindex")
POOLS = ("tiles", "runs")


class PlanError(ValueError):
    """An invalid pruning plan; the message has the value, the rule and what to do."""


def _as_ratio(keep: object, layer: int) -> Fraction:
    try:
        # A float is meant as the simple ratio it was typed for: 0.3333333333333333 is 1/3.
        given = Fraction(keep)  # type: ignore[call-overload]
        ratio = given.limit_denominator(10**6)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        raise PlanError(
            f"keep ratio {keep!r} at layer {layer} is not a number; write 0.5 or 1/2"
        ) from None
    if given < 0 or ratio > 1:
        raise PlanError(
            f"keep ratio {keep} at layer {layer} must be in (0, 1]: it is the share of tokens "
            "that stay; 0, an exit, may only be the last"
        )
    return ratio or Fraction(bool(given), 10**6)


@dataclass(frozen=True)
class PruningPlan:
    """Where and how much to drop: before decoder layer `layer` runs, each image keeps `keep` of its
    vision tokens.

    Args:
        stages: pairs (layer, keep), layers strictly increasing from 0, keep in (0, 1]. The last
            may keep 0: an exit, which drops all vision tokens from that layer on. Empty: nothing
            is dropped.
        anchor: which token of each of m equal groups stays: `last`, `first`, `center`; or `grid`, a
            two-dimensional ordered-dither pattern for tokens on an h x w lattice.
        positions: `keep` leaves kept tokens their original position ids; `reindex` renumbers after
            each drop.
        pool: None drops the other tokens of a group. With `tiles` (of the image's lattice,
            `adsc.tiles`) and `runs` (of its sequence), the mean of the group's hidden states takes
            the anchor's place and position id. The anchor is then a member in row order: `last` is
            the bottom right token of a tile.

    Raises:
        PlanError: a layer that is negative, repeated or out of order, a ratio outside (0, 1] or an
        exit that is not the last pair, an unknown word, `grid` with a pool.

    >>> plan = PruningPlan.parse("8:1/2,16:1/2,24:1/2")
    >>> plan.average_tokens(576, 32), str(plan)
    (270.0, '8:1/2,16:1/2,24:1/2')
    """

    stages: tuple[tuple[int, Fraction], ...] = ()
    anchor: str = "last"
    positions: str = "keep"
    pool: str | None = None
    text: str = field(init=False, repr=False, compare=False)  # str(self), made once

    def __post_init__(self) -> None:
        checked: list[tuple[int, Fraction]] = []
        if not isinstance(self.stages, Iterable):
            raise PlanError(
                f"stages {self.stages!r} are not pairs (layer, keep); () is the empty plan"
            )
        for stage in self.stages:
            try:
                layer, keep = stage
            except (TypeError, ValueError):
                raise PlanError(
                    f"stage {stage!r} is not a pair (layer, keep), such as (8, 0.5)"
                ) from None
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise PlanError(
                    f"layer {layer!r} must be a whole number from 0: decoder layers are 0..L-1"
                )
            if checked and layer <= checked[-1][0]:
                raise PlanError(
                    f"layer {layer} after layer {checked[-1][0]}: layers must be strictly "
                    "increasing"
                )
            if checked and checked[-1][1] == 0:
                raise PlanError(
                    f"layer {layer} after an exit: keep 0 at layer {checked[-1][0]} leaves no "
                    "vision token to drop; make the exit the last pair"
                )
            checked.append((layer, _as_ratio(keep, layer)))
        object.__setattr__(self, "stages", tuple(checked))
        for name, allowed in (("anchor", ANCHORS), ("positions", POSITIONS)):
            if getattr(self, name) not in allowed:
                raise PlanError(
                    f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}"
                )
        if self.pool is not None and self.pool not in POOLS:
            raise PlanError(
                f"pool {self.pool!r} is unknown; choose one of {', '.join(POOLS)}, or leave it out "
                "to drop tokens"
            )
        if self.pool is not None and self.anchor == "grid":
            raise PlanError(
                f"anchor 'grid' with pool={self.pool}: a mean takes the position of a member of "
                "its group; use anchor last, first or center"
            )
        object.__setattr__(self, "text", str(self))

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        anchor: str | None = None,
        positions: str | None = None,
        pool: str | None = None,
    ) -> PruningPlan:
        """Read `layer:keep,layer:keep`, optionally followed by `;anchor=WORD`, `;positions=WORD`
        and `;pool=WORD`.

        >>> PruningPlan.parse("2:1/3;anchor=first").anchor
        'first'
        """
        head, *options = text.split(";")
        words: dict[str, str] = {}
        for option in options:
            name, _, value = (part.strip() for part in option.partition("="))
            if name not in ("anchor", "positions", "pool"):
                raise PlanError(
                    f"option {option.strip()!r} in plan {text!r} is unknown; use anchor=..., "
                    "positions=... or pool=..."
                )
            words[name] = value
        for name, given in (("anchor", anchor), ("positions", positions), ("pool", pool)):
            if given is not None:
                words[name] = given
        stages = []
        for part in filter(None, (piece.strip() for piece in head.split(","))):
            match = re.fullmatch(r"(\d+)\s*:\s*(\S+)", part)
            if match is None:
                raise PlanError(
                    f"{part!r} in plan {text!r} is not layer:keep; write for example 8:1/2,16:1/2"
                )
            stages.append((int(match[1]), match[2]))
        return cls(stages=stages, **words)  # type: ignore[arg-type]

    def __str__(self) -> str:
        parts = [",".join(f"{layer}:{keep}" for layer, keep in self.stages)]
        parts += [f"anchor={self.anchor}"] * (self.anchor != "last")
        parts += [f"positions={self.positions}"] * (self.positions != "keep")
        parts += [f"pool={self.pool}"] * (self.pool is not None)
        return ";".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, as stored in a checkpoint's config; `pool` only if set."""
        stages = [[layer, str(keep)] for layer, keep in self.stages]
        data = {"stages": stages, "anchor": self.anchor, "positions": self.positions}
        return data if self.pool is None else {**data, "pool": self.pool}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PruningPlan:
        """The inverse of `to_dict`. Raises PlanError for unknown or ill-typed fields."""
        unknown = set(data) - {"stages", "anchor", "positions", "pool"}
        if unknown:
            raise PlanError(
                f"unknown fields {sorted(unknown)} in a plan; it has stages, anchor, positions and "
                "pool"
            )
        return cls(**{**data, "stages": data.get("stages", ())})

    def check_layers(self, num_layers: int) -> None:
        """Raise PlanError if a stage names a layer that a decoder of `num_layers` does not have."""
        beyond = [layer for layer, _ in self.stages if layer >= num_layers]
        if beyond:
            raise PlanError(
                f"plan {str(self)!r} drops at layer {beyond[0]}, but the decoder has layers "
                f"0..{num_layers - 1}"
            )

    def tokens_after_drops(self, num_vision_tokens: int) -> list[int]:
        """Vision tokens of one image left after each stage, in order."""
        counts, n = [], num_vision_tokens
        for _, keep in self.stages:
            n = kept_count(n, keep)
            counts.append(n)
        return counts

    def share_at(self, layer: int) -> Fraction:
        """The share of the vision tokens that enters a layer, before rounding.

        >>> PruningPlan.parse("2:1/2,4:1/4").share_at(4)
        Fraction(1, 8)
        """
        return math.prod((keep for at, keep in self.stages if at <= layer), start=Fraction(1))

    def tokens_per_layer(self, num_vision_tokens: int, num_layers: int) -> list[int]:
        """Vision tokens of one image that enter each decoder layer, one number per layer."""
        self.check_layers(num_layers)
        counts = [num_vision_tokens, *self.tokens_after_drops(num_vision_tokens)]
        return tokens_entering([layer for layer, _ in self.stages], counts, num_layers)

    def average_tokens(self, num_vision_tokens: int, num_layers: int) -> float:
        """Mean over layers of the vision tokens entering each layer."""
        return sum(self.tokens_per_layer(num_vision_tokens, num_layers)) / num_layers

    def reduction(self, num_vision_tokens: int, num_layers: int) -> float:
        """1 - average / initial, 0 to 1; 0.667 is the paper's main setting."""
        return 1 - self.average_tokens(num_vision_tokens, num_layers) / num_vision_tokens

    @property
    def exit(self) -> int | None:
        """The layer from which on there are no vision tokens; None without an exit."""
        return self.stages[-1][0] if self.stages and self.stages[-1][1] == 0 else None

    def kept_indices(
        self,
        num_vision_tokens: int,
        lattice: tuple[int, int] | None = None,
        regions: tuple[Region, ...] = (),
    ) -> list[tuple[int, ...]]:
        """For each stage, the original vision tokens left after it, as sorted, nested index tuples.

        Args:
            num_vision_tokens: tokens of this image before any drop.
            lattice: (height, width) of the token grid; anchor `grid` and pool `tiles` need it.
            regions: for a pool, the lattices of an image that has several.
        """
        if self.pool is not None:
            stages = self.groups(num_vision_tokens, lattice, regions)
            return [tuple(group.anchor for group in groups) for groups in stages]
        kept: list[tuple[int, ...]] = []
        current: Sequence[int] = range(num_vision_tokens)
        for _, keep in self.stages:
            current = _downsample(
                current, kept_count(len(current), keep), self.anchor, num_vision_tokens, lattice
            )
            kept.append(tuple(current))
        return kept

    def groups(
        self,
        num_vision_tokens: int,
        lattice: tuple[int, int] | None = None,
        regions: tuple[Region, ...] = (),
    ) -> list[tuple[Group, ...]]:
        """For each stage of a plan with a pool, the groups that become one token each, by anchor.

        Members are the tokens left before the stage, so every token of an image is in one group,
        and groups nest. An exit has none. The arguments are those of `kept_indices`.

        Raises:
            PlanError: `tiles` without a lattice, or fewer tokens to keep than there are regions.

        >>> plan = PruningPlan.parse("0:1/4;pool=tiles")
        >>> plan.groups(16, (4, 4))[0][0]
        Group(anchor=5, members=(0, 1, 4, 5))
        """
        sheets = self._sheets(num_vision_tokens, lattice, regions)
        stages: list[tuple[Group, ...]] = []
        n = num_vision_tokens
        for layer, keep in self.stages:
            m = kept_count(n, keep)
            groups: list[Group] = []
            if 0 < m < len(sheets):
                raise PlanError(
                    f"plan {str(self)!r} keeps {m} of {n} tokens at layer {layer}, but the image "
                    f"has {len(sheets)} parts (overview, crops, row ends) that are not averaged "
                    f"together: keep at least {len(sheets)}/{n}, or leave out "
                    f"pool={self.pool} to drop tokens"
                )
            if m:
                groups, sheets = partition(sheets, m, self.anchor, self.pool == "runs")
            n = m
            stages.append(tuple(groups))
        return stages

    def _sheets(
        self, total: int, lattice: tuple[int, int] | None, regions: tuple[Region, ...]
    ) -> list[Sheet]:
        """The tokens that may be averaged together, before the first drop."""
        if not regions and lattice is not None:
            regions = (Region(*lattice, 0, lattice[1]),)
        if sum(region.height * region.width for region in regions) == total:
            return [region.sheet() for region in regions]
        if self.pool == "runs":
            return [[range(total)]]
        raise PlanError(
            f"pool=tiles needs vision tokens on an h x w lattice, but {total} tokens came with "
            f"lattice {lattice}; use pool=runs for this model"
        )


def kept_count(n: int, keep: Fraction) -> int:
    """m = max(1, floor(n * keep + 1/2)); 0 tokens stay 0, and an exit (keep 0) leaves 0."""
    if n == 0 or keep == 0:
        return 0
    return max(1, (2 * n * keep.numerator + keep.denominator) // (2 * keep.denominator))


def _downsample(
    current: Sequence[int], m: int, anchor: str, total: int, lattice: tuple[int, int] | None
) -> Sequence[int]:
    n = len(current)
    if m == 0:
        return ()
    if anchor == "last":
        return [current[((j + 1) * n) // m - 1] for j in range(m)]
    if anchor == "first":
        return [current[(j * n) // m] for j in range(m)]
    if anchor == "center":
        return [current[((2 * j + 1) * n) // (2 * m)] for j in range(m)]
    if lattice is None or lattice[0] * lattice[1] != total:
        raise PlanError(
            f"anchor 'grid' needs vision tokens on an h x w lattice, but {total} tokens came with "
            f"lattice {lattice}; "
            "use anchor last, first or center for this model"
        )
    rank = _dither_rank(*lattice)
    return sorted(sorted(current, key=rank.__getitem__)[:m])


@lru_cache(maxsize=64)
def _dither_rank(height: int, width: int) -> tuple[int, ...]:
    """Rank of each lattice cell in ordered dithering (Bayer 1973), anchored at the bottom right of
    each block.

    Any prefix of the ranking is spread evenly in two dimensions and contains every shorter prefix:
    a quarter is every other row and column, a half a checkerboard.
    """
    bits = max(height - 1, width - 1, 1).bit_length()

    def bayer(y: int, x: int) -> int:
        value = 0
        for bit in range(bits):
            row, column = (y >> bit) & 1, (x >> bit) & 1
            value = value << 2 | (row ^ column) << 1 | row
        return value

    cells = [bayer(height - 1 - y, width - 1 - x) for y in range(height) for x in range(width)]
    order = {value: rank for rank, value in enumerate(sorted(cells))}
    return tuple(order[value] for value in cells)


def tokens_entering(layers: Sequence[int], counts: Sequence[int], num_layers: int) -> list[int]:
    """Tokens that enter each layer: counts[0] at first, counts[i + 1] from layers[i] on."""
    return [counts[sum(at <= layer for at in layers)] for layer in range(num_layers)]


def as_plan(plan: PruningPlan | str | Iterable[tuple[int, float]]) -> PruningPlan:
    """Accept a plan, its text form, or pairs (layer, keep)."""
    if isinstance(plan, PruningPlan):
        return plan
    if isinstance(plan, str):
        return PruningPlan.parse(plan)
    return PruningPlan(stages=tuple(plan) if isinstance(plan, Iterable) else plan)  # type: ignore[arg-type]
