"""Hidden states where a model is supervised, so that its head sees these positions and no others.

Transformers' own forward makes logits of every column that is left, most of which no label asks
for. Here the inner model is called, and the head is the caller's to apply. That is all that the top
model of every family in the table does besides, but for PaliGemma's soft cap, which `head` has.

Legend: B rows, S columns of a call, Q columns that are left at the end, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adsc.attachment.attach import attached_plan, base_model
from adsc.dropping.layout import follows
from adsc.errors import UnsupportedModel
from adsc.families.table import find_family

CAPPED = ("paligemma",)  # model types whose top model caps its logits softly


class Hidden(NamedTuple):
    """What the decoder makes of a call."""

    states: Tensor
    """(B, Q, D) after the last norm."""
    kept: Tensor | None
    """(B, Q) the call's column in each slot, -1 where a slot only pads; None: all S columns."""

    def before(self, width: int) -> Tensor:
        """(B, S) for each column the state that predicts it, that of the last column before it that
        was kept, as its number among B * Q; -1 where there is none, or the column was dropped."""
        rows, slots = self.states.shape[:2]
        device = self.states.device
        number = torch.arange(rows * slots, device=device).view(rows, slots)[:, :-1]
        if self.kept is None:
            return nn.functional.pad(number, (1, 0), value=-1)
        # With logits="full" a column also stands where those after it were dropped: the first of
        # its slots is the one behind what predicts it.
        fresh = self.kept[:, 1:] != self.kept[:, :-1]
        predicted = follows(self.kept >= 0)[:, 1:] & fresh
        place = self.kept[:, 1:].masked_fill(~predicted, width)
        found = torch.full((rows, width + 1), -1, device=device)
        return found.scatter_(1, place, number)[:, :width]

    def at(self, numbers: Tensor) -> Tensor:
        """(N,) numbers among B * Q -> (N, D)."""
        return self.states.flatten(0, 1).index_select(0, numbers)


def hidden_states(model: nn.Module, inputs: Mapping[str, Any]) -> Hidden:
    """Call a model without its head.

    Args:
        model: as `adsc.attach` takes it, attached or not.
        inputs: what the model would be called with; `labels` show methods where answers begin.
    """
    base = base_model(model)
    _, inner = find_family(base)
    given = dict(inputs)
    if attached_plan(base) is None:
        given.pop("labels", None)
    output = inner(**given)
    kept = getattr(output, "kept_positions", None)
    return Hidden(output.last_hidden_state, kept[-1] if kept is not None else None)


def head(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What makes logits (..., V) of hidden states (..., D).

    Raises:
        UnsupportedModel: the model has no `lm_head`.
    """
    base = base_model(model)
    project = getattr(base, "lm_head", None)
    if project is None:
        raise UnsupportedModel(
            f"{type(base).__name__} has no lm_head, so its logits can't be made of hidden states; "
            "load the model for conditional generation, not its inner model"
        )
    cap = None
    if base.config.model_type in CAPPED:
        cap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
    if cap is None:
        return project  # type: ignore[no-any-return]
    return lambda states: torch.tanh(project(states) / cap) * cap
