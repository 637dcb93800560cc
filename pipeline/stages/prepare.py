"""Stage `prepare`: records and pictures in, validated and tokenised Parquet shards out.

Records stream through Ray Data: each is read, validated, its pictures decoded once to see that
they can be, its text rendered with the label mask. A record that can't be used is set aside in
quarantine.jsonl with its reason; none is lost, and none is repaired silently. Memory does not grow
with the set, but for 16 bytes (about 100 in Python) a record by which duplicates are known. What a
row holds stands in shards.py; batching and padding are the trainer's.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config import Config
from pipeline.conversations import REASONS, BadRecord
from pipeline.mixture import Source, choose, sizes
from pipeline.pictures import PictureLimits, Pictures, open_pictures
from pipeline.rendering import Renderer
from pipeline.shards import SCHEMA, SCHEMA_VERSION, ShardWriter
from pipeline.sources import Chunk, SourceError, Unreadable, find_files, index_file, read_chunk
from pipeline.stage import Input, StageContext

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
TASK = pa.schema(
    [
        *((name, pa.string()) for name in ("source", "file", "kind")),
        *((name, pa.int64()) for name in ("start", "end", "first", "line", "count", "position")),
        ("chosen", pa.list_(pa.int32())),
    ]
)
YIELD_ROWS, YIELD_BYTES = 128, 16 << 20  # what a worker holds before it hands rows on
STORE_BYTES = 256 << 20  # of Ray's object store beside what its cores have in hand
TASK_CPUS = 0.9  # stages' own processes hold a tenth of a core each: no core may stay idle


class PrepareConfig(Config):
    """What is read, how it is rendered, and how much may be bad."""

    splits: dict[str, str | dict[str, Source]] = {"train": "train.json", "test": "test.json"}
    """Name of a split -> its records: a file, glob or folder (JSON list, JSON Lines, Parquet,
    `datasets`) in the data folder, or named sources to mix. A record of an earlier split is a leak
    in a later one."""
    images: str = "images"
    """Root of the pictures: a folder, a tar file or a glob of them, or s3://bucket/prefix; relative
    to the data folder. No picture path leads out of it."""
    template: str = "vicuna_v1"
    """Conversation template: a name from pipeline/templates.py, `tokenizer` for the checkpoint's
    own, or `auto` for the checkpoint's own where it marks the end of answers, else vicuna_v1."""
    context: int = Field(2048, gt=0)
    """Longest rendered conversation in tokens, vision tokens included; longer ones are set
    aside."""
    min_side: int = Field(14, gt=0)
    """Shortest allowed side of a picture, pixels."""
    max_pixels: int = Field(50_000_000, gt=0)
    """Largest allowed area of a picture, pixels."""
    max_picture_bytes: int = Field(64 << 20, gt=0)
    """Largest allowed encoded picture, bytes."""
    max_quarantined: float = Field(0.01, ge=0, le=1)
    """Share of records that may be set aside before the stage fails."""
    rows_per_shard: int = Field(5000, gt=0)
    """Most records in one Parquet file."""
    bytes_per_shard: int = Field(256 << 20, gt=0)
    """Most bytes of rows in one Parquet file; a single larger row still gets one."""
    rows_per_group: int = Field(64, gt=0)
    """Records in one row group of a Parquet file: the least that a reader fetches at once."""
    seed: int = Field(0, ge=0)
    """Seed of which records a mixture takes."""

    def limits(self) -> PictureLimits:
        return PictureLimits(
            min_side=self.min_side, max_pixels=self.max_pixels, max_bytes=self.max_picture_bytes
        )

    def sources(self, split: str) -> dict[str, Source]:
        """The named sources of a split; a plain one is named like the split."""
        found = self.splits[split]
        return {split: Source(data=found)} if isinstance(found, str) else found


class TooManyBadRecords(ValueError):
    """More records were set aside than the config allows. `counts` holds in, out, quarantined."""

    def __init__(self, message: str, counts: Mapping[str, Any]) -> None:
        super().__init__(message, dict(counts))
        self.message, self.counts = message, dict(counts)

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a worker needs beside its chunk: the same for all of a split."""

    base: Input
    data: Input
    config: PrepareConfig
    template: str
    roots: Mapping[str, Pictures]
    """Pictures by source."""


def render_chunks(tasks: pa.Table, work: Work) -> Iterator[pa.Table]:
    """Ray Data's function: chunks of files to rows, or to the reason why not; in order."""
    config = work.config
    renderer = Renderer.load(work.base.folder, work.template, config.context, config.limits())
    for task in tasks.to_pylist():
        chosen, position = task.pop("chosen"), task.pop("position")
        source = task.pop("source")
        chunk = Chunk(**task)
        wanted = None if chosen is None else set(chosen)
        rows: list[dict[str, Any]] = []
        held = 0
        for number, (line, record) in enumerate(read_chunk(chunk, work.data.folder / chunk.file)):
            if wanted is not None and number not in wanted:
                continue
            place = {
                "position": position,
                "source": source,
                "file": chunk.file,
                "line": line,
                "index": chunk.first + number,
            }
            rows.append(place | _render(record, renderer, work.roots[source], place))
            position += 1
            held += rows[-1]["bytes"]
            if len(rows) == YIELD_ROWS or held > YIELD_BYTES:
                yield pa.Table.from_pylist(rows, schema=RENDERED)
                rows, held = [], 0
        if rows:
            yield pa.Table.from_pylist(rows, schema=RENDERED)


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


