"""Choosing vision tokens while the forward runs: what a method is shown, and what becomes of its
choice.

`begin` has worked out a call's schedule with stand-ins: how many tokens each row keeps, and so
masks, padding, labels and the lengths of the cache, does not depend on which tokens they are. Here
a stand-in is replaced by the choice, before the first layer that sees it. What a method makes of
what it is shown is its own business (`adsc.peers`).

A choice belongs to its call. It is made once: a layer that is run again for gradient checkpointing
finds it. Nothing is differentiated through it, except merged states, which are recomputed.

Legend: B rows, S columns of the call, Q columns left in a segment, n vision tokens of one image, n'
of them left, N images of the call, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adsc.dropping.cache_record import CacheRecord
from adsc.dropping.segment import Segment
from adsc.dropping.segments import substituted
from adsc.families.family import Family, Image, Images
from adsc.method import Method, Selection
from adsc.plan import PruningPlan


@dataclass(frozen=True, eq=False)
class Spot:
    """One image of a call, on the host.

    Args:
        row: its row.
        number: which image of its row it is.
        columns: (n,) where its tokens are.
        query: the column that speaks for the question about it: the one before the first
            supervised label after it, or else the last of its row (or packed sample).
        lattice: (height, width) of its tokens, if they form one.
    """

    row: int
    number: int
    columns: Tensor
    query: int
    lattice: tuple[int, int] | None

    @property
    def tokens(self) -> int:
        return len(self.columns)


class Schedule(Protocol):
    """The interface of a call (adsc.dropping.call.Call) to methods."""

    @property
    def plan(self) -> PruningPlan | Method: ...
    @property
    def family(self) -> Family: ...
    @property
    def decoder(self) -> Any: ...
    @property
    def segments(self) -> Sequence[Segment]: ...
    @property
    def seen(self) -> Tensor | None: ...
    @property
    def square(self) -> Tensor | None: ...
    @property
    def samples(self) -> Tensor | None: ...
    def keys(self, drop: int, layer: int, hidden: Tensor, cache: Any) -> Tensor | None: ...


class Choice:
    """The choices of one call."""

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        vision: list[tuple[Tensor, Images]],
        valid: Tensor | None,
        inputs: dict[str, Any],
        samples: Tensor | None,
        holds: Callable[[], CacheRecord],
    ):
        self.method, self.model, self.holds = method, model, holds
        self.valid = valid
        self.image = torch.stack([columns for columns, _ in vision]).any(0)  # (B, S)
        self.ids = inputs.get("input_ids")
        encoded = inputs.get("mm_encoder_outputs") or {}
        self.encoded = list(encoded.values())  # of vision towers, if they ran before the call
        self.notes: dict[int, Any] = {}
        self.chosen: list[list[Selection]] = []
        self.slots: list[Tensor] = []  # after each drop (B, S): slot of a column, or of the one
        # before it that is left
        seen = self.image.cpu()
        here = torch.ones_like(seen) if valid is None else valid.cpu()
        labels = inputs.get("labels")
        answers = torch.zeros_like(seen) if labels is None else (labels.cpu() != -100) & ~seen
        packed = torch.zeros(seen.shape) if samples is None else samples.cpu()
        self.text = [(~s & h).nonzero().flatten() for s, h in zip(seen, here, strict=True)]
        self.spots: list[Spot] = []
        for columns, images in vision:
            self._place(columns.cpu(), images, here, answers, packed)

    def _place(
        self, columns: Tensor, images: Images, here: Tensor, answers: Tensor, packed: Tensor
    ) -> None:
        following = None if isinstance(images, Image) else iter(images)
        for row, places in enumerate(columns):
            left = places.nonzero().flatten()
            while len(left):
                image = images if isinstance(images, Image) else next(following)  # type: ignore
                mine, left = left[: image.tokens], left[image.tokens :]
                end = int(mine[-1])
                after = here[row] & (packed[row] == packed[row, end])
                after[:end] = False
                supervised = (answers[row] & after).nonzero().flatten()
                query = int(supervised[0]) - 1 if len(supervised) else int(after.nonzero()[-1])
                number = sum(spot.row == row for spot in self.spots)
                self.spots.append(Spot(row, number, mine, max(query, end), image.lattice))

    @torch.no_grad()
    def note(self, scene: Scene) -> None:
        """Let the method look at a layer that it watches."""
        if scene.number not in self.notes:
            self.notes[scene.number] = self.method.note(scene)

    def make(self, scene: Scene, stage: int, segments: Sequence[Segment]) -> Segment:
        """The choice at a drop: the segment that takes its stand-in's place. Asked again, as when
        activations are computed again, it is the one that was made before.

        Args:
            segments: the call's, chosen ones up to this stage and stand-ins from there on.
        """
        if stage != len(self.chosen):
            return segments[stage]
        with torch.no_grad():
            selections = self.method.choose(scene, stage)
        return self._substitute(selections, segments[stage - 1] if stage else None, segments[stage])

    def merge(self, scene: Scene, stage: int) -> Tensor:
        """The hidden states with what the choice at a drop merges, nothing cut yet."""
        return self._merge(scene, self.chosen[stage], self.left(stage - 1))

    def left(self, stage: int) -> list[Tensor] | None:
        """For each image the numbers of its tokens after a stage; None before the first."""
        return None if stage < 0 else [selection.keep for selection in self.chosen[stage]]

    def _substitute(
        self, selections: list[Selection], before: Segment | None, stand_in: Segment
    ) -> Segment:
        keep = ~self.image
        device = keep.device
        rows = torch.cat([torch.full((len(s.keep),), p.row) for p, s in self._pairs(selections)])
        columns = torch.cat(
            [p.columns.to(device)[s.keep.to(device)] for p, s in self._pairs(selections)]
        )
        keep = keep.index_put((rows.to(device), columns), keep.new_ones(()))
        if self.valid is not None:
            keep = keep & self.valid
        segment = substituted(keep, before, stand_in)
        slots = keep.cumsum(1) - 1
        if segment.valid is not None:
            slots = slots + segment.valid.int().argmax(1, keepdim=True)
        self.slots.append(slots.clamp(min=0))
        self.chosen.append(selections)
        return segment

    def _pairs(self, selections: list[Selection]) -> list[tuple[Spot, Selection]]:
        return list(zip(self.spots, selections, strict=True))

    def _merge(
        self, scene: Scene, selections: list[Selection], left: list[Tensor] | None
    ) -> Tensor:
        hidden = scene.hidden
        rows, places, states = [], [], []
        for number, (spot, selection) in enumerate(self._pairs(selections)):
            if selection.merged is None:
                continue
            if selection.states is not None:
                new = selection.states()
            else:
                assert selection.weights is not None
                new = selection.weights.to(hidden) @ scene.states(number, left)
            slots = scene.slot(spot.row, spot.columns.to(hidden.device)[selection.merged])
            rows.append(torch.full_like(slots, spot.row))
            places.append(slots)
            states.append(new.to(hidden))
        if not rows:
            return hidden
        return hidden.index_put((torch.cat(rows), torch.cat(places)), torch.cat(states))


@dataclass(frozen=True, eq=False, kw_only=True)
class Scene:
    """What a method is shown: the input of one layer, and where images are in it.

    Args:
        choice: the choices of the call so far.
        call: its schedule.
        number: of the layer.
        layer: the layer; None at the input of the decoder.
        hidden: (B, Q, D).
        rotary: (cos, sin) of its columns; None at the input of the decoder.
        cache: of the call, without this layer's new keys.
        drop: the last drop before this input, -1 before the first.
    """

    choice: Choice
    call: Schedule
    number: int
    layer: nn.Module | None
    hidden: Tensor
    rotary: tuple[Tensor, Tensor] | None
    cache: Any
    drop: int

    @property
    def spots(self) -> list[Spot]:
        return self.choice.spots

    @property
    def notes(self) -> dict[int, Any]:
        return self.choice.notes

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def count(self, spot: int, stage: int) -> int:
        """m: how many tokens of an image a stage leaves."""
        return self.choice.method.counts(self.spots[spot].tokens)[stage]

    def left(self, spot: int) -> Tensor:
        """(n',) numbers of an image's tokens that are in this input."""
        if self.drop < 0:
            return torch.arange(self.spots[spot].tokens, device=self.device)
        return self.choice.chosen[self.drop][spot].keep.to(self.device)

    def slot(self, row: int, columns: Tensor) -> Tensor:
        """Slots of a row's columns; of a dropped one, the slot of the last before it that stays."""
        if self.drop < 0:
            return columns.to(self.device)
        return self.choice.slots[self.drop][row].to(self.device)[columns.to(self.device)]

    def slots(self, spot: int, left: Tensor | None = None) -> Tensor:
        """(n',) slots of an image's tokens."""
        left = self.left(spot) if left is None else left.to(self.device)
        return self.slot(self.spots[spot].row, self.spots[spot].columns.to(self.device)[left])

    def states(self, spot: int, left: list[Tensor] | None = None) -> Tensor:
        """(n', D) the hidden states of an image's tokens."""
        slots = self.slots(spot, None if left is None else left[spot])
        return self.hidden[self.spots[spot].row].index_select(0, slots)

    def text(self, spot: int) -> Tensor:
        """(T,) columns of the text between an image and its query, the query included."""
        row = self.spots[spot]
        columns = self.choice.text[row.row]
        return columns[(columns > row.columns[-1]) & (columns <= row.query)]

    def replace(self, **changes: Any) -> Scene:
        return replace(self, **changes)


def top(scores: Tensor, count: int) -> Tensor:
    """(count,) places of the largest scores, ascending; of equals the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values
