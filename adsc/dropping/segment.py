"""What the layers between two drops see of a call: columns, and the groups whose means stand there.

Legend: B rows, S columns of the call, Q columns left in a segment, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Pooling(NamedTuple):  # the compiler can't rebuild a frozen dataclass
    """The groups of one drop.

    Args:
        members: (G, M) where members' hidden states are in the flattened segment before; -1 where a
            group has fewer.
        slots: (G,) where means go in the flattened segment after.
        sizes: (G, 1) members of each group.
        even: whether all groups have M members.
    """

    members: Tensor
    slots: Tensor
    sizes: Tensor
    even: bool

    def put(self, before: Tensor, after: Tensor) -> Tensor:
        """(B * Q', D), (B * Q, D) -> (B * Q, D): what is left, with means in their places."""
        members = self.members.to(before.device)
        states = before.index_select(0, members.clamp(min=0).flatten()).view(*members.shape, -1)
        if not self.even:
            states = states.masked_fill(members.unsqueeze(-1) < 0, 0)
        wide = torch.promote_types(before.dtype, torch.float32)
        mean = states.sum(1, dtype=wide) / self.sizes.to(before.device)
        return after.index_copy(0, self.slots.to(before.device), mean.to(after.dtype))


@dataclass(frozen=True, eq=False)
class Segment:
    """What the layers between two drops see of a call's columns.

    Args:
        columns: (B, Q) column of the call in each slot; a slot that only pads holds some column or
            other.
        take: (B * Q,) where each slot's hidden state is in the flattened segment before it.
        valid: (B, Q) bool, False where a slot only pads; None if no slot does.
        pooling: for each kind of vision token, the groups whose means stand here; for a plan with
            a pool.
    """

    columns: Tensor
    take: Tensor
    valid: Tensor | None
    pooling: tuple[Pooling, ...] = ()
