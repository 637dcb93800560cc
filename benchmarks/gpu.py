"""All checks and measurements that need a GPU, in parts of under ten minutes each.

    python -m benchmarks.gpu --all --out results        # about half an hour on one H100 80 GB
    python -m benchmarks.gpu --list
    python -m benchmarks.gpu --part prefill-8 --out results

Each part writes `results/PART.json` at its end, and existing ones are not run again:
an interrupted run resumes where it was (`--again` runs it anyway). `--all` runs each part in a
process of its own and ends with the rows for docs/performance.md. The geometry is LLaVA-1.5-7B's
with random weights in bf16; nothing is downloaded. Needs torch, transformers and peft, and a
checkout of this repository. `--device cpu --geometry tiny` tries every part in minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import agreement, capture, decode, pooling, prefill, serve, steps, train
from benchmarks.agreement import failed
from benchmarks.measure import Row, report, synchronize, table, tables
from benchmarks.models import DTYPES
from pipeline.evaluation.engine import engine_python
from pipeline.training.throughput import peak_flops

LIMIT = 600  # seconds of a part


def ceilings(options: argparse.Namespace) -> list[Row]:
    """What the device reaches in one large matrix product and one large copy."""
    cuda = options.device.type == "cuda"
    side, size = (8192, 2**31) if cuda else (256, 2**20)
    left, right = (
        torch.randn(side, side, device=options.device, dtype=options.dtype) for _ in "ab"
    )
    source = torch.randn(size // 4, device=options.device)
    target = torch.empty_like(source)
    product = _best(lambda: left @ right, options.device)
    copied = _best(lambda: target.copy_(source), options.device)
    peak = peak_flops(options.device)
    return [
        {"what": "matrix product, TFLOP/s", "measured": 2 * side**3 / product / 1e12}
        | {"data sheet": peak / 1e12 if peak else None},
        {"what": "copy, read and written, GB/s", "measured": 2 * size / copied / 1e9},
    ]


def _best(call: Callable[[], object], device: torch.device) -> float:
    """The least seconds of a call among ten runs of ten."""
    for _ in range(10):
        call()
    seconds = []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(10):
            call()
        synchronize(device)
        seconds.append((time.perf_counter() - start) / 10)
    return min(seconds)


def backends(options: argparse.Namespace) -> list[Row]:
    """Attention backends and gradients, with and without plans, against eager float32."""
    device = options.device
    with agreement.no_tf32():
        return [
            *agreement.backend_checks(device, torch.bfloat16),
            *agreement.backend_checks(device, torch.float16),
            *agreement.gradient_checks(device),
        ]


def flex(options: argparse.Namespace) -> list[Row]:
    """flex_attention against eager float32."""
    with agreement.no_tf32():
        return agreement.backend_checks(options.device, torch.bfloat16, agreement.FLEX)


def families(options: argparse.Namespace) -> list[Row]:
    """Every family and every kind of batch on the device against a CPU."""
    with agreement.no_tf32():
        return [
            *agreement.device_checks(options.device),
            *agreement.family_checks(options.device),
        ]


def _caches(kind: str) -> Callable[[argparse.Namespace], list[Row]]:
    def checks(options: argparse.Namespace) -> list[Row]:
        with agreement.no_tf32():
            return agreement.cache_checks(options.device, kind)

    return checks


def served(options: argparse.Namespace) -> list[Row]:
    """vLLM with plans against dense vLLM, in its own environment; one row where it is missing."""
    try:
        python = engine_python()
    except ValueError as error:
        return [{"what": "vLLM", "result": f"not run: {error}"}]
    words = [python, "-m", "benchmarks.serve", "--turns", str(options.rounds)]
    if options.geometry != "tiny":
        words += ["--width", "4096", "--layers", "32", "--dtype", "bfloat16"]
        words += ["--plans", "8:1/2,16:1/2,24:1/2", "16:1/4", "8:1/9,24:0;pool=tiles"]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "serve.json"
        subprocess.run([*words, "--json", str(file)], check=True)
        return serve.rows(json.loads(file.read_text()))


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part: what it runs, with which settings instead of the usual.

    Args:
        run: makes the rows.
        about: in a few words.
        settings: batch, rounds and the like.
    """

    run: Callable[[argparse.Namespace], list[Row]]
    about: str
    settings: dict[str, int]


def _prefill(options: argparse.Namespace) -> list[Row]:
    return prefill.measure(options, overhead=False)


def _empty_plan(options: argparse.Namespace) -> list[Row]:
    return prefill.measure(options, budgets=False)


