"""The schedule of one forward call: what each layer sees instead of what transformers gives it.

`begin` works it out from a call's inputs before the first layer runs; `Call` then travels with the
call through transformers' own keyword arguments, and the layers' hooks ask it. Masks come from
transformers' builders for the compacted sequence, so each attention backend gets its native form,
and none where plain transformers would need none. A sliding window counts the tokens that a layer
holds, as every kernel and every sliding cache does.

Legend: B rows, S columns of the call, Q columns left in a segment (the layers between two drops), H
columns that a cache layer held before the call, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
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

from adsc.dropping.cache_record import CacheError, CacheRecord, cache_in, record_of
from adsc.dropping.choice import Choice, Scene
from adsc.dropping.layout import Layout
from adsc.dropping.segment import Segment
from adsc.dropping.segments import is_captured, survivors
from adsc.errors import VisionTokenError
from adsc.families.family import Family
from adsc.method import Method
from adsc.plan import PruningPlan

SKIPS = "allow_is_causal_skip"  # of mask builders, from transformers 5.23 on
_MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters
_CACHE = "cache" if "cache" in _MASK_ARGUMENTS else "past_key_values"  # since 5.24
TYPES = "mm_token_type_ids"  # 0 is text: what Qwen's processors write, and who passes embeddings


@dataclass(eq=False, kw_only=True)
class Call:
    """The schedule of one forward call.

    Args:
        plan: the plan or method of the model.
        family: what there is to know of the model.
        decoder: the text model: its config says how to build masks, its `rotary_emb` turns.
        rows: B.
        width: S.
        past: columns of the conversation before this call.
        segments: after each drop, the call's columns that are left; empty if it drops nothing. Of a
            method, stand-ins of the same shapes until it has chosen.
        before: the cache's record before this call, None if it has no drops.
        after: what it holds after this call; None if that is no other than before.
        seen: (B, at least past + S) bool, columns that aren't padding; None if none is.
        square: a mask (B or 1, any, S, S) that the caller made; None if there is none.
        blocks: (B, S) block in which a column attends both ways, -1 for none; None if causal.
        samples: (B, S) number of the packed sample of each column; None if nothing is packed.
        sliding: for each layer whether it attends to a sliding window.
        choice: what a method has chosen so far; None for a plan, or if the call drops nothing.
        layout: where its last states are handed out; None leaves them as the last layer has them.
    """

    plan: PruningPlan | Method
    family: Family
    decoder: Any
    rows: int
    width: int
    past: Any
    segments: list[Segment]
    before: CacheRecord | None
    after: CacheRecord | None
    seen: Tensor | None
    square: Tensor | None
    blocks: Tensor | None
    samples: Tensor | None
    sliding: tuple[bool, ...]
    choice: Choice | None
    layout: Layout | None = None
    made: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """What is the same for the layers of a segment is made by the first of them."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def place(self, layer: int) -> tuple[int, bool]:
        """The number of the last drop at or before a layer, -1 before the first; whether it happens
        there."""
        at = [where for where, _ in self.plan.stages]
        # The compiler takes a layer's number for a symbol, which it finds in no list.
        return sum(where <= layer for where in at) - 1, any(where == layer for where in at)

    @property
    def seen_here(self) -> Tensor | None:
        """(B, S) bool, the call's own columns that aren't padding; None if none is. A static cache
        has `seen` go on to slots that are not filled yet."""
        return None if self.seen is None else self.seen[:, self.past : self.past + self.width]

    @property
    def substitutes(self) -> bool:
        """Whether layers after a drop see anything else than transformers would give them."""
        return len(self.segments) > 0 or self.before is not None

    def take(self, drop: int, hidden: Tensor) -> Tensor:
        """(B, S', D) -> (B, Q, D): the hidden states that are left after drop number `drop`."""
        segment, before = self.segments[drop], hidden.flatten(0, 1)
        left = before.index_select(0, segment.take.to(hidden.device))
        for pooling in segment.pooling:
            left = pooling.put(before, left)
        return left.unflatten(0, (self.rows, -1))

    def choose(
        self, drop: int, number: int, layer: nn.Module | None, hidden: Tensor, how: dict[str, Any]
    ) -> Tensor:
        """(B, Q, D): a layer's input with what a method merges at its drop, not cut yet.

        Args:
            drop: the drop that happens here.
            number: of the layer.
            layer: None at the input of the decoder, where drops before layer 0 are chosen.
            hidden: (B, Q, D).
            how: the other arguments of the layer.
        """
        assert self.choice is not None
        scene = self._scene(drop - 1, number, layer, hidden, how)
        self.segments[drop] = self.choice.make(scene, drop, self.segments)
        self.after = self.choice.holds()
        return self.choice.merge(scene, drop)

    def watch(
        self, drop: int, number: int, layer: nn.Module, hidden: Tensor, how: dict[str, Any]
    ) -> None:
        """Show a method the input of a layer that it watches; `drop` is the last before it."""
        if self.choice is not None and number in self.choice.method.watches():
            self.choice.note(self._scene(drop, number, layer, hidden, how))

    def _scene(
        self, drop: int, number: int, layer: nn.Module | None, hidden: Tensor, how: dict[str, Any]
    ) -> Scene:
        assert self.choice is not None
        cache, rotary = cache_in(how), None
        if layer is not None:
            rotary = how["position_embeddings"]
            if drop >= 0:
                rotary = self.rotary(drop, number, hidden, rotary, cache)
        return Scene(
            choice=self.choice,
            call=self,
            number=number,
            layer=layer,
            hidden=hidden,
            rotary=rotary,
            cache=cache,
            drop=drop,
        )

    def mask(self, drop: int, layer: int, hidden: Tensor, cache: Cache | None) -> Any:
        """The attention mask of a layer after drop number `drop`, as its backend takes it."""
        sliding = self.sliding[layer]
        return self.once(
            ("mask", drop, sliding, hidden.device),
            lambda: self._build_mask(drop, layer, hidden, cache, sliding),
        )

    def _build_mask(
        self, drop: int, layer: int, hidden: Tensor, cache: Cache | None, sliding: bool
    ) -> Any:
        config = self.decoder.config
        if self.square is not None:
            return _pick_square(self.square, self.segments[drop].columns)
        how: dict[str, Any] = {
            "config": config,
            "inputs_embeds": hidden,
            "attention_mask": self.keys(drop, layer, hidden, cache),
            _CACHE: cache,
            "layer_idx": layer,
        }
        if self.samples is not None:
            how["position_ids"] = self.order(drop, hidden)
        if SKIPS in _MASK_ARGUMENTS and self.segments and self.segments[drop].valid is not None:
            how[SKIPS] = False  # rows are ragged: to look whether nothing pads would only wait
        build = create_sliding_window_causal_mask if sliding else create_causal_mask
        if self.blocks is None:
            return build(**how)
        blocks = self._block_numbers(drop, layer, cache)
        if sliding and self.family.window_cuts_blocks:
            how["or_mask_function"] = blockwise_overlay(blocks)
            how["and_mask_function"] = sliding_window_overlay(config.sliding_window)
            return create_causal_mask(**how)
        return build(**how, block_sequence_ids=blocks)

    def keys(self, drop: int, layer: int, hidden: Tensor, cache: Cache | None) -> Tensor | None:
        """(B, H + Q) bool: which slots hold a token, the cache's included; None if all do.

        A static cache's slots that are not filled yet count as the attention mask has them.
        """
        before, valid = self.before, None
        if self.segments:
            valid = self.segments[drop].valid
        elif before is None:
            return None if self.seen is None else self.seen[:, -self.width :]
        if before is None or cache is None:
            return valid
        if valid is None and self.seen is None and not before.padded[drop]:
            return None
        listed = before.columns[drop].expand(self.rows, -1)
        known = listed >= 0
        if self.seen is not None:
            known = known & self.seen.gather(1, listed.clamp(min=0))
            if not self.segments:
                return torch.cat([known, self.seen[:, before.base :]], dim=1)
        width = hidden.shape[1]
        if not self.segments:  # nothing of the tail pads
            length, offset = cache.get_mask_sizes(width, layer)
            return torch.cat(
                [known, known.new_ones(self.rows, length + offset - known.shape[1])], 1
            )
        tail = _length(cache, layer) - known.shape[1]
        since = known.new_ones(self.rows, int(tail))
        if self.seen is not None:
            since = self.seen[:, before.base : before.base + int(tail)]
        new = known.new_ones(self.rows, width) if valid is None else valid
        return torch.cat([known, since, new], dim=1)

    def _block_numbers(self, drop: int, layer: int, cache: Cache | None) -> Tensor:
        """(B, H + Q): the block of each slot, -1 for none; what the cache held is in none."""
        assert self.blocks is not None
        segment = self.segments[drop]
        blocks = self.blocks.gather(1, segment.columns)
        if segment.valid is not None:
            blocks = blocks.masked_fill(~segment.valid, -1)
        return nn.functional.pad(blocks, (int(_length(cache, layer)), 0), value=-1)

    def order(self, drop: int, hidden: Tensor) -> Tensor:
        """(1 or B, Q): slots counted up, anew in each packed sample.

        Attention reads position ids only to detect packed samples, and takes gaps for borders.
        """
        return self.once(("order", drop, hidden.device), lambda: self._count_up(drop, hidden))

    def _count_up(self, drop: int, hidden: Tensor) -> Tensor:
        slots = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        if self.samples is None:
            return slots
        samples = self.samples.gather(1, self.segments[drop].columns).to(hidden.device)
        begins = nn.functional.pad(samples[:, 1:] != samples[:, :-1], (1, 0), value=True)
        return slots - torch.where(begins, slots, 0).cummax(1).values

    def rotary(self, drop: int, layer: int, hidden: Tensor, given: Any, cache: Cache | None) -> Any:
        """(cos, sin) of a segment: those of the columns that are left, or of their new numbers."""
        key = ("rotary", drop, self.sliding[layer], hidden.device)
        if self.plan.positions == "reindex":
            return self.once(key, lambda: self._turn(drop, layer, hidden, cache))
        if not self.segments or given is None:
            return given
        columns = self.segments[drop].columns.to(hidden.device)
        return self.once(key, lambda: tuple(_pick(table, columns) for table in given))

    def _turn(self, drop: int, layer: int, hidden: Tensor, cache: Cache | None) -> Any:
        """The rotary tables of positions counted from 0 over the tokens that are left."""
        slots = torch.arange(hidden.shape[1], device=hidden.device) + _length(cache, layer)
        keys = self.keys(drop, layer, hidden, cache)
        if self.samples is not None:
            numbers = self.order(drop, hidden)
        elif keys is None:
            numbers = slots.unsqueeze(0)
        else:
            numbers = (keys.cumsum(1) - 1).clamp(min=0).to(hidden.device)[:, slots]
        numbers = numbers.expand(self.rows, -1)
        if self.family.rotary_by_layer_type or _by_kind(self.decoder.rotary_emb):
            kind = self.decoder.config.layer_types[layer]
            return self.decoder.rotary_emb(hidden, numbers, kind)
        return self.decoder.rotary_emb(hidden, numbers)


