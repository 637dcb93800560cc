"""Dropping vision tokens while transformers' own forward runs: the hooks, and what one call hands
to its layers.

A model with a plan has three kinds of forward pre-hooks and no other change: one on the top model
and one on the inner model compute the schedule of a call (`Call`) and pass it on as one more
keyword argument, which transformers threads to every decoder layer; one on each decoder layer takes
it out again and, from the first drop on, substitutes the mask, the positions and, at a drop, the
hidden states. Since the schedule travels with the call, nothing is kept on a module, calls may nest
or take turns, and a layer that is run again for gradient checkpointing finds what it found before.

Masks come from transformers' own builders for the compacted sequence, so each attention backend
gets its native form, and none where plain transformers would need none. There is no attention, no
cache and no generation code here.

Legend: B rows, S columns of the call, Q columns left in a segment (the layers between two drops), H
columns that the cache held before the call, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    blockwise_overlay,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sliding_window_overlay,
)

from adsc.families import GRID, Family
from adsc.held import CacheError, Held, held_by, keep_record
from adsc.plan import PruningPlan
from adsc.schedule import Segment, survivors

CALL = "adsc_call"  # the keyword under which a call travels from the top model to its layers
IGNORED = -100  # the label that transformers' losses leave out


@dataclass(eq=False)
class Call:
    """The schedule of one forward call.

    Args:
        plan: the plan of the model.
        decoder: the text model: its config says how to build masks, its `rotary_emb` makes
            positions.
        rows: B.
        segments: after each drop, the call's columns that are left; empty if this call drops
            nothing.
        before: what the cache held before this call, None if nothing was ever dropped into it.
        after: what it holds after this call.
        seen: (B, past + S) bool, columns of the conversation that aren't padding; None if none is.
        blocks: (B, S) block in which a column attends both ways, -1 for none; None if causal.
        window_cuts_blocks: whether a sliding window also cuts attention inside a block.
    """

    plan: PruningPlan
    decoder: Any
    rows: int
    width: int
    segments: list[Segment]
    before: Held | None
    after: Held | None
    seen: Tensor | None
    blocks: Tensor | None
    window_cuts_blocks: bool
    made: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """What is the same for the layers of a segment is made by the first of them."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    @property
    def substitutes(self) -> bool:
        """Whether layers after a drop see anything else than plain transformers would give them."""
        return bool(self.segments) or self.before is not None

    def take(self, drop: int, hidden: Tensor) -> Tensor:
        """(B, S', D) -> (B, Q, D): the hidden states that are left after drop number `drop`."""
        index = self.segments[drop].take.to(hidden.device)
        return hidden.flatten(0, 1).index_select(0, index).unflatten(0, (self.rows, -1))

    def valid(self, drop: int) -> Tensor | None:
        """(B, Q) bool: which of the call's slots hold a token; None if all do."""
        if self.segments:
            return self.segments[drop].valid
        return None if self.seen is None else self.seen[:, -self.width :]

    def keys(self, drop: int) -> Tensor | None:
        """(B, H + Q) bool: which slots hold a token, the cache's included; None if all do."""
        valid, before = self.valid(drop), self.before
        if before is None or (valid is None and self.seen is None and not before.padded[drop]):
            return valid
        device = before.columns[drop].device
        listed = before.columns[drop].expand(self.rows, -1)
        known = listed >= 0
        tail = torch.ones(self.rows, before.tail, dtype=torch.bool, device=device)
        if self.seen is not None:
            known = known & self.seen.gather(1, listed.clamp(min=0))
            tail = self.seen[:, before.base : before.total]
        if valid is None:
            width = self.segments[drop].columns.shape[1] if self.segments else self.width
            valid = torch.ones(self.rows, width, dtype=torch.bool, device=device)
        return torch.cat([known, tail, valid], dim=1)

    def mask(self, drop: int, layer: int, hidden: Tensor, cache: Cache | None) -> Any:
        """The attention mask of a layer after drop number `drop`, as its backend takes it."""
        sliding = _is_sliding(self.decoder.config, layer)
        return self.once(
            ("mask", drop, sliding, hidden.device),
            lambda: self._build_mask(drop, layer, hidden, cache, sliding),
        )

    def _build_mask(
        self, drop: int, layer: int, hidden: Tensor, cache: Cache | None, sliding: bool
    ) -> Any:
        config = self.decoder.config
        how: dict[str, Any] = {
            "config": config,
            "inputs_embeds": hidden,
            "attention_mask": self.keys(drop),
            "past_key_values": cache,
            "layer_idx": layer,
        }
        if self.blocks is None:
            build = create_sliding_window_causal_mask if sliding else create_causal_mask
            return build(**how)
        blocks = self.block_numbers(drop)
        if sliding and self.window_cuts_blocks:
            how["or_mask_function"] = blockwise_overlay(blocks)
            how["and_mask_function"] = sliding_window_overlay(config.sliding_window)
            return create_causal_mask(**how)
        build = create_sliding_window_causal_mask if sliding else create_causal_mask
        return build(**how, block_sequence_ids=blocks)

    def block_numbers(self, drop: int) -> Tensor:
        """(B, H + Q): the block of each slot, -1 for none; what the cache held is in none."""
        assert self.blocks is not None
        segment, before = self.segments[drop], self.before
        blocks = self.blocks.gather(1, segment.columns)
        if segment.valid is not None:
            blocks = blocks.masked_fill(~segment.valid, -1)
        held = 0 if before is None else before.columns[drop].shape[1] + before.tail
        return nn.functional.pad(blocks, (held, 0), value=-1)

    def order(self, drop: int, hidden: Tensor) -> Tensor:
        """(1, Q): slots counted up.

        Attention reads position ids only to detect packed samples, and takes gaps for borders.
        """
        return self.once(
            ("order", drop, hidden.device),
            lambda: torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0),
        )

    def rotary(self, drop: int, layer: int, hidden: Tensor, given: Any) -> Any:
        """(cos, sin) of a segment: those of the columns that are left, or of their new numbers."""
        sliding = _is_sliding(self.decoder.config, layer)
        key = ("rotary", drop, sliding, hidden.device)
        if self.plan.positions == "reindex":
            return self.once(key, lambda: self._turn(hidden, self.numbers(drop, hidden), layer))
        if not self.segments or given is None:
            return given
        columns = self.segments[drop].columns.to(hidden.device)
        return self.once(key, lambda: tuple(_pick(table, columns) for table in given))

    def _turn(self, hidden: Tensor, numbers: Tensor, layer: int) -> Any:
        rotary = self.decoder.rotary_emb
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            return rotary(hidden, numbers, self.decoder.config.layer_types[layer])
        return rotary(hidden, numbers)

    def numbers(self, drop: int, hidden: Tensor) -> Tensor:
        """(B, Q) positions counted from 0 over the tokens that are left, the cache's included."""
        keys = self.keys(drop)
        width = hidden.shape[1]
        if keys is None:
            before = self.before
            start = 0 if before is None else before.columns[drop].shape[1] + before.tail
            return torch.arange(start, start + width, device=hidden.device).expand(self.rows, -1)
        return (keys.cumsum(1) - 1).clamp(min=0)[:, -width:].to(hidden.device)


