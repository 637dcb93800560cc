"""What an attached model hands back beyond transformers' output: which columns its logits are of.

`kept_positions` is a field like the others, so it survives what takes outputs apart and puts them
together (DDP, accelerate, the Trainer's evaluation). Nothing here drops or computes anything.

Legend: B rows, S columns of a call, Q columns that are left at the end, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, make_dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from adsc.errors import VisionTokenError


def carry_kept(output: Any, kept: tuple[Tensor, ...]) -> None:
    """Put `kept_positions`, L tensors (B, Q), on a transformers output, in place."""
    if not torch.compiler.is_compiling():  # a compiled call has it as a plain attribute
        output.__class__ = _carrying(type(output))  # type: ignore[arg-type]
    output.kept_positions = kept


@lru_cache(maxsize=64)
def _carrying(kind: type) -> type:
    """The output class with one more field, the last."""
    if "kept_positions" in kind.__dataclass_fields__:  # type: ignore[attr-defined]
        return kind
    return make_dataclass(
        kind.__name__,
        [("kept_positions", Any, field(default=None))],
        bases=(kind,),
        namespace={"__module__": kind.__module__, "__reduce__": _reduce},
        repr=False,
    )


def _reduce(output: Any) -> tuple[Any, ...]:
    """Pickles are made from the original class: the extended has no importable name."""
    return _rebuild, (type(output).__mro__[1], dict(output))


def _rebuild(kind: type, values: dict[str, Any]) -> Any:
    return _carrying(kind)(**values)


def full_length_logits(predictions: Any, labels: Tensor) -> Tensor:
    """(B, Q, V) -> (B, S, V): at each column, the logits of the last kept column up to it.

    Logits and labels then pair up as in the model's own loss: column c - 1 predicts the label at c.
    `transformers.Trainer` needs this for `compute_metrics`, which gets labels of full length.
    Nothing is recomputed.

    Args:
        predictions: the argument of `preprocess_logits_for_metrics`, or a whole output.
        labels: (B, S); the caller ignores those at vision tokens.

    Raises:
        VisionTokenError: there are fewer logits than labels, and nothing says which ones.

    >>> how = {"preprocess_logits_for_metrics": full_length_logits}
    >>> Trainer(model, args, compute_metrics=compute, **how)  # doctest: +SKIP
    """
    parts = list(predictions.values()) if isinstance(predictions, Mapping) else predictions
    parts = list(parts) if isinstance(parts, (tuple, list)) else [parts]
    logits = next(one for one in parts if isinstance(one, Tensor) and one.ndim == 3)
    kept = parts[-1][-1] if isinstance(parts[-1], (tuple, list)) else None
    width = labels.shape[1]
    if not isinstance(kept, Tensor) or kept.is_floating_point() or kept.ndim != 2:
        if logits.shape[1] == width:
            return logits
        raise VisionTokenError(
            f"logits of {logits.shape[1]} columns for labels of {width}: vision tokens were "
            "dropped, and these predictions don't say which; pass the model's whole output, "
            "with its kept_positions (trl's trainers hand on logits alone: use the metrics that "
            "they compute themselves, or transformers.Trainer)"
        )
    if logits.shape[1] != kept.shape[1]:
        raise VisionTokenError(
            f"logits of {logits.shape[1]} columns beside kept_positions of {kept.shape[1]}: they "
            "are of different calls, or logits were cut since; pass both as the model returned them"
        )
    slots = slots_of_columns(kept, width)
    return logits.gather(1, slots.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))


def slots_of_columns(kept: Tensor, width: int) -> Tensor:
    """(B, Q) the column in each slot, -1 for none -> (B, S) for each column the slot of the last
    one up to it that was kept; of a column before all of them, the slot of the first.

    Where outputs were laid out for a caller, several slots hold a column: any of them is right.
    """
    slots = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    place = torch.where(kept >= 0, kept, width)
    slot = slots.new_full((len(kept), width + 1), -1).scatter(1, place, slots)[:, :width]
    there = slot >= 0
    columns = torch.arange(width, device=kept.device)
    first = there.int().argmax(1, keepdim=True)
    nearest = torch.where(there, columns, -1).cummax(1).values
    return slot.gather(1, torch.where(nearest < 0, first, nearest)).clamp(min=0)