def _by_kind(rotary: nn.Module) -> bool:
    """Whether full and sliding layers turn differently."""
    return "layer_type" in inspect.signature(rotary.forward).parameters


def _length(cache: Cache | None, layer: int) -> Any:
    """Slots of a cache layer that are filled."""
    return 0 if cache is None or layer >= len(cache.layers) else cache.get_seq_length(layer)


def _pick(table: Tensor, columns: Tensor) -> Tensor:
    """(..., B or 1, S, D) at columns (B, Q) -> (..., B, Q, D)."""
    index = columns.unsqueeze(-1).expand(*table.shape[:-3], -1, -1, table.shape[-1])
    return table.expand(*table.shape[:-3], len(columns), -1, -1).gather(-2, index)


def _pick_square(mask: Tensor, columns: Tensor) -> Tensor:
    """(B or 1, heads, S, S) at columns (B, Q) of both axes -> (B, heads, Q, Q)."""
    mask = mask.expand(len(columns), -1, -1, -1)
    heads, width = mask.shape[1], mask.shape[-1]
    rows = columns[:, None, :, None].expand(-1, heads, -1, width)
    mask = mask.gather(2, rows)
    return mask.gather(3, columns[:, None, None, :].expand(-1, heads, columns.shape[1], -1))


def sliding_layers(config: Any, layers: int) -> tuple[bool, ...]:
    """For each layer of the decoder whether it attends to a sliding window."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (getattr(config, "sliding_window", None) is not None,) * layers
    return tuple(kind == "sliding_attention" for kind in kinds)


def is_sliding(config: Any, layer: int) -> bool:
    """Whether one layer of the decoder attends to a sliding window."""
    return sliding_layers(config, layer + 1)[layer]


def first_full_layer(config: Any) -> int:
    """The first layer of the decoder that attends to everything."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    return kinds.index("full_attention") if "full_attention" in kinds else 0


