"""What a KV cache holds after vision tokens were dropped, kept on the cache itself.

Layer l's cache has exactly the tokens that layer l saw; `CacheRecord` says which columns of the
uncompressed conversation those are. It belongs to the cache object that a call uses, never to the
model, so generations that take turns don't disturb each other; decoding does not change it. When
rows of a cache are reordered, repeated, selected or cropped, the record has to follow: the cache's
class is extended in place by the few methods that do so (a wrapped method on the instance would tie
the cache's memory into a reference cycle). Keys and values are stored by transformers' own layers,
untouched.

Legend: B rows, H slots of a cache layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls a cache among the arguments of a call: the first from 5.24 on, where the
second still works, and the second before."""


def cache_in(inputs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model, a decoder or a layer; None if there is none."""
    return next((inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None), None)


class CacheError(ValueError):
    """A cache or mask, or a change of one, that doesn't work with dropped vision tokens."""


@dataclass(frozen=True, eq=False)
class CacheRecord:
    """The columns that each segment's cache layers hold.

    The slots of the first `base` columns are listed. All later columns are held
    by every layer, so the cache's length gives their number.

    Args:
        base: number of columns that `columns` covers.
        columns: for each drop (B or 1, H): the column in each slot, -1 in a padding slot.
        padded: for each drop: whether any listed slot is padding.
        layer: the layer of the first drop.
        plan: the plan of the drops.
    """

    base: int
    columns: tuple[Tensor, ...]
    padded: tuple[bool, ...]
    layer: int
    plan: Any = None

    def total(self, cache: Any) -> Any:
        """Columns of the uncompressed conversation so far; a 0-d tensor for a static cache."""
        return self.base + cache.layers[self.layer].get_seq_length() - self.columns[0].shape[1]

    def changed(self, change: Callable[[Tensor], Tensor]) -> CacheRecord:
        """The record after `change` to the rows; those that all rows share stay."""
        columns = (one if len(one) == 1 else change(one) for one in self.columns)
        return replace(self, columns=tuple(columns))

    def cropped(self, count: int, total: int) -> CacheRecord:
        """The record without the last `count` of `total` columns.

        Raises:
            CacheError: some of those columns are not held by every layer.
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


class _RecordKeeping:
    """Methods of a cache that change its rows or length and update the record."""

    adsc_record: CacheRecord | None

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        # Without a layer, the length of the whole conversation is meant; layer 0 may hold less.
        record = self.adsc_record
        if layer_idx is None and record is not None and record.layer == 0:
            return record.total(self)
        return super().get_seq_length(layer_idx or 0)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        if self.adsc_record is not None:
            self.adsc_record = self.adsc_record.changed(lambda rows: rows[beam_idx.to(rows.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        if self.adsc_record is not None:
            self.adsc_record = self.adsc_record.changed(lambda rows: rows[indices.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.adsc_record is not None:
            self.adsc_record = self.adsc_record.changed(
                lambda rows: rows.repeat_interleave(repeats, dim=0)
            )

    def crop(self, tokens_to_remove: int) -> None:
        record = self.adsc_record
        if record is not None:
            total = record.total(self)
            if tokens_to_remove > 0:  # transformers 5.17 still takes the length to keep
                tokens_to_remove = min(tokens_to_remove - total, 0)
            record = record.cropped(-tokens_to_remove, total)
        super().crop(tokens_to_remove)  # type: ignore[misc]
        self.adsc_record = record

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.adsc_record = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles use the original class: the extended one has no importable name.
        return _rebuild, (type(self).__mro__[2],), self.__dict__


@lru_cache(maxsize=32)
def _record_keeping(kind: type) -> type:
    if issubclass(kind, _RecordKeeping):
        return kind
    return type(kind.__name__, (_RecordKeeping, kind), {})


def _rebuild(kind: type) -> Any:
    return object.__new__(_record_keeping(kind))


def record_of(cache: Any) -> CacheRecord | None:
    """The record of a cache; None if it has no drops, or if it is empty again."""
    record: CacheRecord | None = getattr(cache, "adsc_record", None)
    if record is None or len(cache.layers) <= record.layer:
        return None
    length = cache.layers[record.layer].get_seq_length()
    # Gradient checkpointing leaves its cache empty. A static cache's length is a
    # tensor; reading it would cost a synchronisation, and it can't be in that position.
    return None if isinstance(length, int) and length == 0 else record


def keep_record(cache: Cache, record: CacheRecord | None) -> None:
    """Put the record on the cache that a call writes to; None removes an old one."""
    if record is not None:
        cache.__class__ = _record_keeping(type(cache))  # type: ignore[arg-type]
        cache.adsc_record = record  # type: ignore[attr-defined]
    elif isinstance(cache, _RecordKeeping):
        cache.adsc_record = None