def _decode(options: argparse.Namespace) -> list[Row]:
    return decode.measure(options, options.batch)


def _checkpointed(options: argparse.Namespace) -> list[Row]:
    return train.measure(options, checkpointing=True)


def _selective(options: argparse.Namespace) -> list[Row]:
    return train.measure(options, checkpointing="selective")


_STEPS = {"rounds": 5, "steps": 64}
PARTS = {
    "ceilings": Part(run=ceilings, about="rates of a matrix product and of a copy", settings={}),
    "backends": Part(
        run=backends, about="eager = sdpa = flash: plans, padding, cached, gradients", settings={}
    ),
    "flex": Part(run=flex, about="the same for flex_attention", settings={}),
    "families": Part(run=families, about="every family on the device = on a CPU", settings={}),
    "static-caches": Part(
        run=_caches("static"), about="static, compiled = default cache", settings={}
    ),
    "offloaded-caches": Part(run=_caches("offloaded"), about="the same for offloaded", settings={}),
    "offloaded-static-caches": Part(
        run=_caches("offloaded_static"), about="the same for both at once", settings={}
    ),
    "synchronisations": Part(
        run=capture.synchronisation_rows, about="how often the host waits", settings={}
    ),
    "prefill-1": Part(run=_prefill, about="speed-up of prefill", settings={"batch": 1}),
    "prefill-8": Part(
        run=_prefill, about="the same, goal: 0.92 of the bound", settings={"batch": 8}
    ),
    "prefill-32": Part(run=_prefill, about="the same", settings={"batch": 32}),
    "pooling-1": Part(
        run=pooling.measure, about="what pooling adds, goal: 1 %", settings={"batch": 1}
    ),
    "pooling-8": Part(run=pooling.measure, about="the same", settings={"batch": 8}),
    "empty-plan-1": Part(
        run=_empty_plan, about="overhead without a drop", settings={"batch": 1, "rounds": 41}
    ),
    "empty-plan-8": Part(run=_empty_plan, about="the same", settings={"batch": 8, "rounds": 21}),
    "decode-1": Part(
        run=_decode, about="default cache", settings={"batch": 1} | _STEPS | {"rounds": 3}
    ),
    "decode-32": Part(run=_decode, about="default cache", settings={"batch": 32} | _STEPS),
    "static-decode-1": Part(
        run=capture.static_decode_rows, about="compiled", settings={"batch": 1} | _STEPS
    ),
    "static-decode-32": Part(
        run=capture.static_decode_rows, about="compiled", settings={"batch": 32} | _STEPS
    ),
    "graphs-1": Part(run=capture.graph_rows, about="CUDA graph of prefill", settings={"batch": 1}),
    "compile-8": Part(
        run=capture.compiled_prefill_rows,
        about="torch.compile of prefill, no recompiles; 12 of the layers",
        settings={"batch": 8, "layers": 12},
    ),
    "prefill-layers-1": Part(
        run=steps.compiled_prefill_rows,
        about="prefill through compiled layers",
        settings={"batch": 1},
    ),
    "prefill-layers-8": Part(
        run=steps.compiled_prefill_rows, about="the same", settings={"batch": 8}
    ),
    "train-4": Part(
        run=train.measure, about="LoRA step", settings={"batch": 4, "rank": 64, "rounds": 7}
    ),
    "train-32": Part(
        run=_checkpointed,
        about="with checkpointing",
        settings={"batch": 32, "rank": 64, "rounds": 5},
    ),
    "train-layers-4": Part(
        run=steps.compiled_rows,
        about="compiled layers",
        settings={"batch": 4, "rank": 64, "rounds": 7},
    ),
    "train-layers-14": Part(
        run=steps.compiled_rows,
        about="at the dense batch that fits 80 GB, goal: 0.9 of the bound",
        settings={"batch": 14, "rank": 64, "rounds": 5},
    ),
    "train-liger-4": Part(
        run=steps.liger_rows,
        about="Liger's kernels",
        settings={"batch": 4, "rank": 64, "rounds": 7},
    ),
    "train-selective-32": Part(
        run=_selective,
        about="with selective checkpointing",
        settings={"batch": 32, "rank": 64, "rounds": 5},
    ),
    "train-filled": Part(
        run=steps.filled_rows,
        about="memory = auto, compiled; goals: MFU 0.45 dense, 0.40 with 192",
        settings={"batch": 64, "rank": 64, "rounds": 5},
    ),
    "distilling": Part(
        run=steps.distilling_rows,
        about="a distilling step over a plain one, goal: 1.4",
        settings={"batch": 8, "rank": 64, "rounds": 5},
    ),
    "step-waits": Part(
        run=steps.waiting_rows, about="how often the host waits in a step", settings={"rank": 4}
    ),
    "serve": Part(run=served, about="vLLM with plans against dense", settings={"rounds": 5}),
}


