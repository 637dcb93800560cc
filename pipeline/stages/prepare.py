"""Stage `prepare`: conversation JSON and pictures in, validated and tokenised Parquet shards out.

Records stream through Ray Data: each is validated, its picture decoded once to see that it can be,
its text rendered with the label mask. A record that can't be used is set aside in quarantine.jsonl
with its reason; none is lost, and none is repaired silently. Columns of a shard: id, pictures
(encoded), input_ids and labels (vision positions expanded), kinds, turns (JSON), and the counts
length, supervised and vision_tokens. Batching and padding are the trainer's.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import Field

from pipeline.config import Config
from pipeline.conversations import (
    IGNORED,
    REASONS,
    BadRecord,
    Limits,
    iter_records,
    parse_turns,
    picture_names,
    question_kinds,
    read_picture,
    render_tokens,
)
from pipeline.stage import Input, StageContext
from pipeline.templates import TEMPLATES

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
RENDERED = pa.schema(
    [
        pa.field("position", pa.int64()),
        pa.field("record", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        *SCHEMA,
    ]
)
SCHEMA_VERSION = 2


class PrepareConfig(Config):
    """What is read, how it is rendered, and how much may be bad."""

    splits: dict[str, str] = {"train": "train.json", "test": "test.json"}
    """Name of a split -> its file of records (JSON list or JSON Lines) in the data folder."""
    images: str = "images"
    """The image root in the data folder; no picture path leads out of it."""
    template: str = "vicuna_v1"
    """Conversation template, a name from pipeline/templates.py."""
    context: int = Field(2048, gt=0)
    """Longest rendered conversation in tokens, vision tokens included; longer ones are set
    aside."""
    min_side: int = Field(14, gt=0)
    """Shortest allowed side of a picture, pixels."""
    max_pixels: int = Field(50_000_000, gt=0)
    """Largest allowed area of a picture, pixels."""
    max_quarantined: float = Field(0.01, ge=0, le=1)
    """Share of records that may be set aside before the stage fails."""
    rows_per_shard: int = Field(5000, gt=0)
    """Records in one Parquet file."""
    rows_per_group: int = Field(64, gt=0)
    """Records in one row group of a Parquet file: the least that a reader fetches at once."""


class TooManyBadRecords(ValueError):
    """More records were set aside than the config allows."""


@lru_cache(maxsize=1)
def _load_processor(folder: str) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def _render_one(record: Any, processor: Any, root: Path, config: PrepareConfig) -> dict[str, Any]:
    limits = Limits(context=config.context, min_side=config.min_side, max_pixels=config.max_pixels)
    turns = parse_turns(record)
    pictures = [read_picture(root, name, limits) for name in picture_names(record)]
    sizes = vision_token_counts(processor, pictures)
    ids, labels = render_tokens(turns, TEMPLATES[config.template], processor.tokenizer, sizes)
    if len(ids) > limits.context:
        raise BadRecord("too_long", f"{len(ids)} tokens, {limits.context} allowed")
    return {
        "id": str(record["id"]),
        "pictures": pictures,
        "input_ids": ids,
        "labels": labels,
        "kinds": question_kinds(record, len(turns) // 2),
        "turns": json.dumps(turns),
        "length": len(ids),
        "supervised": sum(label != IGNORED for label in labels),
        "vision_tokens": sum(sizes),
    }


def vision_token_counts(processor: Any, pictures: list[bytes]) -> list[int]:
    """How many vision tokens each encoded picture becomes; reads headers only."""
    sizes = []
    for encoded in pictures:
        with Image.open(io.BytesIO(encoded)) as picture:
            sizes.append((picture.height, picture.width))
    if not sizes:
        return []
    return list(processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"])


def render_batch(batch: pa.Table, base: Input, data: Input, config: PrepareConfig) -> pa.Table:
    """Ray Data's function: records (position, JSON) to rows, or to the reason why not; in order."""
    processor = _load_processor(str(base.folder))
    root = data.folder / config.images
    rows: list[dict[str, Any]] = []
    for position, text in zip(*(column.to_pylist() for column in batch.columns), strict=True):
        row: dict[str, Any] = {"position": position, "record": text}
        try:
            row |= _render_one(json.loads(text), processor, root, config)
        except BadRecord as bad:
            row |= {"reason": bad.reason, "detail": bad.detail}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=RENDERED)