def prepare(ctx: StageContext, config: PrepareConfig) -> dict[str, Any]:
    """Stage body; inputs `data` (records and pictures) and `base` (processor).

    Raises:
        TooManyBadRecords: with the counts per reason; nothing is published then.
        ValueError: a source, the processor or the template can't be used.
    """
    data = ctx.inputs["data"]
    try:
        manifest = prepare_data(data, ctx.inputs["base"], config, ctx.out, ctx.progress)
    except TooManyBadRecords:
        ctx.track.artifact(ctx.out / "quarantine.jsonl")
        raise
    ctx.track.artifact(ctx.out / "manifest.json")
    ctx.track.dataset(data.uri, "conversations", data.fingerprint[:12])
    quarantined = manifest["quarantined"]
    ctx.track.metrics({f"quarantined.{reason}": n for reason, n in quarantined.items()})
    ctx.track.metrics({f"{name}.records": c["out"] for name, c in manifest["splits"].items()})
    return {
        "digest": hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest(),
        "template": manifest["template"],
        "quarantined": quarantined,
        "splits": manifest["splits"],
    }


def prepare_data(
    data: Input,
    base: Input,
    config: PrepareConfig,
    out: Path,
    progress: Callable[[float, float, str], None],
    flat: bool = False,
) -> dict[str, Any]:
    """Shards, manifest.json and quarantine.jsonl below `out`; returns the manifest.

    Args:
        flat: put the shards of the (only) split into `out` itself.

    Raises: as `prepare`.
    """
    renderer = Renderer.load(base.folder, config.template, config.context, config.limits())
    renderer.check()
    seen: dict[str, set[bytes]] = {}
    splits: dict[str, Any] = {}
    files: dict[str, Any] = {}
    with (out / "quarantine.jsonl").open("w", encoding="utf-8") as quarantine:
        for split in config.splits:
            work, tasks = _plan(split, data, base, config, renderer.template.name)
            folder = out if flat else out / split
            folder.mkdir(exist_ok=True)
            writer = ShardWriter(
                folder, config.rows_per_shard, config.bytes_per_shard, config.rows_per_group
            )
            seen[split] = set()
            report = _noted(progress, f"{split} records")
            try:
                splits[split] = _write_split(tasks, work, writer, seen, quarantine, report)
            finally:
                writer.abandon()
            prefix = "" if flat else f"{split}/"
            files |= {f"{prefix}{name}": found for name, found in writer.files.items()}
    quarantined: Counter[str] = Counter()
    for counts in splits.values():
        quarantined.update(counts["quarantined"])
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "template": renderer.template.name,
        "context": config.context,
        "in": sum(counts["in"] for counts in splits.values()),
        "out": sum(counts["out"] for counts in splits.values()),
        "quarantined": dict(sorted(quarantined.items())),
        "splits": splits,
        "files": files,
    }
    _judge(manifest, config, out / "quarantine.jsonl")
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2))
    return manifest


def _noted(
    progress: Callable[[float, float, str], None], note: str
) -> Callable[[float, float], None]:
    return lambda done, total: progress(done, total, note)


def _judge(manifest: dict[str, Any], config: PrepareConfig, quarantine: Path) -> None:
    total, bad = manifest["in"], sum(manifest["quarantined"].values())
    if manifest["out"] != total - bad:
        raise RuntimeError(f"{total} records in, {manifest['out']} out, {bad} set aside")
    empty = [split for split, counts in manifest["splits"].items() if not counts["out"]]
    if bad <= config.max_quarantined * total and not empty:
        return
    counts = Counter(manifest["quarantined"])
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
    with quarantine.open(encoding="utf-8") as lines:
        first = lines.readline().strip()[:300]
    problem = (
        f"no good record is left in the split {empty[0]}: {bad} of {total} records had to be set "
        f"aside ({reasons}); mend the data"
        if empty
        else f"{bad} of {total} records had to be set aside ({reasons}), more than the allowed "
        f"share of {config.max_quarantined:g}; mend the data, or raise max_quarantined"
    )
    shown = {key: manifest[key] for key in ("in", "out", "quarantined")}
    raise TooManyBadRecords(f"{problem}. The first: {first}", shown)