def run_part(name: str, options: argparse.Namespace) -> bool:
    """Run one part and write its file; whether all its checks passed."""
    part, chosen = PARTS[name], copy.copy(options)
    settings = {"batch": 1, "rounds": 11, "text": options.text} | part.settings
    if options.geometry == "tiny":
        small = {"rounds": 1, "steps": 2, "rank": 4, "batch": 2}
        settings |= {key: small[key] for key in settings.keys() & small.keys()}
    vars(chosen).update(settings)
    start = time.perf_counter()
    rows = part.run(chosen)
    about = settings | {"geometry": options.geometry, "dtype": str(options.dtype)}
    about["seconds"] = round(time.perf_counter() - start)
    print(f"## {name}: {part.about}")
    report(name, about, rows, options.device, options.out / f"{name}.json")
    wrong = failed(rows)
    print(f"\n{len(wrong)} of {len(rows)} rows FAILED\n" if wrong else "")
    return not wrong


def run_all(options: argparse.Namespace) -> bool:
    """Run what is not there yet, each part in a process of its own; then print all rows."""
    for name in PARTS:
        if (options.out / f"{name}.json").exists() and not options.again:
            print(f"## {name}: is there", flush=True)
            continue
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--again"]
        command += ["--out", str(options.out), "--device", str(options.device)]
        command += ["--geometry", options.geometry, "--text", str(options.text)]
        if options.dtype_name:
            command += ["--dtype", options.dtype_name]
        try:
            subprocess.run(command, timeout=LIMIT, check=False)  # its file tells how it went
        except subprocess.TimeoutExpired:
            print(f"{name}: no end after {LIMIT} s", flush=True)
    print("\n# Rows for docs/performance.md\n")
    broken = []
    for name in PARTS:
        path = options.out / f"{name}.json"
        document = json.loads(path.read_text()) if path.exists() else {"rows": []}
        if document["rows"]:
            print(summary(document), "\n")
        if failed(document["rows"]) or not document["rows"]:
            broken.append(name)
    print(f"not well: {', '.join(broken)}" if broken else "all parts are well", flush=True)
    return not broken


def summary(document: dict) -> str:
    """A part as docs/performance.md has it: checks that passed are counted, the rest is a table."""
    rows, about = document["rows"], document["machine"]
    succeeded = [row for row in rows if row.get("result") == "ok"]
    others = [row for row in rows if row.get("result") != "ok"]
    settings = ", ".join(f"{key} {value}" for key, value in document["settings"].items())
    lines = [
        f"### {document['benchmark']}",
        f"{about['device']}, torch {about['torch']}, transformers {about['transformers']}, "
        f"commit {about['commit']}, {about['date']}; {settings}",
    ]
    if succeeded:
        worst = max(succeeded, key=lambda row: row["error"] / (row["tolerance"] or 1))
        lines.append(
            f"{len(succeeded)} checks passed; the closest to its tolerance: {worst['check']}, "
            f"{worst['case']}: {worst['error']:.1e} of {worst['tolerance']:.1e}"
        )
    if others:
        lines.append(tables(others))
    return "\n\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of this script."""
    made = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--all", action="store_true", help="every part that is not there yet")
    what.add_argument("--part", choices=PARTS, help="one part")
    what.add_argument("--list", action="store_true", help="list the parts")
    made.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results")
    made.add_argument("--again", action="store_true", help="also what is there already")
    made.add_argument("--geometry", default="llava-1.5-7b")
    made.add_argument("--device", default="cuda")
    made.add_argument("--dtype", dest="dtype_name", choices=DTYPES, help="bfloat16 unless given")
    made.add_argument("--text", type=int, default=101, help="text tokens of a row")
    options = made.parse_args(arguments)
    options.device = torch.device(options.device)
    options.dtype = DTYPES[options.dtype_name or "bfloat16"]
    return options


def main() -> None:
    options = parse()
    if options.list:
        print(table([{"part": name, "what": PARTS[name].about} for name in PARTS]))
        return
    if options.all:
        sys.exit(not run_all(options))
    if (options.out / f"{options.part}.json").exists() and not options.again:
        print(f"{options.out / options.part}.json is there; --again runs it anyway")
        return
    sys.exit(not run_part(options.part, options))


if __name__ == "__main__":
    main()
