"""The command `adsc eval`: its arguments and its table. The stages are in workflows/evaluation.py.

Answers are kept in the store: rerun the same command to resume after a kill. Once finished, it only
prints the results.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflows.commands import terminal
from workflows.commands.options import add_ray, add_root, add_workers, positive, run_context

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = """examples:
  adsc eval CHECKPOINT --tasks questions.json --methods dense plan:2:1/4,4:1/4 fastv:22
  adsc eval CHECKPOINT --data runs/prepare-0123456789ab          (its split `test`)
  adsc eval ELASTIC --tasks questions.json --methods own:64 own:128 dense
  adsc eval CHECKPOINT --data prepared               (a folder written by `adsc prepare`)
  adsc eval s3://bucket/model --tasks a.json b.json --json --out results
  adsc eval llava-hf/llava-1.5-7b-hf --tasks pope=data/pope gqa=data/gqa --limit 500 \\
      --methods dense fastv:192 plan:2:1/4,16:1/2

CHECKPOINT is a folder, s3://, package://NAME/FOLDER or a hub id. A task file holds conversations
in LLaVA's JSON, with the pictures in the folder `images` beside it. Methods: `own` (the
checkpoint's plan), `own:64` (its plan of that name), `dense`, `plan:LAYER:SHARE,...`, or a peer
with its layer average and options, `fastv:32,layer=3`. By default an elastic checkpoint is
evaluated with every named plan and dense, any other checkpoint with its own plan.
Public benchmarks are NAME=FOLDER, with their official files unpacked in the folder: gqa, vqav2,
textvqa, vizwiz, pope, scienceqa, mme, seedbench, mmbench, mmbench_cn (docs/evaluation.md).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a folder, s3://..., package://..., or a hub id")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="task files, or benchmarks as NAME=FOLDER; with --data, its splits",
    )
    parser.add_argument(
        "--data", help="a finished prepare stage's folder, or `adsc prepare`'s, or s3://..."
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="methods to compare (default: own; for an elastic checkpoint, every plan and dense)",
    )
    parser.add_argument(
        "--template",
        choices=("checkpoint", "data"),
        default="checkpoint",
        help="the chat template that formats the questions (default: the checkpoint's)",
    )
    parser.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="what answers (transformers); vllm needs `make vllm`",
    )
    parser.add_argument(
        "--batch-size", type=positive(int), default=64, help="questions per batch (64)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive(int), default=16, help="longest answer in tokens (16)"
    )
    parser.add_argument(
        "--limit", type=positive(int), metavar="N", help="sample at most N records of each task"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="copy results and report to DIR")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")
    add_root(parser)
    add_workers(parser)
    add_ray(parser)


def run(options: argparse.Namespace) -> int:
    """Run the stages, print the table or the JSON, and copy both outputs to --out if given."""
    from pipeline.durable import graph
    from pipeline.durable.stage import Input
    from pipeline.evaluation.engine import engine_python
    from pipeline.publishing.publish import check_target
    from workflows.evaluation import evaluation_stages, setup_for

    console = terminal.console(data=options.json)
    if options.out is not None:
        check_target(options.out)
    if options.engine == "vllm" and not options.address:  # nodes of a cluster have their own
        engine_python()
    stages = evaluation_stages(
        options.checkpoint,
        options.methods,
        tasks=options.tasks,
        data=options.data,
        limit=options.limit,
        template=options.template,
        engine=options.engine,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
    )
    parameters = {"checkpoint": options.checkpoint, "methods": " ".join(options.methods or ())}
    context = run_context(options, "eval", parameters, setup_for(options.checkpoint))
    records = graph.run(stages, context, console)
    evaluated, reported = Input(records["evaluate"]), Input(records["report"])
    results = json.loads((evaluated.folder / "results.json").read_text())
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        for result in (evaluated, reported):
            shutil.copytree(result.folder, options.out, dirs_exist_ok=True)
    if options.json:
        print(json.dumps(results))
    else:
        print_table(results, console)
        console.print(f"report: {reported.uri}/report.html", soft_wrap=True, markup=False)
    return 0


def print_table(results: dict[str, Any], console: Console) -> None:
    """One row per method: scores with intervals, costs and times; then tables per benchmark."""
    from pipeline.evaluation.benchmarks import BENCHMARKS

    title = f"{results['num_questions']} questions, {results['device']}, {results['dtype']}"
    columns = (
        "method", "all right, % [95 %]", f"of {results['control_arm']}", "vision tokens", "GFLOPs",
        "KV KiB", "prefill ms", "decode tokens/s", "peak MiB",
    )  # fmt: skip
    table = terminal.table(*columns, title=title)
    for arm in results["arms"]:
        share, peak, kept = arm["accuracy"], arm["peak_memory_bytes"], arm["retention"]
        mean, low, high = (100 * share[name] for name in ("mean", "low", "high"))
        table.add_row(
            arm["label"],
            f"{mean:.1f} [{low:.1f}, {high:.1f}]",
            "-" if kept is None else f"{100 * kept:.1f} %",
            f"{arm['average_vision_tokens']:.1f}",
            f"{arm['flops'] / 1e9:.3f}",
            f"{arm['kv_cache_bytes'] / 1024:.0f}",
            f"{arm['prefill_ms']['median']:.1f}",
            f"{arm['decode_tokens_per_s']['median']:.0f}",
            "-" if peak is None else f"{peak / 2**20:.0f}",
        )
    console.print(table)
    arms = results["arms"]
    if arms and arms[0].get("by_split"):
        console.print(_by_task({a["label"]: a["by_split"] for a in arms}, "by task, %", 100))
    for name, figures in results.get("benchmarks", {}).items():
        rows = {a["label"]: {key: of[a["name"]] for key, of in figures.items()} for a in arms}
        console.print(_by_task(rows, BENCHMARKS[name].title, 1))


def _by_task(rows: dict[str, dict[str, Any]], title: str, scale: float) -> Any:
    """One row per task (or figure) and method: mean, interval, and share of the control's score."""
    table = terminal.table("", "method", "mean [95 %]", "difference [95 %]", "kept", title=title)
    for task in next(iter(rows.values())):
        for label, scores in rows.items():
            cells = [
                "-" if share is None else _spread(share, scale)
                for share in (scores[task], scores[task].get("difference"))
            ]
            kept = scores[task].get("retention")
            table.add_row(task, label, *cells, "-" if kept is None else f"{100 * kept:.1f} %")
    return table


def _spread(share: dict[str, float], scale: float) -> str:
    mean, low, high = (f"{scale * share[name]:.4g}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