def _pick(table: Tensor, columns: Tensor) -> Tensor:
    """(..., B or 1, S, D) at columns (B, Q) -> (..., B, Q, D)."""
    index = columns.unsqueeze(-1).expand(*table.shape[:-3], -1, -1, table.shape[-1])
    return table.expand(*table.shape[:-3], len(columns), -1, -1).gather(-2, index)


def _is_sliding(config: Any, layer: int) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds[layer] == "sliding_attention"
    return getattr(config, "sliding_window", None) is not None


def begin(model: nn.Module, family: Family, plan: PruningPlan, inputs: dict[str, Any]) -> Call:
    """Work out the schedule of a call of the inner model `model` with these inputs.

    Raises:
        VisionTokenError: vision tokens and images don't fit together.
        CacheError: the cache can't hold layers of different lengths.
    """
    tokens = inputs.get("input_ids")
    tokens = inputs["inputs_embeds"] if tokens is None else tokens
    rows, width = tokens.shape[:2]
    cache = inputs.get("past_key_values")
    if cache is not None and not isinstance(cache, Cache):
        raise CacheError(
            f"cache {type(cache).__name__} is not a transformers Cache; pass a DynamicCache"
        )
    before = held_by(cache)
    past = before.total if before else (cache.get_seq_length() if cache is not None else 0)
    seen = _seen(inputs.get("attention_mask"), past, width)

    segments: list[Segment] = []
    blocks = None
    if vision := family.vision(model, inputs):
        segments = survivors(vision, None if seen is None else seen[:, past:], plan)
        blocks = family.blocks(inputs, past, width)
    if segments and before is None and past:
        nothing = torch.empty(1, 0, dtype=torch.long, device=tokens.device)
        count = len(plan.stages)
        before = Held(past, 0, (nothing,) * count, (False,) * count, plan.stages[0][0] == 0)
    after = _after(before, segments, seen, past, width, plan)
    decoder = family.decoder(model)
    windowed = family.window_cuts_blocks
    return Call(plan, decoder, rows, width, segments, before, after, seen, blocks, windowed)


def _seen(mask: Any, past: int, width: int) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise CacheError(
            f"attention_mask is {type(mask).__name__} {tuple(getattr(mask, 'shape', ()))}; with a "
            "pruning plan it must "
            "be the 2-D mask (rows, columns) of the conversation, since each layer's own mask is "
            "made from it"
        )
    if mask.shape[1] != past + width:
        raise CacheError(
            f"attention_mask has {mask.shape[1]} columns, but the cache stands for {past} and the "
            f"call brings {width}: "
            "the mask must cover the whole uncompressed conversation"
        )
    seen = mask.bool()
    return None if bool(seen.all()) else seen


