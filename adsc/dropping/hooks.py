"""Dropping vision tokens while transformers' own forward runs: the hooks of an attached model.

Forward pre-hooks on the top model and on the inner model work out the schedule of a call
(`adsc.dropping.call`) and pass it on as one more keyword argument, which transformers threads to
every decoder layer; one on each decoder layer takes it out again and, from the first drop on,
substitutes the mask, the positions and, at a drop, the hidden states. Since the schedule travels
with the call, nothing is kept on a module, calls may nest or take turns, and a layer that is run
again for gradient checkpointing finds what it found before. There is no attention, no cache and no
generation here.

Legend: B rows, S columns of the call, Q columns that are left at the end.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from adsc.dropping.blocks import current
from adsc.dropping.cache_record import CacheError, cache_in, keep_record, record_of
from adsc.dropping.call import TYPES, Call, begin
from adsc.dropping.decoders import check_rotary
from adsc.dropping.layout import (
    Layout,
    all_columns,
    chosen_columns,
    follows,
    moved,
    own_sides,
)
from adsc.dropping.outputs import carry_kept
from adsc.dropping.segments import is_captured
from adsc.dropping.unserved import check_call
from adsc.errors import UnsupportedModel, VisionTokenError
from adsc.families.family import GRID, SIZE, Family
from adsc.method import Method
from adsc.plan import PruningPlan

CALL = "adsc_call"  # the keyword under which a call travels from the top model to its layers
OURS = (TYPES, "labels")  # what we read of a call even where its model does not
IGNORED = -100  # the label that transformers' losses leave out
# Signs that a trainer takes the mean over tokens that it counted itself (transformers', trl's).
COUNTED = ("num_items_in_batch", "fused_lm_head")
# What a collator of packed samples hands to flash attention. After a drop it no longer holds;
# attention then reads it off position ids.
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class EnterModel:
    """Pre-hook of the top and of the inner model: begin the call, decide where its last states are
    to stand, and lay the labels out alike.

    Args:
        family: of the model.
        plan: what it drops by.
        inner: attribute of the hooked module that holds the inner model; empty if it is that.
        names: of the hooked module's positional arguments.
        head: what becomes of the last states: logits of a language model, a head of another kind
            (which indexes columns of its own input), or none.
        full: hand out logits of all columns.
    """

    def __init__(
        self,
        family: Family,
        plan: PruningPlan | Method,
        inner: str,
        names: tuple[str, ...],
        head: str = "lm",
        full: bool = False,
    ):
        self.family, self.plan, self.inner, self.names = family, plan, inner, names
        self.head, self.full = head, full

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        if CALL in kwargs:
            return None
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        model = getattr(module, self.inner) if self.inner else module
        plan = current(module, self.plan)
        if plan.stages:
            check_call(self.family.decoder(model), EnterLayer)
            call = begin(model, self.family, plan, inputs)
            inputs = self.cut(model, inputs, call) | {CALL: call}
        for name in OURS:  # meant for us alone
            if name not in self.names:
                inputs.pop(name, None)
        return (), inputs

    def cut(self, model: nn.Module, inputs: dict[str, Any], call: Call) -> dict[str, Any]:
        """The inputs with what speaks of columns changed to what is handed out of them."""
        if call.segments:
            if inputs.get("shift_labels") is not None:
                raise VisionTokenError(
                    "shift_labels were given: with a pruning plan labels are shifted after the "
                    "drop, so pass labels instead"
                )
            call.layout = self._layout(inputs, call)
            if self.head == "lm" and inputs.get("labels") is not None:
                inputs["labels"] = _cut_labels(inputs, call, self.family, model)
            if "logits_to_keep" in inputs and not _flattens(inputs["logits_to_keep"]):
                inputs["logits_to_keep"] = 0  # the layout brings exactly what is wanted
        return inputs

    def _layout(self, inputs: dict[str, Any], call: Call) -> Layout | None:
        """Where the call's last states are to stand; None leaves them as the last layer has them.

        With labels the loss is taken inside, so a batch stays packed, unless rows are padded at
        different ends: then a caller takes log-probabilities of the last columns.
        """
        device, wanted = call.segments[-1].columns.device, inputs.get("logits_to_keep")
        # trl's fused head takes the states of the inner model, and labels of full length.
        full = self.full or self.head == "other" or bool(inputs.get("fused_lm_head"))
        if isinstance(wanted, Tensor):
            if not _flattens(wanted):
                return chosen_columns(wanted, call.width, device)
        elif wanted:
            if wanted == 1 and cache_in(inputs) is not None:
                _check_end(call)
            return chosen_columns(wanted, call.width, device)
        if full or _flattens(wanted):
            return all_columns(call.width, device)
        seen = call.seen_here
        if seen is None or is_captured():
            return None
        begins, ends = (~torch.stack([seen[:, 0], seen[:, -1]]).all(1)).tolist()
        if ends and (begins or inputs.get("labels") is None):
            return own_sides(call.segments[-1], seen)
        return None


def _check_end(call: Call) -> None:
    """Refuse what `generate` does with rows that are padded on the right: it counts the positions
    of what follows from 1, with and without a plan."""
    seen = call.seen_here
    if seen is not None and not is_captured() and not bool(seen[:, -1].all()):
        raise CacheError(
            "some rows end in padding, and what is generated behind it would have wrong positions; "
            "pad prompts on the left: processor.tokenizer.padding_side = 'left'"
        )


def _flattens(wanted: Any) -> bool:
    """Whether `logits_to_keep` is a mask (B, S), by which transformers flattens what is kept."""
    return isinstance(wanted, Tensor) and wanted.dtype == torch.bool


def _cut_labels(inputs: dict[str, Any], call: Call, family: Family, model: nn.Module) -> Tensor:
    """(B, S) -> labels of the columns that are handed out; vision tokens have none."""
    given, last = inputs["labels"], call.segments[-1]
    if given.shape[1] != call.width:  # of the columns that logits_to_keep asks for
        return given
    labels = given
    for columns, _ in family.vision(model, inputs):
        labels = labels.masked_fill(columns.to(labels.device), IGNORED)
    if any(inputs.get(name) is not None for name in COUNTED) and not is_captured():
        _warn_of_counted(given, labels)
    if call.layout is not None:
        return call.layout.pair(labels, last)
    labels = labels.gather(1, last.columns.to(labels.device))
    if last.valid is None:
        return labels
    return labels.masked_fill(~follows(last.valid).to(labels.device), IGNORED)


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
        cache = cache_in(kwargs)
        if call is None:
            if record_of(cache) is not None:
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
            call.made["entered", drop] = True
            if call.choice is not None and self.layer:
                hidden = call.choose(drop, self.layer, module, hidden, kwargs)
                if cache is not None:
                    keep_record(cache, call.after)
            hidden = call.take(drop, hidden)
        call.watch(drop, self.layer, module, hidden, kwargs)
        turn = kwargs.get("position_embeddings")
        if turn is not None:
            check_rotary(type(module).__name__, turn)
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

    `generate` encodes images first and then forgets their grids, which separate frames.
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
    """Forward hook of the top and of the inner model: lay the last states out as the call has it,
    and tell which columns each layer saw.

    `output.kept_positions` has one tensor (B, Q) for each layer: the call's column in each slot, -1
    where a slot only pads. It goes with `attentions[l]` and `hidden_states[l + 1]`; the last one
    with `logits`. Where these were laid out for the caller, one more tensor tells their columns.

    Args:
        inner: whether this is the inner model, whose states can still be moved.
    """

    def __init__(self, inner: bool):
        self.inner = inner

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        call: Call | None = kwargs.get(CALL)
        if call is None or not call.segments:
            return None
        if self.inner and any(
            ("entered", drop) not in call.made for drop in range(len(call.segments))
        ):
            raise UnsupportedModel(
                f"{type(module).__name__} doesn't hand the keyword arguments of a call on to its "
                "decoder's layers, so the plan was not kept: detach it, and report the model"
            )
        if self.inner and call.layout is not None:
            slots, _ = self._place(call)
            if not hasattr(output, "to_tuple"):
                output = (moved(output[0], slots), *output[1:])
            else:
                output.last_hidden_state = moved(output.last_hidden_state, slots)
        if hasattr(output, "to_tuple"):
            carry_kept(output, call.once(("kept",), lambda: self.kept(call)))
        return output

    def _place(self, call: Call) -> tuple[Tensor, Tensor]:
        layout = call.layout
        assert layout is not None
        place: tuple[Tensor, Tensor] = call.once(
            ("layout",), lambda: layout.place(call.segments[-1])
        )
        return place

    def kept(self, call: Call) -> tuple[Tensor, ...]:
        """For each layer (B, Q): the call's column in each slot, -1 where a slot only pads."""
        every = torch.arange(call.width, device=call.segments[0].columns.device)
        every = every.expand(call.rows, -1)
        if (seen := call.seen_here) is not None:
            every = every.masked_fill(~seen, -1)
        left = [
            one.columns if one.valid is None else one.columns.masked_fill(~one.valid, -1)
            for one in call.segments
        ]
        drops = [call.place(layer)[0] for layer in range(len(call.sliding))]
        kept = tuple(every if drop < 0 else left[drop] for drop in drops)
        return kept if call.layout is None else (*kept, self._place(call)[1])
