"""The mean of a group's hidden states in the place of one member: pooled drops on tensors.

Which tokens make up a group is the plan's to say (`adsc.tiles`); here its numbers become indices
into the flattened hidden states of a call, made before the first layer runs, and the means are
taken: a gather and a sum over its second axis, in fp32 at least, so that results do not depend on
the order in which a device adds up. Nothing here knows of models, caches or attention.

Legend: B rows, S columns of the call, Q columns left in a segment, N vision tokens of one kind in
the batch, G groups of the batch, M members of the largest group, D width.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adsc.dropping.memo import remembered
from adsc.dropping.segment import Pooling, Segment
from adsc.plan import PruningPlan
from adsc.tiles import Region

if TYPE_CHECKING:
    from adsc.families.family import Image


def with_pooling(
    segments: list[Segment], columns: Tensor, images: list[Image], plan: PruningPlan
) -> list[Segment]:
    """The segments after each drop with the groups of one kind of vision token.

    Args:
        columns: (B, S) bool, where they are.
        images: of the batch, row by row.
    """
    rows, width = columns.shape
    tables = _tables(tuple(images), plan, columns.device)
    total, flat = sum(image.tokens for image in images), columns.flatten()
    every = torch.arange(rows * width, device=columns.device)
    # What is no vision token goes to one place too many, cut off below; as in `_moved`.
    ordinal = torch.where(flat, flat.cumsum(0) - 1, total)
    column = every.new_zeros(total + 1).scatter_(0, ordinal, every)[:total]
    slot, pooled = every, []
    for segment, table in zip(segments, tables, strict=True):
        before, slot = slot, _slots(segment, rows, width)
        if table is not None:
            anchors, members, sizes, even = table
            places = before[column[members.clamp(min=0)]]
            if not even:
                places = places.masked_fill(members < 0, -1)
            pooling = Pooling(places, slot[column[anchors]], sizes, even)
            segment = replace(segment, pooling=(*segment.pooling, pooling))
        pooled.append(segment)
    return pooled


def _slots(segment: Segment, rows: int, width: int) -> Tensor:
    """(B * S,): where each column of the flattened call is in the flattened segment; something or
    other for columns that are not left."""
    columns = segment.columns
    first = torch.arange(0, rows * width, width, device=columns.device).unsqueeze(1)
    place = columns + first
    if segment.valid is not None:
        place = torch.where(segment.valid, place, rows * width)
    every = torch.arange(columns.numel(), device=columns.device)
    slots = every.new_zeros(rows * width + 1).scatter_(0, place.flatten(), every)
    return slots[: rows * width]


Tables = list[tuple[Tensor, Tensor, Tensor, bool] | None]


def _tables(images: tuple[Image, ...], plan: PruningPlan, device: torch.device) -> Tables:
    if torch.compiler.is_compiling():
        return _make_tables(images, plan, device)
    return _known_tables(images, plan, device)


def _make_tables(images: tuple[Image, ...], plan: PruningPlan, device: torch.device) -> Tables:
    """For each drop: numbers of anchors (G,) and members (G, M) among the batch's vision tokens,
    members of each group (G, 1), and whether all have M; None for an exit."""
    made: Tables = []
    each = [
        _constant_groups(plan.text, image.tokens, image.lattice, image.regions) for image in images
    ]
    for stage in range(len(plan.stages)):
        anchors: list[int] = []
        groups: list[list[int]] = []
        start = 0
        for image, stages in zip(images, each, strict=True):
            for anchor, members in stages[stage]:
                anchors.append(start + anchor)
                groups.append([start + member for member in members])
            start += image.tokens
        if not groups:
            made.append(None)
            continue
        sizes = [len(group) for group in groups]
        most = max(sizes)
        made.append(
            (
                torch.tensor(anchors, device=device),
                torch.tensor([g + [-1] * (most - len(g)) for g in groups], device=device),
                torch.tensor(sizes, device=device).unsqueeze(1),
                min(sizes) == most,
            )
        )
    return made


_known_tables = remembered(_make_tables, 256)  # saves the copy to the device, too


@torch._dynamo.assume_constant_result
def _constant_groups(
    plan: str,
    tokens: int,
    lattice: tuple[int, int] | None,
    regions: tuple[tuple[int, int, int, int], ...],
) -> tuple[tuple[tuple[int, tuple[int, ...]], ...], ...]:
    """For each drop, anchor and members of each group: worked out outside of the trace."""
    return _groups(plan, tokens, lattice, regions)


@lru_cache(maxsize=256)
def _groups(
    plan: str,
    tokens: int,
    lattice: tuple[int, int] | None,
    regions: tuple[tuple[int, int, int, int], ...],
) -> tuple[tuple[tuple[int, tuple[int, ...]], ...], ...]:
    found = tuple(Region(*region) for region in regions)
    stages = PruningPlan.parse(plan).groups(tokens, lattice, found)
    return tuple(tuple((anchor, members) for anchor, members in groups) for groups in stages)