def prepare(ctx: StageContext, config: PrepareConfig) -> dict[str, Any]:
    """Stage body; inputs `data` (records and pictures) and `base` (processor).

    Raises:
        TooManyBadRecords: with the counts per reason; nothing is published then.
    """
    data, base = ctx.inputs["data"], ctx.inputs["base"]
    if config.template not in TEMPLATES:
        raise ValueError(f"template {config.template!r} is unknown; there are {sorted(TEMPLATES)}")
    manifest: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "splits": {}}
    quarantined: Counter[str] = Counter()
    with (ctx.out / "quarantine.jsonl").open("w") as quarantine:
        for split, file in config.splits.items():
            records = list(iter_records(data.folder / file))
            report = partial(ctx.progress, total=len(records), note=f"{split} records")
            counts = _write_split(split, records, data, base, ctx.out, config, quarantine, report)
            if not counts["out"]:
                raise TooManyBadRecords(
                    f"split {split} has no good record left of {len(records)} in {file}: "
                    f"{counts['quarantined'] or 'it is empty'}"
                )
            manifest["splits"][split] = counts
            quarantined.update(counts["quarantined"])
    manifest["files"] = {
        str(path.relative_to(ctx.out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(ctx.out.rglob("*.parquet"))
    }
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (ctx.out / "manifest.json").write_text(json.dumps(manifest, indent=2))
    total = sum(counts["in"] for counts in manifest["splits"].values())
    bad = quarantined.total()
    if bad > config.max_quarantined * total:
        reasons = ", ".join(f"{reason} {count}" for reason, count in quarantined.most_common())
        ctx.track.artifact(ctx.out / "quarantine.jsonl")
        raise TooManyBadRecords(
            f"{bad} of {total} records had to be set aside ({reasons}), more than the allowed "
            f"share of {config.max_quarantined:g}; mend the data, or raise "
            "prepare.max_quarantined. The first: "
            f"{(ctx.out / 'quarantine.jsonl').read_text().splitlines()[0][:300]}"
        )
    ctx.track.dataset(data.uri, "conversations", data.fingerprint[:12])
    ctx.track.metrics({f"quarantined.{reason}": n for reason, n in quarantined.items()})
    ctx.track.metrics({f"{name}.records": c["out"] for name, c in manifest["splits"].items()})
    return {
        "digest": digest,
        "template": config.template,
        "quarantined": dict(quarantined),
        "splits": manifest["splits"],
    }


def _write_split(
    split: str,
    records: list[tuple[int, Any]],
    data: Input,
    base: Input,
    out: Path,
    config: PrepareConfig,
    quarantine: TextIO,
    report: Callable[[int], None],
) -> dict[str, Any]:
    """Stream one split through Ray Data into shards; return its counts."""
    (out / split).mkdir()
    writer = _ShardWriter(out / split, config)
    reasons: Counter[str] = Counter()
    seen: set[str] = set()
    done = 0
    for table in _rendered(records, data, base, config):
        good = []
        for row in table.to_pylist():
            if row["reason"] is None:
                key = _content_key(row)
                if key in seen:
                    row |= {"reason": "duplicate", "detail": "same pictures and same turns"}
                seen.add(key)
            if row["reason"] is None:
                good.append(row)
            else:
                reasons[row["reason"]] += 1
                quarantine.write(json.dumps(_quarantine_line(row, split)) + "\n")
        writer.add(good)
        done += table.num_rows
        report(done)
    writer.close()
    if done != len(records) or done != writer.rows + reasons.total():
        raise RuntimeError(
            f"split {split}: {len(records)} records in, {writer.rows} out, "
            f"{reasons.total()} set aside"
        )
    return {
        "in": len(records),
        "out": writer.rows,
        "quarantined": dict(reasons),
        "tokens": writer.tokens,
        "supervised_tokens": writer.supervised,
        "longest": writer.longest,
    }


def _rendered(
    records: list[tuple[int, Any]], data: Input, base: Input, config: PrepareConfig
) -> Iterator[pa.Table]:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True  # the same shards whatever the cluster
    table = pa.table(
        {
            "position": pa.array([position for position, _ in records], pa.int64()),
            "record": [json.dumps(record) for _, record in records],
        }
    )
    blocks = max(1, len(records) // 512)
    render = partial(render_batch, base=base, data=data, config=config)
    rendered = ray.data.from_arrow(table, override_num_blocks=blocks).map_batches(
        render, batch_format="pyarrow", batch_size=256
    )
    yield from rendered.iter_batches(batch_format="pyarrow", batch_size=512)


def _content_key(row: dict[str, Any]) -> str:
    content = hashlib.sha256(row["turns"].encode())
    for picture in row["pictures"]:
        content.update(hashlib.sha256(picture).digest())
    return content.hexdigest()


def _quarantine_line(row: dict[str, Any], split: str) -> dict[str, Any]:
    record = json.loads(row["record"])
    name = record.get("id") if isinstance(record, dict) else None
    line = {"id": name, "split": split, "line": row["position"], "reason": row["reason"]}
    return line | {"detail": row["detail"], "meaning": REASONS[row["reason"]]}


class _ShardWriter:
    """Parquet files of bounded size in one folder, with the statistics of what went in."""

    def __init__(self, folder: Path, config: PrepareConfig) -> None:
        self.folder, self.config = folder, config
        self.pending: list[dict[str, Any]] = []
        self.rows = self.shards = self.tokens = self.supervised = self.longest = 0

    def add(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.pending.append({name: row[name] for name in SCHEMA.names})
            self.rows += 1
            self.tokens += row["length"]
            self.supervised += row["supervised"]
            self.longest = max(self.longest, row["length"])
            if len(self.pending) == self.config.rows_per_shard:
                self.close()

    def close(self) -> None:
        if self.pending:
            table = pa.Table.from_pylist(self.pending, schema=SCHEMA)
            pq.write_table(
                table,
                self.folder / f"{self.shards:05d}.parquet",
                compression="zstd",
                row_group_size=self.config.rows_per_group,
            )
            self.shards += 1
            self.pending = []