def begin(
    model: nn.Module, family: Family, plan: PruningPlan | Method, inputs: dict[str, Any]
) -> Call:
    """Work out the schedule of a call of the inner model `model` with these inputs.

    Raises:
        VisionTokenError: vision tokens and images don't fit together.
        CacheError: the cache, or the mask, can't serve layers of different lengths.
    """
    tokens = inputs.get("input_ids")
    tokens = inputs["inputs_embeds"] if tokens is None else tokens
    rows, width = tokens.shape[:2]
    cache = cache_in(inputs)
    if cache is not None and not isinstance(cache, Cache):
        raise CacheError(f"{type(cache).__name__} is not a transformers Cache; pass a DynamicCache")
    before = record_of(cache)
    if before is not None and before.plan not in (None, plan):
        raise CacheError(
            f"this cache holds a conversation from which plan {str(before.plan)!r} dropped tokens, "
            f"and the model now has {str(plan)!r}: attach the former, or start a new cache"
        )
    past = before.total(cache) if before else _length(cache, 0)
    decoder, first = family.decoder(model), plan.stages[0][0]
    if cache is not None and cache.is_compileable and first <= first_full_layer(decoder.config):
        raise CacheError(
            f"{type(cache).__name__} with a plan that drops before layer {first}: `generate` makes "
            f"masks for layer {first_full_layer(decoder.config)}, which must still cover the "
            "whole conversation; drop after that layer, or use a DynamicCache"
        )
    seen, square = _read_mask(inputs.get("attention_mask"), cache, past, width)

    segments: list[Segment] = []
    blocks = samples = choice = None
    pooled = isinstance(plan, PruningPlan) and plan.pool is not None
    vision = family.vision(model, inputs, regions=pooled)
    if not vision and inputs.get("input_ids") is None and width > 1:
        _check_text(inputs)
    if vision:
        if isinstance(plan, Method) and is_captured():
            raise VisionTokenError(
                f"{plan.name} chooses tokens by their content and reads where images are: run its "
                "prefill outside of torch.compile and CUDA graphs"
            )
        past = int(past)
        samples = _samples(inputs, cache, seen)
        new = None if seen is None else seen[:, past : past + width]
        segments = survivors(vision, new, plan)
        blocks = family.blocks(inputs, past, width)
        _check_ragged(segments, samples, square)
        if before is None and past:
            nothing = torch.empty(1, 0, dtype=torch.long, device=tokens.device)
            count = len(plan.stages)
            before = CacheRecord(0, (nothing,) * count, (False,) * count, first)
        if isinstance(plan, Method):
            holds = partial(_after, before, segments, seen, past, width, plan)
            choice = Choice(plan, model, vision, new, inputs, samples, holds)
    after = _after(before, segments, seen, past, width, plan) if segments else None
    return Call(
        plan=plan,
        family=family,
        decoder=decoder,
        rows=rows,
        width=width,
        past=past,
        segments=segments,
        before=before,
        after=after,
        seen=seen,
        square=square,
        blocks=blocks,
        samples=samples,
        sliding=sliding_layers(decoder.config, len(decoder.layers)),
        choice=choice,
    )


