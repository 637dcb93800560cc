"""Where the last states of a decoder stand when a model hands them out.

Inside the decoder a batch is packed as tightly as its rows allow. Callers index columns of what
they passed in: the last n of them, some of them, the last one that is no padding. Here states are
moved to where such a caller looks; the layers, their masks and the cache know nothing of it. One
rule holds everywhere: at a column that was dropped stands the state of the last column before it
that was kept, which is what predicts the next token there.

Legend: B rows, S columns of the call, Q slots at the end of the decoder, N columns handed out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adsc.dropping.outputs import slots_of_columns
from adsc.dropping.segment import Segment


@dataclass(frozen=True, eq=False)
class Layout:
    """Which columns a call hands out, in which order.

    Args:
        width: S.
        columns: (N,) or (B, N) columns; None where `slots` says it.
        slots: (B, N) slots at the end of the decoder.
        valid: (B, N) bool, False where nothing but padding stands.
    """

    width: int
    columns: Tensor | None = None
    slots: Tensor | None = None
    valid: Tensor | None = None

    def place(self, last: Segment) -> tuple[Tensor, Tensor]:
        """(B, N) slots of the last segment, and the columns in them, -1 where only padding is."""
        kept = last.columns
        kept = kept if last.valid is None else kept.masked_fill(~last.valid, -1)
        if self.slots is not None:
            assert self.valid is not None
            found = kept.gather(1, self.slots.to(kept.device))
            return self.slots, found.masked_fill(~self.valid.to(kept.device), -1)
        assert self.columns is not None
        wanted = self.columns.to(kept.device).expand(len(kept), -1)
        slots = slots_of_columns(kept, self.width).gather(1, wanted)
        return slots, kept.gather(1, slots)

    def pair(self, labels: Tensor, last: Segment) -> Tensor:
        """(B, S) -> (B, N): the labels that go with what is handed out; -100 where nothing that is
        left stands before the label to predict it."""
        if self.slots is not None:
            _, columns = self.place(last)
            columns = columns.to(labels.device)
            return labels.gather(1, columns.clamp(min=0)).masked_fill(~follows(columns >= 0), -100)
        assert self.columns is not None
        kept = last.columns
        kept = kept if last.valid is None else kept.masked_fill(~last.valid, self.width)
        first = kept.min(1, keepdim=True).values.to(labels.device)
        places = torch.arange(self.width, device=labels.device)
        labels = labels.masked_fill(places <= first, -100)
        wanted = self.columns.to(labels.device).expand(len(labels), -1)
        return labels.gather(1, wanted)


def follows(stands: Tensor) -> Tensor:
    """(B, N) bool: where a column stands, of those that are behind another one; of what only pads,
    nothing is predicted. The first of all slots is no label anyway."""
    return stands & nn.functional.pad(stands[:, :-1], (1, 0), value=True)


def all_columns(width: int, device: torch.device) -> Layout:
    """Every column, as without a plan."""
    return Layout(width, torch.arange(width, device=device))


def chosen_columns(wanted: int | Tensor, width: int, device: torch.device) -> Layout:
    """The columns of `logits_to_keep`: a number of last ones, a list, or a list for each row."""
    if not isinstance(wanted, Tensor):
        return Layout(width, torch.arange(max(width - wanted, 0), width, device=device))
    return Layout(width, wanted.to(device) % width)


def own_sides(last: Segment, seen: Tensor) -> Layout:
    """All that is left, each row with its own padding at its end, so that the last columns of every
    row are the last ones of what was passed in.

    Args:
        last: the last segment; its valid slots are contiguous in each row.
        seen: (B, S) bool, columns of the call that aren't padding.
    """
    rows, width = seen.shape
    device = last.columns.device
    seen = seen.to(device)
    trailing = seen.flip(1).int().argmax(1).masked_fill(~seen.any(1), width)
    if last.valid is None:
        first, count = trailing.new_zeros(rows), trailing.new_full((rows,), last.columns.shape[1])
    else:
        first, count = last.valid.int().argmax(1), last.valid.sum(1)
    size = max(1, int((count + trailing).max()))
    place = torch.arange(size, device=device) - (size - count - trailing).unsqueeze(1)
    valid = (place >= 0) & (place < count.unsqueeze(1))
    most = (count - 1).clamp(min=0).unsqueeze(1)
    slots = torch.minimum(place.clamp(min=0), most) + first.unsqueeze(1)
    return Layout(width, slots=slots, valid=valid)


def moved(states: Tensor, slots: Tensor) -> Tensor:
    """(B, Q, D) -> (B, N, D)."""
    index = slots.to(states.device).unsqueeze(-1).expand(-1, -1, states.shape[-1])
    return states.gather(1, index)
