"""Data preparation: memory while the set grows, and throughput over a plain multiprocessing loop.

    python -m benchmarks.prepare memory --records 10000 100000
    python -m benchmarks.prepare speed --records 4000 --pictures 1

`memory` runs `adsc prepare` on generated sets and samples its whole process tree, Ray's processes
and the object store included: `peak MB` is the largest sum of the proportional set sizes (shared
pages once), `driver MB` that of the one process that reads the index, finds duplicates and writes.
`speed` times the stage, with Ray started and its workers warm, against a multiprocessing pool of
as many processes over the same chunks, which renders with the same functions and writes with the
same writer. Both must write the same bytes. The two take turns; `ratio` is the stage's records a
second over the loop's, the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from PIL import Image

WORDS = (
    "what",
    "is",
    "the",
    "thing",
    "at",
    "left",
    "of",
    "a",
    "grid",
    "and",
    "how",
    "many",
    "bags",
)
SHARED_PICTURES = 256
SIDE = 336


def generate(folder: Path, records: int, args: argparse.Namespace) -> Path:
    """A JSON list of unique records, as a stream; a share of them with one of 256 pictures."""
    pictures = args.pictures
    rng = random.Random(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(SHARED_PICTURES if pictures else 0):
        noise = np.random.default_rng(number).integers(0, 255, (42, 42, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((SIDE, SIDE))
        picture.save(folder / "images" / f"{number}.jpg", quality=85)
    path = folder / f"{records}.json"
    with path.open("w") as file:
        for number in range(records):
            record: dict[str, Any] = {"id": f"{number:08d}", "conversations": []}
            for turn in range(args.exchanges):
                question = f"{number} {turn} {' '.join(rng.choices(WORDS, k=args.words))}?"
                record["conversations"] += [
                    {"from": "human", "value": question},
                    {"from": "gpt", "value": " ".join(rng.choices(WORDS, k=args.words))},
                ]
            if rng.random() < pictures:
                record["image"] = f"{number % SHARED_PICTURES}.jpg"
                record["conversations"][0]["value"] += "\n<image>"
            file.write(("[" if not number else ",\n") + json.dumps(record))
        file.write("]")
    return path


def tree_memory(root: psutil.Process) -> tuple[float, float]:
    """MB of a process with all its children, and of itself; shared pages are counted once."""
    total = own = 0.0
    for process in [root, *root.children(recursive=True)]:
        try:
            size = process.memory_full_info().pss / 1e6
        except (psutil.Error, AttributeError):
            continue
        total += size
        own = size if process == root else own
    return total, own


def measure_memory(
    model: Path, folder: Path, records: int, args: argparse.Namespace
) -> dict[str, Any]:
    data = generate(folder, records, args)
    command = [
        sys.executable, "-m", "workflows.commands.main",
        "prepare", str(data), "--model", str(model),
        "--images", str(folder / "images"), "--out", str(folder / f"out-{records}"), "--json",
    ]  # fmt: skip
    start = time.monotonic()
    samples = []
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        root = psutil.Process(process.pid)
        while process.poll() is None:
            samples.append(tree_memory(root))
            time.sleep(1)
        seconds = time.monotonic() - start
        output.seek(0)
        counts = json.loads(output.read().splitlines()[-1])
    if process.returncode or counts["out"] != records:
        raise RuntimeError(f"adsc prepare ended with {process.returncode}: {counts}")
    return {
        "records": records,
        "input MB": data.stat().st_size / 1e6,
        "peak MB": max(total for total, _ in samples),
        "driver MB": max(own for _, own in samples),
        "seconds": seconds,
        "records/s": records / seconds,
    }


_WORK: Any = None


def _start(work: Any) -> None:
    global _WORK
    _WORK = work


def _render(task: dict[str, Any]) -> list[pa.Table]:
    from pipeline.data.worker import render_chunk

    return list(render_chunk(task, _WORK))


def measure_speed(model: Path, folder: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import ray

    from pipeline.data.shards import SCHEMA, ShardWriter
    from pipeline.stages import prepare as stage
    from workflows.commands.prepare import _input

    data = generate(folder, args.records[0], args)
    config = stage.PrepareConfig(splits={"train": data.name}, template="auto")
    given, base = _input(folder), _input(model)
    cores = args.processes
    ray.init(num_cpus=cores, log_to_driver=False, logging_level="ERROR")
    work, tasks = stage._plan("train", given, base, config, "tokenizer")
    pool = multiprocessing.get_context("spawn").Pool(cores, _start, (work,))

    def writer(name: str) -> ShardWriter:
        (folder / name).mkdir()
        return ShardWriter(folder / name, config.rows_per_shard, config.bytes_per_shard, 64)

    def loop(name: str) -> dict[str, Any]:
        made, seen = writer(name), set()
        for tables in pool.imap(_render, tasks):
            for table in tables:
                keys = table["key"].to_pylist()
                keep = [key not in seen and not seen.add(key) for key in keys]  # type: ignore[func-returns-value]
                good = table.filter(pa.array(keep))
                made.add(good.select(SCHEMA.names), good["bytes"].to_numpy())
        made.close()
        return made.files

    def stream(name: str) -> dict[str, Any]:
        made = writer(name)
        with (folder / f"{name}.jsonl").open("w") as quarantine:
            rows = stage._rendered(tasks, work)
            seen: dict[str, set[bytes]] = {"train": set()}
            stage._write_split(tasks, work, rows, made, seen, quarantine, lambda *_: None)
        return made.files

    times: dict[str, list[float]] = {"loop": [], "stage": []}
    for number in range(args.rounds + 1):
        written = []
        for name, call in (("loop", loop), ("stage", stream))[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            written.append(call(f"{name}-{number}"))
            if number:  # the first round warms both
                times[name].append(time.perf_counter() - start)
        if written[0] != written[1]:
            raise RuntimeError("the loop and the stage wrote different shards")
    pool.terminate()
    ray.shutdown()
    ratios = [a / b for a, b in zip(times["loop"], times["stage"], strict=True)]
    for name, seconds in times.items():
        rates = sorted(args.records[0] / one for one in seconds)
        yield {
            "case": name,
            "records/s": statistics.median(rates),
            "low": rates[0],
            "high": rates[-1],
        }
    middle = statistics.median(ratios)
    yield {"case": "ratio", "ratio": middle, "low": min(ratios), "high": max(ratios)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("memory", "speed"))
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--pictures", type=float, default=0.0, help="share of records with one")
    parser.add_argument("--exchanges", type=int, default=3, help="questions in a record")
    parser.add_argument("--words", type=int, default=20, help="of a question, and of an answer")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of `speed`")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="of `speed`")
    parser.add_argument("--model", help="checkpoint folder (default: the small one)")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    args = parser.parse_args(arguments)
    model = Path(args.model or str(files("workflows") / "assets" / "tiny_base")).absolute()
    os.environ.update(RAY_AUTH_MODE="disabled", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    rows = []
    with tempfile.TemporaryDirectory(prefix="adsc-prepare-") as scratch:
        if args.what == "memory":
            found: Iterator[dict[str, Any]] = (
                measure_memory(model, Path(scratch), records, args) for records in args.records
            )
        else:
            found = measure_speed(model, Path(scratch), args)
        for row in found:
            cells = [
                f"{k} {v:,.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
            ]
            print("  ".join(cells), flush=True)
            rows.append(row)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"benchmark": "prepare", "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