def _check_text(inputs: dict[str, Any]) -> None:
    """Embeddings without images: text if the caller says so, otherwise unknown."""
    types = inputs.get(TYPES)
    if types is None or (not is_captured() and bool((types != 0).any())):
        raise VisionTokenError(
            "inputs_embeds came without images: if vision features are merged into them already, "
            "their positions and images are unknown, so nothing could be dropped; "
            "pass input_ids, or embeddings of the image tokens themselves, together with "
            f"pixel_values; for text alone pass {TYPES}=torch.zeros(rows, columns) beside them"
        )


def _read_mask(
    mask: Any, cache: Cache | None, past: Any, width: int
) -> tuple[Tensor | None, Tensor | None]:
    """A call's attention mask as `Call.seen` and `Call.square`."""
    if isinstance(mask, Mapping):  # one for each type of layer, made by `generate`
        mask = mask.get("full_attention")
    if mask is None:
        return None, None
    if isinstance(mask, Tensor) and mask.ndim == 4:
        if cache is not None and cache.is_compileable:
            # `generate` has made it: the last query sees all columns but padding.
            last = mask[:, 0, -1]
            return (last if last.dtype == torch.bool else last == 0), None
        if isinstance(past, int) and past == 0 and mask.shape[-2:] == (width, width):
            return None, mask
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise CacheError(
            f"attention_mask is {type(mask).__name__} {tuple(getattr(mask, 'shape', ()))}; with a "
            "pruning plan it must be 2-D (rows, columns of the conversation), or 4-D and square "
            "without a past, since each layer's own mask is made from it"
        )
    if isinstance(past, int) and mask.shape[1] != past + width:
        raise CacheError(
            f"attention_mask has {mask.shape[1]} columns, but the cache stands for {past} and the "
            f"call brings {width}: the mask must cover the whole uncompressed conversation"
        )
    seen = mask.bool()
    return (None if not is_captured() and bool(seen.all()) else seen), None


