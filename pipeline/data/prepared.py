"""Prepared shards, read by row group: a small index in memory, pictures from the disk on demand.

No worker holds a whole set, which may have more than 50 GB. What batching needs (lengths) is three
small columns, read at once; whole rows come from a cache of row groups of bounded size. The order
of an epoch is made for that cache: row groups are permuted, cut into windows that fit, and rows are
shuffled within a window, so each row group is read once an epoch. Writing shards is
pipeline/stages/prepare.py's.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

WINDOW_ROWS = 8192
"""Most rows that are shuffled together."""
WINDOW_BYTES = 512 * 2**20
"""Most bytes of a window, uncompressed; a larger row group is a window of its own."""
CACHE_WINDOWS = 2
"""Windows that a reader holds: a run of steps touches two where it crosses a border."""
INDEX = ("length", "supervised", "vision_tokens")
FLAT = "all"
"""Name of the only split of a folder that holds its shards itself, as `adsc prepare` writes it."""


def split_folder(folder: Path, split: str) -> Path:
    """The folder of a split's shards in a folder of prepared data."""
    own = folder / split
    return folder if split == FLAT and not own.is_dir() else own


class RowGroup(NamedTuple):
    """Where some consecutive rows stand."""

    file: Path
    number: int
    rows: int
    bytes: int


