"""Prepared rows as Parquet: the schema, and a writer that keeps files and row groups small.

A shard is bounded in rows and in bytes and written once. Rows stay Arrow from the worker to the
file. Reading belongs to batches.py.
"""

import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA_VERSION = 2
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "pictures": pa.list_(pa.binary()),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "kinds": pa.list_(pa.string()),
        "turns": pa.string(),
        "length": pa.int32(),
        "supervised": pa.int32(),
        "vision_tokens": pa.int32(),
    }
)
"""id; encoded pictures; token ids and labels with vision positions expanded; kinds of question;
turns as JSON; tokens, supervised tokens and vision tokens of the row."""
QUANTILES = (0, 25, 50, 75, 90, 99, 100)


class ShardWriter:
    """Parquet files of bounded size in one folder, with the statistics of what went in."""

    def __init__(
        self, folder: Path, rows_per_shard: int, bytes_per_shard: int, rows_per_group: int
    ) -> None:
        self.folder = folder
        self.rows_per_shard, self.bytes_per_shard = rows_per_shard, bytes_per_shard
        self.rows_per_group = rows_per_group
        self.files: dict[str, dict[str, Any]] = {}
        """Name -> sha256, rows and bytes of every finished file."""
        self.rows = self.supervised = self.vision = 0
        self._lengths = np.zeros(1, dtype=np.int64)  # rows of each length
        self._pending: list[pa.Table] = []  # less than a row group
        self._pending_rows = self._pending_bytes = 0
        self._open: pq.ParquetWriter | None = None
        self._shard_rows = self._shard_bytes = 0

    def add(self, table: pa.Table, sizes: np.ndarray) -> None:
        """Append rows of `SCHEMA`; `sizes` are their bytes, shape (rows,)."""
        if not table.num_rows:
            return
        lengths = np.bincount(table["length"].to_numpy(), minlength=len(self._lengths))
        lengths[: len(self._lengths)] += self._lengths
        self._lengths = lengths
        self.rows += table.num_rows
        self.supervised += int(table["supervised"].to_numpy().sum())
        self.vision += int(table["vision_tokens"].to_numpy().sum())
        start = 0
        for row, size in enumerate(map(int, sizes)):
            buffered = self._shard_rows + self._pending_rows
            full = buffered + 1 > self.rows_per_shard
            heavy = (
                buffered and self._shard_bytes + self._pending_bytes + size > self.bytes_per_shard
            )
            if full or heavy or self._pending_rows == self.rows_per_group:
                self._take(table, start, row)
                self._write_group()
                start = row
            if full or heavy:
                self._finish_shard()
            self._pending_rows += 1
            self._pending_bytes += size
        self._take(table, start, table.num_rows)

    def close(self) -> None:
        """Write what is left."""
        self._write_group()
        self._finish_shard()

    def abandon(self) -> None:
        """Close the open file without finishing it, so that its folder can be removed."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def statistics(self) -> dict[str, Any]:
        """Counts of rows and tokens, and how rows' lengths are spread."""
        lengths = self._lengths
        total = np.cumsum(lengths)
        ranks = [max(1, int(np.ceil(q / 100 * self.rows))) for q in QUANTILES] if self.rows else []
        edges = [2**power for power in range(4, 1 + max(4, (len(lengths) - 1).bit_length()))]
        bounds = [0, *edges]
        return {
            "out": self.rows,
            "tokens": int((lengths * np.arange(len(lengths))).sum()),
            "supervised_tokens": self.supervised,
            "vision_tokens": self.vision,
            "longest": int(np.flatnonzero(lengths).max()) if self.rows else 0,
            "length_quantiles": {
                str(q): int(np.searchsorted(total, rank))
                for q, rank in zip(QUANTILES, ranks, strict=False)
            },
            # Rows of at most so many tokens, and more than the bound before.
            "length_histogram": {
                str(high): int(lengths[low + 1 : high + 1].sum())
                for low, high in itertools.pairwise(bounds)
            },
        }

    def _take(self, table: pa.Table, start: int, end: int) -> None:
        if end > start:
            self._pending.append(table.slice(start, end - start))

    def _write_group(self) -> None:
        if not self._pending_rows:
            return
        if self._open is None:
            self._open = pq.ParquetWriter(
                self._path(),
                SCHEMA,
                compression=dict.fromkeys(_leaves(), "zstd") | {"pictures.list.element": "NONE"},
                use_dictionary=["input_ids.list.element", "labels.list.element"],
                write_statistics=["length"],
            )
        group = pa.concat_tables(self._pending).combine_chunks()
        self._open.write_table(group, row_group_size=self.rows_per_group)
        self._shard_rows += self._pending_rows
        self._shard_bytes += self._pending_bytes
        self._pending, self._pending_rows, self._pending_bytes = [], 0, 0

    def _finish_shard(self) -> None:
        if self._open is None:
            return
        path = self._path()
        self._open.close()
        self._open = None
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.files[path.name] = {
            "sha256": digest,
            "rows": self._shard_rows,
            "bytes": path.stat().st_size,
        }
        self._shard_rows = self._shard_bytes = 0

    def _path(self) -> Path:
        return self.folder / f"{len(self.files):05d}.parquet"


def _leaves() -> list[str]:
    """Parquet's names of the columns."""
    return [
        f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        for field in SCHEMA
    ]