def _samples(inputs: dict[str, Any], cache: Cache | None, seen: Tensor | None) -> Tensor | None:
    """(B, S) number of the packed sample of each column, from position ids that restart."""
    positions = inputs.get("position_ids")
    if positions is None or seen is not None or _length(cache, 0) or is_captured():
        if positions is None and inputs.get("cu_seq_lens_q") is not None:
            raise VisionTokenError(
                "cu_seq_lens without position_ids: packed samples are separated by position ids "
                "that restart, so pass both"
            )
        return None
    if positions.ndim == 3:  # several axes: the first of four counts columns
        if positions.shape[0] != 4:
            return None
        positions = positions[0]
    begins = nn.functional.pad(positions[:, 1:] - positions[:, :-1] != 1, (1, 0))
    return begins.cumsum(1) if bool(begins.any()) else None


def _check_ragged(segments: list[Segment], samples: Tensor | None, square: Tensor | None) -> None:
    ragged = any(segment.valid is not None for segment in segments)
    if ragged and (samples is not None or square is not None):
        what = "packed samples" if samples is not None else "a 4-D attention mask"
        raise CacheError(
            f"rows with {what} keep different numbers of tokens, and can't be padded again; use "
            "batches of one row, or a 2-D attention mask"
        )


def _after(
    before: CacheRecord | None,
    segments: list[Segment],
    seen: Tensor | None,
    past: int,
    width: int,
    plan: PruningPlan | Method,
) -> CacheRecord:
    """What a cache holds after a call that drops."""
    columns, padded = [], []
    for drop, segment in enumerate(segments):
        new = segment.columns + past
        if segment.valid is not None:
            new = new.masked_fill(~segment.valid, -1)
        parts = [new]
        if before is not None:
            tail = torch.arange(before.base, past, device=new.device).expand(len(new), -1)
            if seen is not None:
                tail = tail.masked_fill(~seen[:, before.base : past], -1)
            parts = [before.columns[drop].expand(len(new), -1), tail, new]
        columns.append(torch.cat(parts, dim=1))
        was_padded = before is not None and (before.padded[drop] or seen is not None)
        padded.append(segment.valid is not None or was_padded)
    return CacheRecord(past + width, tuple(columns), tuple(padded), plan.stages[0][0], plan)
