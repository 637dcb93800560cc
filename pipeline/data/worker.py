"""What a worker does in data preparation: chunks of files in, rows of shards or reasons out.

It knows nothing of Ray and of other chunks: duplicates, counts and files are the stage's
(stages/prepare.py).
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.data.config import PrepareConfig
from pipeline.data.conversations import BadRecord, picture_sources
from pipeline.data.pictures import FetchedPictures, Pictures
from pipeline.data.rendering import Renderer
from pipeline.data.shards import SCHEMA
from pipeline.data.sources import Chunk, Unreadable, locate, read_chunk
from pipeline.durable.stage import Input

RENDERED = pa.schema(
    [
        pa.field("position", pa.int64()),
        pa.field("source", pa.string()),
        pa.field("file", pa.string()),
        pa.field("line", pa.int64()),
        pa.field("index", pa.int64()),
        pa.field("given_id", pa.string()),  # as JSON
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("key", pa.binary()),
        pa.field("bytes", pa.int64()),
        *SCHEMA,
    ]
)
YIELD_ROWS, YIELD_BYTES = 128, 16 << 20  # what a worker holds before it hands rows on
FETCHERS = 16  # pictures of a bucket that a worker fetches at a time


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a worker needs beside its chunk: the same for all of a split."""

    base: Input
    data: Input
    config: PrepareConfig
    template: str
    roots: Mapping[str, Pictures]
    """Pictures by source."""


def render_chunk(task: Mapping[str, Any], work: Work) -> Iterator[pa.Table]:
    """One chunk of a file to rows, or to the reason why not, in order and a few rows at a time.

    Args:
        task: the fields of a Chunk, and its source, the position of its first record, and which of
            its records are taken (`chosen`, None for all).
    """
    config, place = work.config, dict(task)
    renderer = Renderer.load(work.base.folder, work.template, config.context, config.limits())
    chosen, position, source = (place.pop(key) for key in ("chosen", "position", "source"))
    chunk = Chunk(**place)
    wanted = None if chosen is None else set(chosen)
    rows: list[dict[str, Any]] = []
    size = 0
    found = enumerate(read_chunk(chunk, locate(chunk.file, work.data.folder)))
    taken = (item for item in found if wanted is None or item[0] in wanted)
    for number, (line, record), roots in _with_pictures(taken, work.roots[source], config):
        place = {
            "position": position,
            "source": source,
            "file": chunk.file,
            "line": line,
            "index": chunk.first + number,
        }
        rows.append(place | _render(record, renderer, roots, place))
        position += 1
        size += rows[-1]["bytes"]
        if len(rows) == YIELD_ROWS or size > YIELD_BYTES:
            yield pa.Table.from_pylist(rows, schema=RENDERED)
            rows, size = [], 0
    if rows:
        yield pa.Table.from_pylist(rows, schema=RENDERED)


def _with_pictures(
    items: Iterator[tuple[int, tuple[int, Any]]], roots: Pictures, config: PrepareConfig
) -> Iterator[tuple[int, tuple[int, Any], Pictures]]:
    """Each item with where its pictures are; where reading waits, some are fetched ahead."""
    if not roots.waits:
        yield from ((number, item, roots) for number, item in items)
        return
    with ThreadPoolExecutor(FETCHERS) as pool:
        while window := list(islice(items, FETCHERS)):
            names = [name for _, (_, record) in window for name in _picture_names(record)]
            fetched = FetchedPictures(roots, names, config.limits(), pool)
            yield from ((number, item, fetched) for number, item in window)


def _picture_names(record: Any) -> list[str]:
    try:
        sources = picture_sources(record) if isinstance(record, dict) else []
    except BadRecord:  # found again when it is rendered
        return []
    return [source for source in sources if isinstance(source, str)]


def _render(
    record: Any, renderer: Renderer, roots: Pictures, place: Mapping[str, Any]
) -> dict[str, Any]:
    given = record.get("id") if isinstance(record, dict) else None
    try:
        if isinstance(record, Unreadable):
            raise BadRecord(record.reason, record.detail)
        row = renderer.render(record, roots)
    except BadRecord as bad:
        return {
            "given_id": json.dumps(given, default=str)[:1000],
            "reason": bad.reason,
            "detail": bad.detail.encode("utf-8", "backslashreplace").decode()[:500],
            "bytes": 0,
        }
    row["id"] = row["id"] or f"{Path(place['file']).name}:{place['line']}"
    weight = sum(map(len, row["pictures"])) + 8 * row["length"] + len(row["turns"])
    return row | {"given_id": json.dumps(given, default=str)[:1000], "bytes": weight}
