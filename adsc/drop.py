"""Dropping vision tokens while transformers' own forward runs: the hooks of an attached model.

Forward pre-hooks on the top model and on the inner model work out the schedule of a call
(`adsc.call`) and pass it on as one more keyword argument, which transformers threads to every
decoder layer; one on each decoder layer takes it out again and, from the first drop on, substitutes
the mask, the positions and, at a drop, the hidden states. Since the schedule travels with the call,
nothing is kept on a module, calls may nest or take turns, and a layer that is run again for
gradient checkpointing finds what it found before. There is no attention, no cache and no generation
here.

Legend: B rows, S columns of the call, Q columns that are left at the end.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from adsc.call import TYPES, Call, begin
from adsc.families import GRID, SIZE, Family, VisionTokenError
from adsc.held import CacheError, held_by, keep_record
from adsc.method import Method
from adsc.outputs import carry_kept
from adsc.plan import PruningPlan
from adsc.running import current
from adsc.schedule import is_captured

CALL = "adsc_call"  # the keyword under which a call travels from the top model to its layers
OURS = (TYPES, "labels")  # what we read of a call even where its model does not
IGNORED = -100  # the label that transformers' losses leave out
# Signs that a trainer takes the mean over tokens that it counted itself (transformers', trl's).
COUNTED = ("num_items_in_batch", "fused_lm_head")
# What a collator of packed samples hands to flash attention. After a drop it no longer holds;
# attention then reads it off position ids.
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class EnterModel:
    """Pre-hook of the top and of the inner model: begin the call, and cut the labels to it."""

    def __init__(
        self, family: Family, plan: PruningPlan | Method, inner: str, names: tuple[str, ...]
    ):
        self.family, self.plan, self.inner, self.names = family, plan, inner, names

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        if CALL in kwargs:
            return None
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        model = getattr(module, self.inner) if self.inner else module
        plan = current(module, self.plan)
        if plan.stages:
            call = begin(model, self.family, plan, inputs)
            inputs = self.cut(model, inputs, call) | {CALL: call}
        for name in OURS:  # meant for us alone
            if name not in self.names:
                inputs.pop(name, None)
        return (), inputs

    def cut(self, model: nn.Module, inputs: dict[str, Any], call: Call) -> dict[str, Any]:
        """The inputs with what speaks of columns cut to those that reach the end."""
        if call.segments:
            if inputs.get("labels") is not None:
                inputs["labels"] = _cut_labels(inputs, call, self.family, model)
            if inputs.get("shift_labels") is not None:
                raise VisionTokenError(
                    "shift_labels were given: with a pruning plan labels are shifted after the "
                    "drop, so pass labels instead"
                )
            if isinstance(wanted := inputs.get("logits_to_keep"), Tensor):
                inputs["logits_to_keep"] = _slots_of(wanted, call)
        return inputs


def _cut_labels(inputs: dict[str, Any], call: Call, family: Family, model: nn.Module) -> Tensor:
    """(B, S) -> (B, Q): labels of the columns that reach the end; vision tokens have none."""
    given, last = inputs["labels"], call.segments[-1]
    labels = given
    for columns, _ in family.vision(model, inputs):
        labels = labels.masked_fill(columns.to(labels.device), IGNORED)
    if any(inputs.get(name) is not None for name in COUNTED) and not is_captured():
        _warn_of_counted(given, labels)
    labels = labels.gather(1, last.columns.to(labels.device))
    return labels if last.valid is None else labels.masked_fill(~last.valid.to(labels.device), -100)


def _slots_of(wanted: Tensor, call: Call) -> Tensor:
    """(N,) columns whose logits are wanted -> (N,) their slots at the end of the decoder."""
    last = call.segments[-1]
    columns = last.columns if last.valid is None else last.columns.masked_fill(~last.valid, -1)
    if call.choice is not None:  # which vision tokens stay is not known yet
        columns = columns.masked_fill(call.choice.image.gather(1, last.columns), -1)
    found = columns.unsqueeze(-1) == (wanted % call.width).to(columns.device)
    slots = found.int().argmax(1)
    if not bool((found.any(1) & (slots == slots[:1])).all()):
        raise VisionTokenError(
            f"logits_to_keep asks for columns {wanted.tolist()}, some of which are dropped vision "
            "tokens, or stand in different places in different rows; ask for columns of text in "
            "rows of equal layout, or for a number of last ones"
        )
    return slots[0]


def _warn_of_counted(given: Tensor, labels: Tensor) -> None:
    """Say that a trainer's mean is taken over more tokens than have a loss."""
    wanted, vision = int((labels != IGNORED).sum()), int((given != labels).sum())
    if vision:
        warnings.warn(
            f"labels hold {vision} vision tokens beside {wanted} others: with a pruning plan they "
            "have no loss, but a trainer that counted them before the call divides by them, which "
            "makes loss and gradients too small; set labels of vision tokens to -100 in the "
            "collator (trl: completion_only_loss or assistant_only_loss)",
            stacklevel=2,
        )


