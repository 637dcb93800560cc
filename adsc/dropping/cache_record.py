"""What a KV cache holds after vision tokens were dropped, kept on the cache itself.

Layer l's cache has exactly the tokens that layer l saw; `Held` says which columns of the
uncompressed conversation those are. It belongs to the cache object that a call uses, never to the
model, so generations that take turns don't disturb each other; decoding does not change it. When
rows of a cache are reordered, repeated, selected or cropped, the record has to follow: the cache's
class is extended in place by the few methods that do so (a wrapped method on the instance would tie
the cache's memory into a reference cycle). Keys and values are stored by transformers' own layers,
untouched.

Legend: B rows, H slots of a cache layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


class CacheError(ValueError):
    """A cache or mask that can't be used, or changed in this way, with dropped vision tokens."""


@dataclass(frozen=True, eq=False)
class Held:
    """The columns that each segment's cache layers hold.

    The slots that stand for the first `base` columns are listed. All columns from there on are held
    by every layer, so their number is the cache's to tell.

    Args:
        base: columns up to which `columns` lists what is held.
        columns: for each drop (B or 1, H): the column in each slot, -1 in a slot that only pads.
        padded: for each drop: whether any listed slot only pads.
        layer: the layer of the first drop.
        plan: the plan by which was dropped.
    """

    base: int
    columns: tuple[Tensor, ...]
    padded: tuple[bool, ...]
    layer: int
    plan: Any = None

    def total(self, cache: Any) -> Any:
        """Columns of the uncompressed conversation so far; a 0-d tensor for a static cache."""
        return self.base + cache.layers[self.layer].get_seq_length() - self.columns[0].shape[1]

    def changed(self, change: Callable[[Tensor], Tensor]) -> Held:
        """The record after `change` to the rows; those that all rows share stay."""
        columns = (one if len(one) == 1 else change(one) for one in self.columns)
        return replace(self, columns=tuple(columns))

    def cropped(self, count: int, total: int) -> Held:
        """The record without the last `count` of `total` columns.

        Raises:
            CacheError: among those columns some are not held by every layer.
        """
        start = total - count
        if start >= self.base:
            return self
        cut = self.base - start
        whole = start >= 0 and all(
            columns.shape[1] >= cut
            and bool(
                (columns[:, -cut:] == torch.arange(start, self.base, device=columns.device)).all()
            )
            for columns in self.columns
        )
        if not whole:
            raise CacheError(
                f"can't crop the last {count} of {total} positions: vision tokens among them were "
                "dropped, so layers hold different tokens there; crop no further back than the "
                "last image, or start a new cache"
            )
        columns = tuple(columns[:, :-cut] for columns in self.columns)
        return replace(self, base=start, columns=columns)


class _Follows:
    """Methods of a cache that change its rows or length, so that the record changes alike."""

    adsc_held: Held | None

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        # Without a layer the question is how long the conversation is; layer 0 may hold less.
        held = self.adsc_held
        if layer_idx is None and held is not None and held.layer == 0:
            return held.total(self)
        return super().get_seq_length(layer_idx or 0)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        if self.adsc_held is not None:
            self.adsc_held = self.adsc_held.changed(lambda rows: rows[beam_idx.to(rows.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        if self.adsc_held is not None:
            self.adsc_held = self.adsc_held.changed(lambda rows: rows[indices.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.adsc_held is not None:
            self.adsc_held = self.adsc_held.changed(
                lambda rows: rows.repeat_interleave(repeats, dim=0)
            )

    def crop(self, tokens_to_remove: int) -> None:
        held = self.adsc_held
        if held is not None:
            total = held.total(self)
            if tokens_to_remove > 0:  # transformers 5.17 still takes the length that is to stay
                tokens_to_remove = min(tokens_to_remove - total, 0)
            held = held.cropped(-tokens_to_remove, total)
        super().crop(tokens_to_remove)  # type: ignore[misc]
        self.adsc_held = held

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.adsc_held = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles are made from the original class: the extended has no importable name.
        return _rebuild, (type(self).__mro__[2],), self.__dict__


@lru_cache(maxsize=32)
def _following(kind: type) -> type:
    return kind if issubclass(kind, _Follows) else type(kind.__name__, (_Follows, kind), {})


def _rebuild(kind: type) -> Any:
    return object.__new__(_following(kind))


def held_by(cache: Any) -> Held | None:
    """The record of a cache; None if nothing was dropped into it, or if it is empty again."""
    held: Held | None = getattr(cache, "adsc_held", None)
    if held is None or len(cache.layers) <= held.layer:
        return None
    length = cache.layers[held.layer].get_seq_length()
    # Gradient checkpointing leaves the cache empty that it was given. A static cache's length is a
    # tensor; reading it would cost a synchronisation, and it can't be in that position.
    return None if isinstance(length, int) and length == 0 else held


def keep_record(cache: Cache, held: Held | None) -> None:
    """Put the record on the cache that a call writes to; None takes an old one away."""
    if held is not None:
        cache.__class__ = _following(type(cache))  # type: ignore[arg-type]
        cache.adsc_held = held  # type: ignore[attr-defined]
    elif isinstance(cache, _Follows):
        cache.adsc_held = None