def _plan(
    split: str, data: Input, base: Input, config: PrepareConfig, template: str
) -> tuple[Work, list[dict[str, Any]]]:
    """The chunks of a split's files with the records that are taken, and where pictures are."""
    sources = config.sources(split)
    chunks: dict[str, list[Chunk]] = {}
    for name, source in sources.items():
        files = find_files(data.folder / source.data, split)
        chunks[name] = [chunk for file in files for chunk in index_file(file)]
        if not chunks[name]:
            raise SourceError(f"{', '.join(file.name for file in files)} is empty: no record in it")
    available = {name: sum(chunk.count for chunk in found) for name, found in chunks.items()}
    taken = sizes(sources, available)
    tasks: list[dict[str, Any]] = []
    position = 0
    for name, found in chunks.items():
        chosen = choose(name, available[name], taken[name], config.seed)
        start = 0
        for chunk in found:
            task = vars(chunk) | {"source": name, "position": position, "chosen": None}
            file = Path(chunk.file)
            if file.is_relative_to(data.folder):  # another machine may keep its copy elsewhere
                task["file"] = str(file.relative_to(data.folder))
            count = chunk.count
            if chosen is not None:
                low, high = np.searchsorted(chosen, [start, start + chunk.count])
                task["chosen"], count = (chosen[low:high] - start).tolist(), int(high - low)
            start += chunk.count
            position += count
            if count:
                tasks.append(task)
    roots = {
        name: open_pictures(source.images or config.images, data.folder)
        for name, source in sources.items()
    }
    work = Work(base=base, data=data, config=config, template=template, roots=roots)
    return work, tasks


def _write_split(
    tasks: list[dict[str, Any]],
    work: Work,
    writer: ShardWriter,
    seen: dict[str, set[bytes]],
    quarantine: TextIO,
    report: Callable[[float, float], None],
) -> dict[str, Any]:
    """Stream one split through Ray Data into shards; return its counts."""
    split, own = list(seen.items())[-1]
    earlier = [keys for name, keys in seen.items() if name != split]
    last = tasks[-1]
    total = last["position"] + (last["count"] if last["chosen"] is None else len(last["chosen"]))
    reasons: Counter[str] = Counter()
    per_source: dict[str, Counter[str]] = {name: Counter() for name in work.roots}
    done = 0
    for table in _rendered(tasks, work):
        # Whatever was retried or reordered: each record exactly once, in its place.
        if not np.array_equal(table["position"].to_numpy(), np.arange(done, done + table.num_rows)):
            raise RuntimeError(f"split {split}: records after number {done} came twice or not")
        done += table.num_rows
        found = table["reason"].to_pylist()
        for row, key in enumerate(table["key"].to_pylist()):
            if found[row] is None and any(key in keys for keys in earlier):
                found[row] = "leak"
            elif found[row] is None and key in own:
                found[row] = "duplicate"
            elif found[row] is None:
                own.add(key)
        for name, reason in zip(table["source"].to_pylist(), found, strict=True):
            per_source[name].update(("in", reason or "out"))
        bad = np.array([reason is not None for reason in found])
        for row in map(int, np.flatnonzero(bad)):
            reasons[found[row]] += 1
            quarantine.write(_quarantine_line(table, row, found[row], split) + "\n")
        good = table.filter(pa.array(~bad))
        writer.add(good.select(SCHEMA.names), good["bytes"].to_numpy())
        report(done, total)
    writer.close()
    if done != total or done != writer.rows + reasons.total():
        raise RuntimeError(
            f"split {split}: {total} records in, {writer.rows} out, {reasons.total()} set aside"
        )
    return {
        "in": total,
        **writer.statistics(),
        "quarantined": dict(sorted(reasons.items())),
        "sources": {name: dict(sorted(counts.items())) for name, counts in per_source.items()},
    }


def _rendered(tasks: list[dict[str, Any]], work: Work) -> Iterator[pa.Table]:
    import ray.data

    context = ray.data.DataContext.get_current().copy()  # whoever shares the process keeps theirs
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True  # the same shards whatever the cluster
    context.target_max_block_size = 2 * YIELD_BYTES
    # Workers wait for the writer rather than fill the object store.
    cores = ray.cluster_resources().get("CPU", 1)
    context.execution_options.resource_limits = ray.data.ExecutionResources(
        object_store_memory=STORE_BYTES + cores * 8 * YIELD_BYTES
    )
    table = pa.Table.from_pylist(tasks, schema=TASK)
    with ray.data.DataContext.current(context):
        rendered = ray.data.from_arrow(table, override_num_blocks=len(tasks)).map_batches(
            partial(render_chunks, work=work),
            batch_format="pyarrow",
            batch_size=None,
            num_cpus=TASK_CPUS,
        )
        blocks = rendered.iter_batches(batch_format="pyarrow", batch_size=None, prefetch_batches=1)
    try:
        yield from blocks
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):  # a store or a file that failed, in a worker
            raise error.cause from error
        raise


def _quarantine_line(table: pa.Table, row: int, reason: str, split: str) -> str:
    names = ("given_id", "source", "file", "line", "index", "detail")
    cells = {name: table[name][row].as_py() for name in names}
    details = {
        "duplicate": "same pictures and same turns as a record before",
        "leak": "same pictures and same turns as a record of an earlier split",
    }
    given = cells.pop("given_id")
    line = {"id": given if len(given) > 990 else json.loads(given), "split": split, **cells}
    line |= {"reason": reason, "detail": details.get(reason) or cells["detail"]}
    return json.dumps(line | {"meaning": REASONS[reason]})