class EnterLayer:
    """Pre-hook of decoder layer number `layer`. Where tokens are dropped is the call's to say."""

    def __init__(self, layer: int):
        self.layer = layer

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call: Call | None = kwargs.get(CALL)
        cache = kwargs.get("past_key_values")
        if call is None:
            if held_by(cache) is not None:
                raise CacheError(
                    "this cache holds a conversation with dropped vision tokens; continue it "
                    "through the multimodal model, not through its language model alone"
                )
            return None
        kwargs = {name: value for name, value in kwargs.items() if name != CALL}
        if self.layer == 0 and cache is not None and (call.after or call.before is None):
            keep_record(cache, call.after)
        hidden = args[0] if args else kwargs["hidden_states"]
        drop, drops = call.place(self.layer)
        if drop < 0 or not call.substitutes:
            call.watch(-1, self.layer, module, hidden, kwargs)
            return args, kwargs
        kwargs.pop("hidden_states", None)
        if drops and call.segments:
            if call.choice is not None and self.layer:
                hidden = call.choose(drop, self.layer, module, hidden, kwargs)
                if cache is not None:
                    keep_record(cache, call.after)
            hidden = call.take(drop, hidden)
        call.watch(drop, self.layer, module, hidden, kwargs)
        turn = kwargs.get("position_embeddings")
        kwargs["attention_mask"] = call.mask(drop, self.layer, hidden, cache)
        kwargs["position_embeddings"] = call.rotary(drop, self.layer, hidden, turn, cache)
        kwargs["position_ids"] = call.order(drop, hidden)
        if call.segments:
            kwargs = {name: value for name, value in kwargs.items() if name not in PACKED}
        return (hidden, *args[1:]), kwargs


class EnterDecoder:
    """Pre-hook of the decoder, for methods that drop before layer 0: they choose here, outside of
    what gradient checkpointing runs again, and may put new states in the place of old ones."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call: Call | None = kwargs.get(CALL)
        if call is None or call.choice is None:
            return None
        embeds = call.choose(0, 0, None, kwargs["inputs_embeds"], kwargs)
        return args, kwargs | {"inputs_embeds": embeds}


class EnterVision:
    """Pre-hook of everything beside the decoder: some models pass their keywords on to it."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if CALL not in kwargs:
            return None
        return args, {name: value for name, value in kwargs.items() if name != CALL}


class LeaveVision:
    """Forward hook of a vision tower: its output keeps the shapes that it was called with.

    `generate` encodes images first and then forgets their grids, by which frames are told apart.
    """

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not hasattr(output, "to_tuple"):
            return
        pixels = kwargs.get("pixel_values", args[0] if args else None)
        setattr(output, SIZE, tuple(getattr(pixels, "shape", ()))[-2:])
        if (grid := kwargs.get("grid_thw")) is not None and not torch.compiler.is_compiling():
            setattr(output, GRID, grid.tolist())


class LeaveModel:
    """Forward hook of the top and of the inner model: tell which columns each layer saw.

    `output.kept_positions` has one tensor (B, Q) for each layer: the call's column in each slot, -1
    where a slot only pads. It goes with `attentions[l]` and `hidden_states[l + 1]`; the last one
    with `logits`.
    """

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        call: Call | None = kwargs.get(CALL)
        if call is not None and call.segments and hasattr(output, "to_tuple"):
            carry_kept(output, call.once(("kept",), lambda: self.kept(call)))

    def kept(self, call: Call) -> tuple[Tensor, ...]:
        """For each layer (B, Q): the call's column in each slot, -1 where a slot only pads."""
        every = torch.arange(call.width, device=call.segments[0].columns.device)
        every = every.expand(call.rows, -1)
        if call.seen is not None:
            past = call.seen.shape[1] - call.width
            every = every.masked_fill(~call.seen[:, past:], -1)
        left = [
            one.columns if one.valid is None else one.columns.masked_fill(~one.valid, -1)
            for one in call.segments
        ]
        drops = [call.place(layer)[0] for layer in range(len(call.sliding))]
        return tuple(every if drop < 0 else left[drop] for drop in drops)
