"""Stage `prepare`: records and pictures in, validated and tokenised Parquet shards out.

Records stream through Ray tasks: each is read, validated, its pictures decoded once to see that
they can be, its text rendered with the label mask. A record that can't be used is quarantined in
quarantine.jsonl with its reason; none is lost, and none is repaired silently. Memory does not grow
with the set, but for 16 bytes (about 100 in Python) a record by which duplicates are known. What a
row holds is in shards.py; batching and padding are the trainer's.
"""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa

from pipeline.data.config import PrepareConfig
from pipeline.data.conversations import REASONS
from pipeline.data.mixture import choose, sizes
from pipeline.data.pictures import open_pictures
from pipeline.data.rendering import Renderer
from pipeline.data.shards import SCHEMA, SCHEMA_VERSION, ShardWriter
from pipeline.data.sources import Chunk, SourceError, find_files, index_file, locate
from pipeline.data.worker import Work, render_chunk
from pipeline.durable.stage import Input, StageContext

CHUNKS_AHEAD = 2  # for each core of the cluster: one that is rendered, one that waits
TABLES_AHEAD = 4  # of a chunk, that wait for the writer in Ray's object store
Render = Callable[[list[dict[str, Any]], Work], Iterable[pa.Table]]
TASK_CPUS = 0.9  # stages' own processes hold a tenth of a core each: no core may stay idle


class TooManyBadRecords(ValueError):
    """More records were quarantined than the config allows. `counts` holds in, out, quarantined."""

    def __init__(self, message: str, counts: Mapping[str, Any]) -> None:
        super().__init__(message, dict(counts))
        self.message, self.counts = message, dict(counts)

    def __str__(self) -> str:
        return self.message