class PreparedData:
    """The rows of one prepared split.

    Args:
        folder: of the Parquet shards.
        cache_bytes: most bytes of cached row groups; at least one is cached.

    Attributes:
        length: (rows,) tokens of each row, vision tokens included.
        supervised: (rows,) tokens with a label.
        vision_tokens: (rows,) vision tokens.
        groups: the row groups, in the rows' order.
        bytes_read: uncompressed bytes of row groups read so far, the index left out.

    Raises:
        ValueError: no shards, or shards of an older version.
    """

    def __init__(self, folder: Path, cache_bytes: int = CACHE_WINDOWS * WINDOW_BYTES) -> None:
        files = sorted(folder.glob("*.parquet"))
        if not files:
            raise ValueError(f"no Parquet shard in {folder}; does the split have any good record?")
        self.groups: list[RowGroup] = []
        columns: dict[str, list[np.ndarray]] = {name: [] for name in INDEX}
        for file in files:
            with pq.ParquetFile(file) as opened:
                missing = [name for name in INDEX if name not in opened.schema_arrow.names]
                if missing:
                    raise ValueError(
                        f"{file} lacks the columns {missing}: it was prepared by an older version; "
                        "prepare the data again"
                    )
                for number in range(opened.num_row_groups):
                    about = opened.metadata.row_group(number)
                    self.groups.append(
                        RowGroup(file, number, about.num_rows, about.total_byte_size)
                    )
                index = opened.read(columns=list(INDEX))
            for name in INDEX:
                columns[name].append(index[name].to_numpy())
        self.length, self.supervised, self.vision_tokens = (
            np.concatenate(columns[name]) for name in INDEX
        )
        self._ends = np.cumsum([group.rows for group in self.groups])
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._cache_bytes, self._cached = cache_bytes, 0
        self.bytes_read = 0

    def __len__(self) -> int:
        return len(self.length)

    def rows(
        self, indices: Sequence[int] | np.ndarray, columns: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """Rows by their numbers, in that order; `columns` leaves out what isn't needed."""
        indices = np.asarray(indices, dtype=np.int64)
        numbers = np.searchsorted(self._ends, indices, side="right")
        found: list[dict[str, Any]] = [{}] * len(indices)
        for number in np.unique(numbers):
            (places,) = np.nonzero(numbers == number)
            start = self._ends[number] - self.groups[number].rows
            table = self._group(int(number))
            table = table if columns is None else table.select(list(columns))
            taken = [table.slice(i, 1) for i in (indices[places] - start).tolist()]
            for place, one in zip(places, taken, strict=True):
                found[place] = one.to_pylist()[0]
        return found

    def scan(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """All rows in their order, one row group at a time, past the cache."""
        for group in self.groups:
            with pq.ParquetFile(group.file) as opened:
                names = None if columns is None else list(columns)
                table = opened.read_row_group(group.number, columns=names)
            yield from table.to_pylist()

    def _group(self, number: int) -> pa.Table:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        group = self.groups[number]
        while self._cache and self._cached + group.bytes > self._cache_bytes:
            dropped, _ = self._cache.popitem(last=False)
            self._cached -= self.groups[dropped].bytes
        with pq.ParquetFile(group.file) as opened:
            table = opened.read_row_group(group.number)
        self.bytes_read += group.bytes
        self._cache[number] = table
        self._cached += group.bytes
        return table


class Shuffle:
    """The endless order of rows: epoch after epoch, each a windowed shuffle by (seed, epoch).

    A set that fits one window is permuted in full. Every row comes once an epoch.

    Args:
        groups: the row groups of the data.
        seed: decides the order, and which rows are drawn from.
        rows: how many rows are drawn from; None is all. They are those of whole row groups, and
            some of one more: what is not drawn from isn't read.
        window_rows: most rows of a window.
        window_bytes: most bytes of a window.
    """

    def __init__(
        self,
        groups: Sequence[RowGroup],
        seed: int,
        rows: int | None = None,
        window_rows: int = WINDOW_ROWS,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        self._seed, self._window_rows, self._window_bytes = seed, window_rows, window_bytes
        starts = np.cumsum([0, *(group.rows for group in groups)])
        self.total = int(starts[-1]) if rows is None else rows
        self._members = {
            number: np.arange(starts[number], starts[number] + group.rows)
            for number, group in enumerate(groups)
        }
        self._bytes = [group.bytes for group in groups]
        # Each use of the seed has a number of its own in front: trailing zeros tell none apart.
        if self.total < starts[-1]:
            self._choose(np.random.default_rng([1, seed]))
        self._windows = lru_cache(maxsize=2)(self._make_windows)
        self._order = lru_cache(maxsize=4)(self._make_order)

    def _choose(self, draw: np.random.Generator) -> None:
        chosen, left = {}, self.total
        for number in draw.permutation(len(self._members)).tolist():
            members = self._members[number]
            if left < len(members):
                members = np.sort(draw.permutation(members)[:left])
            chosen[number] = members
            left -= len(members)
            if not left:
                break
        self._members = dict(sorted(chosen.items()))

    @property
    def window_rows(self) -> int:
        """Rows of a window on average, rounded up."""
        return -(-self.total // len(self.windows(0)))

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The rows that stand at these places of the endless order."""
        found = np.empty(len(positions), dtype=np.int64)
        for i, position in enumerate(positions.tolist()):
            epoch, place = divmod(position, self.total)
            ends = self._windows(epoch)[0]
            window = int(np.searchsorted(ends, place, side="right"))
            before = int(ends[window - 1]) if window else 0
            found[i] = self._order(epoch, window)[place - before]
        return found

    def windows(self, epoch: int) -> list[list[int]]:
        """The numbers of the row groups of each window."""
        return self._windows(epoch)[1]

    def _make_windows(self, epoch: int) -> tuple[np.ndarray, list[list[int]]]:
        windows: list[list[int]] = []
        rows = size = 0
        numbers = np.array(list(self._members))
        for number in np.random.default_rng([2, self._seed, epoch]).permutation(numbers).tolist():
            rows, size = rows + len(self._members[number]), size + self._bytes[number]
            if not windows or rows > self._window_rows or size > self._window_bytes:
                windows.append([])
                rows, size = len(self._members[number]), self._bytes[number]
            windows[-1].append(number)
        counts = [sum(len(self._members[number]) for number in one) for one in windows]
        return np.cumsum(counts), windows

    def _make_order(self, epoch: int, window: int) -> np.ndarray:
        rows = [self._members[number] for number in self._windows(epoch)[1][window]]
        return np.random.default_rng([3, self._seed, epoch, window]).permutation(
            np.concatenate(rows)
        )
