"""One step of the engine: which rows of its batch reach which part of the decoder, and from where.

A step computes, of each running request, the next few tokens: rows, request after request. Indices
are worked out on the host from numbers that the scheduler knows, and copied to the device once a
part. There is no attention, no cache and no engine here.

Legend: R requests, N rows of the step, M rows that reach a part, P parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from adsc.dropping.segment import Pooling
from adsc.serving.kept import Kept


@dataclass(frozen=True, eq=False)
class Part:
    """What one part of the decoder sees of a step.

    Args:
        starts: (R + 1,) int32, where each request's rows begin among the part's.
        dropped: (R,) int32, tokens of each request that are gone by the end of the step.
        owner: (M,) the request of each row.
        place: (M,) where each row lies among its request's tokens that reach the part.
        rows: (M,) the part's rows among the step's; None: all of them.
        take: (M,) the part's rows among those of the part before; None: all of them.
        pooling: the groups whose means enter here.
    """

    starts: np.ndarray
    dropped: np.ndarray
    owner: Tensor
    place: Tensor
    rows: Tensor | None = None
    take: Tensor | None = None
    pooling: Pooling | None = None

    @property
    def count(self) -> int:
        """M."""
        return int(self.starts[-1])

    @property
    def longest(self) -> int:
        """Rows of the request that has most."""
        return int(np.diff(self.starts).max())

    def enter(self, states: Tensor) -> Tensor:
        """(M', D) of the part before -> (M, D): what is left, with means in their places."""
        if self.take is None:
            return states
        left = states.index_select(0, self.take)
        return left if self.pooling is None else self.pooling.put(states, left)


@dataclass(frozen=True, eq=False)
class Step:
    """All parts of a step, part 0 included, and the step's N rows."""

    parts: list[Part]
    total: int

    @property
    def drops(self) -> bool:
        """Whether some part may see fewer rows than the step has."""
        return any(part.rows is not None for part in self.parts)

    def leave(self, states: Tensor) -> Tensor:
        """(M, D) of the last part -> (N, D): each row where the engine looks for it, zeros where a
        token was dropped."""
        rows = self.parts[-1].rows
        if rows is None:
            return states
        return states.new_zeros(self.total, states.shape[-1]).index_copy(0, rows, states)


@dataclass
class _Batch:
    """What a step is made of.

    Args:
        computed: (R,) tokens that each request had computed before.
        scheduled: (R,) tokens that it computes now.
        kept: of requests with images.
    """

    computed: np.ndarray
    scheduled: np.ndarray
    kept: Sequence[Kept | None]
    device: torch.device
    starts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.starts = np.zeros(len(self.scheduled) + 1, dtype=np.int32)
        np.cumsum(self.scheduled, out=self.starts[1:])

    def on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self.device, non_blocking=True)


def make_step(
    computed: np.ndarray,
    scheduled: np.ndarray,
    kept: Sequence[Kept | None],
    device: torch.device,
) -> Step | None:
    """The step of requests that had `computed` tokens and compute `scheduled` more; None if none of
    them has an image, and nothing is other than without a plan."""
    known = next((one for one in kept if one is not None), None)
    if known is None:
        return None
    batch = _Batch(computed, scheduled, kept, device)
    total = int(batch.starts[-1])
    drops = any(one and start < one.known for one, start in zip(kept, computed, strict=True))
    before = np.arange(total)
    parts = []
    for number in range(known.served.parts):
        if drops and number:
            part, before = _part_with_drops(batch, number, before)
        else:
            part = _whole_part(batch, number)
        parts.append(part)
    return Step(parts, total)


def _whole_part(batch: _Batch, number: int) -> Part:
    """A part that all rows reach, as in each step that only decodes."""
    ends = batch.computed + batch.scheduled
    dropped = np.array(
        [
            one.dropped(number, int(end)) if one else 0
            for one, end in zip(batch.kept, ends, strict=True)
        ],
        dtype=np.int32,
    )
    owner: np.ndarray = np.repeat(np.arange(len(ends)), batch.scheduled)
    place = np.arange(len(owner)) + (batch.computed - dropped - batch.starts[:-1])[owner]
    return Part(batch.starts, dropped, batch.on_device(owner), batch.on_device(place))


def _part_with_drops(batch: _Batch, number: int, before: np.ndarray) -> tuple[Part, np.ndarray]:
    """A part that some rows may not reach, and which rows reach it.

    Args:
        before: rows that reach the part before it.
    """
    count = len(batch.scheduled)
    starts: np.ndarray = np.zeros(count + 1, dtype=np.int32)
    dropped: np.ndarray = np.zeros(count, dtype=np.int32)
    rows: list[np.ndarray] = []
    place: list[np.ndarray] = []
    for r, one in enumerate(batch.kept):
        start, size = int(batch.computed[r]), int(batch.scheduled[r])
        chosen = np.arange(size)
        if one is not None and start < one.known:
            inside = one.gone[number, start : start + size]
            chosen = np.flatnonzero(np.concatenate([~inside, np.ones(size - len(inside), bool)]))
        gone = one.dropped(number, start) if one else 0
        dropped[r] = one.dropped(number, start + size) if one else 0
        starts[r + 1] = starts[r] + len(chosen)
        rows.append(batch.starts[r] + chosen)
        place.append(start - gone + np.arange(len(chosen)))
    left = np.concatenate(rows)
    part = Part(
        starts,
        dropped,
        batch.on_device(np.repeat(np.arange(count), np.diff(starts))),
        batch.on_device(np.concatenate(place)),
        batch.on_device(left),
        batch.on_device(np.asarray(np.searchsorted(before, left))),
        _pooling(batch, number, before, left),
    )
    return part, left


def _pooling(batch: _Batch, number: int, before: np.ndarray, left: np.ndarray) -> Pooling | None:
    """The groups of all images that this step computes; an image is computed in one step."""
    anchors, members = [], []
    for r, one in enumerate(batch.kept):
        if one is None or not one.served.pools:
            continue
        start, end = int(batch.computed[r]), int(batch.computed[r] + batch.scheduled[r])
        for first, length, layout in one.images:
            if start <= first and first + length <= end and (groups := layout.groups[number]):
                row = int(batch.starts[r]) + first - start
                anchors += [row + group.anchor for group in groups]
                members += [[row + member for member in group.members] for group in groups]
    if not anchors:
        return None
    sizes = [len(group) for group in members]
    most, even = max(sizes), min(sizes) == max(sizes)
    flat = np.array([group + [-1] * (most - len(group)) for group in members])
    places = np.where(flat < 0, -1, np.searchsorted(before, flat))
    return Pooling(
        batch.on_device(places),
        batch.on_device(np.asarray(np.searchsorted(left, np.array(anchors)))),
        batch.on_device(np.array(sizes)).unsqueeze(1),
        even,
    )