def prepare(ctx: StageContext, config: PrepareConfig) -> dict[str, Any]:
    """Stage body; inputs `data` (records and pictures) and `base` (processor).

    Raises:
        TooManyBadRecords: with the counts per reason; nothing is published then.
        ValueError: a source, the processor or the template can't be used.
    """
    data = ctx.inputs["data"]
    try:
        manifest = prepare_data(data, ctx.inputs["base"], config, ctx.out, ctx.progress)
    except TooManyBadRecords as error:
        ctx.track.metrics({f"quarantined.{r}": n for r, n in error.counts["quarantined"].items()})
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
    render: Render | None = None,
) -> dict[str, Any]:
    """Shards, manifest.json and quarantine.jsonl below `out`; returns the manifest.

    Args:
        flat: put the shards of the (only) split into `out` itself.
        render: turns chunks into rows, in order; by default on Ray's workers.

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
                tables = (render or _rendered)(tasks, work)
                splits[split] = _write_split(tasks, work, tables, writer, seen, quarantine, report)
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
        raise RuntimeError(f"{total} records in, {manifest['out']} out, {bad} quarantined")
    empty = [split for split, counts in manifest["splits"].items() if not counts["out"]]
    if bad <= config.max_quarantined * total and not empty:
        return
    counts = Counter(manifest["quarantined"])
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
    with quarantine.open(encoding="utf-8") as lines:
        first = lines.readline().strip()[:300]
    problem = (
        f"no valid record is left in the split {empty[0]}: {bad} of {total} records are "
        f"quarantined ({reasons}); fix the data"
        if empty
        else f"{bad} of {total} records are quarantined ({reasons}), more than the allowed "
        f"share of {config.max_quarantined:g}; {config.bounded}"
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
        files = find_files(source.data, data.folder, split)
        chunks[name] = [
            replace(chunk, file=file)
            for file in files
            for chunk in index_file(locate(file, data.folder))
        ]
        if not any(chunk.count for chunk in chunks[name]):
            raise SourceError(f"{', '.join(files) or source.data} is empty: no record in it")
    available = {name: sum(chunk.count for chunk in listed) for name, listed in chunks.items()}
    taken = sizes(sources, available)
    tasks: list[dict[str, Any]] = []
    position = 0
    for name, listed in chunks.items():
        chosen = choose(name, available[name], taken[name], config.seed)
        start = 0
        for chunk in listed:
            task = vars(chunk) | {"source": name, "position": position, "chosen": None}
            if Path(chunk.file).is_relative_to(data.folder):  # elsewhere on another machine
                task["file"] = str(Path(chunk.file).relative_to(data.folder))
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
    tables: Iterable[pa.Table],
    writer: ShardWriter,
    seen: dict[str, set[bytes]],
    quarantine: TextIO,
    report: Callable[[float, float], None],
) -> dict[str, Any]:
    """Stream the rows of one split into shards; return its counts."""
    split, own = list(seen.items())[-1]
    earlier = [keys for name, keys in seen.items() if name != split]
    last = tasks[-1]
    total = last["position"] + (last["count"] if last["chosen"] is None else len(last["chosen"]))
    reasons: Counter[str] = Counter()
    per_source: dict[str, Counter[str]] = {name: Counter() for name in work.roots}
    done = 0
    for table in tables:
        # Whatever was retried or reordered: each record exactly once, in its place.
        if not np.array_equal(table["position"].to_numpy(), np.arange(done, done + table.num_rows)):
            raise RuntimeError(
                f"split {split}: records after number {done} are missing or duplicated"
            )
        done += table.num_rows
        reasons_found = table["reason"].to_pylist()
        for row, key in enumerate(table["key"].to_pylist()):
            if reasons_found[row] is not None or not work.config.unique:
                continue
            if any(key in keys for keys in earlier):
                reasons_found[row] = "leak"
            elif key in own:
                reasons_found[row] = "duplicate"
            else:
                own.add(key)
        for name, reason in zip(table["source"].to_pylist(), reasons_found, strict=True):
            per_source[name].update(("in", reason or "out"))
        bad = np.array([reason is not None for reason in reasons_found])
        for row in map(int, np.flatnonzero(bad)):
            reasons[reasons_found[row]] += 1
            quarantine.write(_quarantine_line(table, row, reasons_found[row], split) + "\n")
        good = table.filter(pa.array(~bad))
        writer.add(good.select(SCHEMA.names), good["bytes"].to_numpy())
        report(done, total)
    writer.close()
    if done != total or done != writer.rows + reasons.total():
        raise RuntimeError(
            f"split {split}: {total} records in, {writer.rows} out, {reasons.total()} quarantined"
        )
    return {
        "in": total,
        **writer.statistics(),
        "quarantined": dict(sorted(reasons.items())),
        "sources": {name: dict(sorted(counts.items())) for name, counts in per_source.items()},
    }


def _rendered(tasks: list[dict[str, Any]], work: Work) -> Iterator[pa.Table]:
    """The rows of every chunk, in order. Chunks are Ray tasks: a lost one runs again, and as many
    run ahead of the writer as keep all cores busy, each with a bounded number of tables in Ray's
    store."""
    import ray

    options: Any = {
        "num_cpus": TASK_CPUS,
        "num_returns": "streaming",
        "_generator_backpressure_num_objects": TABLES_AHEAD,
    }
    remote: Any = ray.remote(**options)(render_chunk)
    shared, left, ahead = ray.put(work), iter(tasks), deque[Any]()
    try:
        while True:
            cores = int(ray.cluster_resources().get("CPU", 1))
            room = max(0, CHUNKS_AHEAD * cores + 1 - len(ahead))
            ahead.extend(remote.remote(task, shared) for task in islice(left, room))
            if not ahead:
                return
            for table in ahead[0]:
                yield ray.get(table)
            ahead.popleft()
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):  # a store or a file that failed, in a worker
            raise error.cause from error
        raise
    finally:
        for rows in ahead:
            ray.cancel(rows)


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
    try:
        return json.dumps(line | {"meaning": REASONS[reason]}, allow_nan=False)
    except ValueError:  # an id that JSON has no number for
        return json.dumps(line | {"id": given, "meaning": REASONS[reason]})