def _after(
    before: Held | None,
    segments: list[Segment],
    seen: Tensor | None,
    past: int,
    width: int,
    plan: PruningPlan,
) -> Held | None:
    """What a cache holds after the call."""
    if not segments:
        if before is None:
            return None
        return Held(past + width, before.base, before.columns, before.padded, before.from_layer_0)
    columns, padded = [], []
    for drop, segment in enumerate(segments):
        new = segment.columns + past
        if segment.valid is not None:
            new = new.masked_fill(~segment.valid, -1)
        parts = [new]
        if before is not None:
            tail = torch.arange(before.base, before.total, device=new.device).expand(len(new), -1)
            if seen is not None:
                tail = tail.masked_fill(~seen[:, before.base : before.total], -1)
            parts = [before.columns[drop].expand(len(new), -1), tail, new]
        columns.append(torch.cat(parts, dim=1))
        was_padded = before is not None and (before.padded[drop] or seen is not None)
        padded.append(segment.valid is not None or was_padded)
    total = past + width
    return Held(total, total, tuple(columns), tuple(padded), plan.stages[0][0] == 0)


class EnterModel:
    """Pre-hook of the top and of the inner model: begin the call, and cut the labels to it."""

    def __init__(self, family: Family, plan: PruningPlan, inner: str, names: tuple[str, ...]):
        self.family, self.plan, self.inner, self.names = family, plan, inner, names

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        if CALL in kwargs:
            return None
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        model = getattr(module, self.inner) if self.inner else module
        call = begin(model, self.family, self.plan, inputs)
        if call.segments and inputs.get("labels") is not None:
            inputs["labels"] = _cut_labels(inputs, call, self.family, model)
        return (), inputs | {CALL: call}


def _cut_labels(inputs: dict[str, Any], call: Call, family: Family, model: nn.Module) -> Tensor:
    """(B, S) -> (B, Q): labels of the columns that reach the end; vision tokens have none."""
    labels, last = inputs["labels"], call.segments[-1]
    for columns, _ in family.vision(model, inputs):
        labels = labels.masked_fill(columns.to(labels.device), IGNORED)
    labels = labels.gather(1, last.columns.to(labels.device))
    return (
        labels if last.valid is None else labels.masked_fill(~last.valid.to(labels.device), IGNORED)
    )


class EnterLayer:
    """Pre-hook of a decoder layer.

    Args:
        layer: its number.
        drop: the number of the last drop at or before it, -1 before the first.
        drops: whether that drop happens here.
    """

    def __init__(self, layer: int, drop: int, drops: bool):
        self.layer, self.drop, self.drops = layer, drop, drops

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call: Call | None = kwargs.get(CALL)
        cache = kwargs.get("past_key_values")
        if call is None:
            if held_by(cache) is not None:
                raise CacheError(
                    "this cache holds a conversation with dropped vision tokens; continue it "
                    "through the multimodal "
                    "model, not through its language model alone"
                )
            return None
        kwargs = {name: value for name, value in kwargs.items() if name != CALL}
        if self.layer == 0 and cache is not None:
            keep_record(cache, call.after)
        if self.drop < 0 or not call.substitutes:
            return args, kwargs
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if self.drops and call.segments:
            hidden = call.take(self.drop, hidden)
        kwargs["attention_mask"] = call.mask(self.drop, self.layer, hidden, cache)
        kwargs["position_embeddings"] = call.rotary(
            self.drop, self.layer, hidden, kwargs.get("position_embeddings")
        )
        kwargs["position_ids"] = call.order(self.drop, hidden)
        return (hidden, *args[1:]), kwargs


class EnterVision:
    """Pre-hook of everything beside the decoder: some models pass their keywords on to it."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if CALL not in kwargs:
            return None
        return args, {name: value for name, value in kwargs.items() if name != CALL}


class LeaveVision:
    """Forward hook of a vision tower: its output keeps the grids that it was called with.

    `generate` encodes images first and then forgets their grids, by which frames are told apart.
    """

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if (grid := kwargs.get("grid_thw")) is not None and hasattr(output, "to_tuple"):
            setattr(output, GRID, grid.tolist())


class LeaveModel:
    """Forward hook of the top and of the inner model: tell which columns each layer saw."""

    def __init__(self, layers: tuple[int, ...]):
        self.layers = layers  # the last drop at or before each layer, -1 before the first

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        call: Call | None = kwargs.get(CALL)
        if call is None or not call.segments or not hasattr(output, "to_tuple"):
            return
        output.kept_positions = call.once(("kept",), lambda: self.kept(call))

    def kept(self, call: Call) -> tuple[Tensor, ...]:
        """For each layer (B, Q): the call's column in each slot, -1 where a slot only pads."""
        device = call.segments[0].columns.device
        every = torch.arange(call.width, device=device).expand(call.rows, -1)
        if call.seen is not None:
            every = every.masked_fill(~call.seen[:, -call.width :], -1)
        left = [
            s.columns if s.valid is None else s.columns.masked_fill(~s.valid, -1)
            for s in call.segments
        ]
        return tuple(every if drop < 0 else left[drop] for drop in self.layers)
