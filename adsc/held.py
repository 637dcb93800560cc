"""What a KV cache holds after vision tokens were dropped, kept on the cache itself.

Layer l's cache has exactly the tokens that layer l saw; `Held` says which columns of the
uncompressed conversation those are. It belongs to the cache object that a call uses, never to the
model, so generations that run in turns don't disturb each other. When rows of a cache are
reordered, repeated, selected or cropped, the record has to follow: the cache's class is extended in
place by the few methods that do so (a wrapped method on the instance would tie the cache's memory
into a reference cycle). Keys and values are stored by transformers' own layers, untouched.

Legend: B rows, H slots of a cache layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


class CacheError(ValueError):
    """A cache that can't be used, or can't be changed in this way, with dropped vision tokens."""


@dataclass(frozen=True, eq=False)
class Held:
    """The columns that each segment's cache layers hold.

    Up to column `base` the slots are listed; the columns `base..total-1` came after the last drop,
    all are held.

    Args:
        total: columns of the uncompressed conversation so far.
        base: columns up to which `columns` lists what is held.
        columns: for each drop (B or 1, H): the column in each slot, -1 in a slot that only pads.
        padded: for each drop: whether any listed slot only pads.
        from_layer_0: whether the first drop is before layer 0, so that no layer holds everything.
    """

    total: int
    base: int
    columns: tuple[Tensor, ...]
    padded: tuple[bool, ...]
    from_layer_0: bool = False

    @property
    def tail(self) -> int:
        """Columns after the last drop: every layer holds them."""
        return self.total - self.base

    def rows(self, index: Tensor) -> Held:
        """The record of the rows that `index` names."""
        chosen = (
            columns if len(columns) == 1 else columns[index.to(columns.device)]
            for columns in self.columns
        )
        return replace(self, columns=tuple(chosen))

    def repeated(self, times: int) -> Held:
        """The record when each row stands `times` times in a row."""
        many = (
            columns if len(columns) == 1 else columns.repeat_interleave(times, dim=0)
            for columns in self.columns
        )
        return replace(self, columns=tuple(many))

    def cropped(self, count: int) -> Held:
        """The record without its last `count` columns.

        Raises:
            CacheError: among those columns some are not held by every layer.
        """
        if count <= self.tail:
            return replace(self, total=self.total - count)
        start, cut = self.total - count, count - self.tail
        whole = all(
            columns.shape[1] >= cut
            and bool(
                (columns[:, -cut:] == torch.arange(start, self.base, device=columns.device)).all()
            )
            for columns in self.columns
        )
        if start < 0 or not whole:
            raise CacheError(
                f"can't crop the last {count} of {self.total} positions: vision tokens among them "
                "were dropped, so "
                "layers hold different tokens there; crop no further back than the last image, or "
                "start a new cache"
            )
        return replace(
            self,
            total=start,
            base=start,
            columns=tuple(columns[:, :-cut] for columns in self.columns),
        )


class _Follows:
    """Methods of a cache that change its rows or length, so that the record changes alike."""

    adsc_held: Held | None

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        # Without a layer the question is how long the conversation is; layer 0 may have dropped
        # some of it.
        held = self.adsc_held
        if layer_idx is None and held is not None and held.from_layer_0:
            return held.total
        return super().get_seq_length(layer_idx or 0)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        if self.adsc_held is not None:
            self.adsc_held = self.adsc_held.rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        if self.adsc_held is not None:
            self.adsc_held = self.adsc_held.rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.adsc_held is not None:
            self.adsc_held = self.adsc_held.repeated(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        held = self.adsc_held
        if held is not None:
            if tokens_to_remove > 0:  # transformers 5.17 still takes the length that is to stay
                tokens_to_remove = min(tokens_to_remove - held.total, 0)
            held = held.cropped(-tokens_to_remove)
        super().crop(tokens_to_remove)  # type: ignore[misc]
        self.adsc_held = held

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.adsc_held = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles are made from the original class: the extended one has no importable
        # name.
        return _rebuild, (type(self).__mro__[2],), self.__dict__


@lru_cache(maxsize=32)
def _following(kind: type) -> type:
    return kind if issubclass(kind, _Follows) else type(kind.__name__, (_Follows, kind), {})


def _rebuild(kind: type) -> Any:
    return object.__new__(_following(kind))


def held_by(cache: Any) -> Held | None:
    """The record of a cache; None if nothing was dropped into it, or if it is empty again."""
    held = getattr(cache, "adsc_held", None)
    return held if held is not None and cache.layers and cache.get_seq_length(0) else None


def keep_record(cache: Cache, held: Held | None) -> None:
    """Put the record on the cache that a call writes to; None takes an old one away."""
    if held is not None:
        cache.__class__ = _following(type(cache))  # type: ignore[arg-type]
        cache.adsc_held = held  # type: ignore[attr-defined]
    elif isinstance(cache, _Follows):
        cache.adsc_held = None
