"""`adsc run`: run a workflow here or on a Ray cluster; finished stages are not repeated."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflows.commands import dry_run, terminal
from workflows.commands.options import add_ray, add_workers, add_workflow, run_context
from workflows.registry import load_workflow

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.durable.record import Record
    from pipeline.durable.stage import RunContext

EXAMPLES = """examples:
  adsc run demo
  adsc run demo --set plan=1:1/3,4:1/3 --set curriculum.order=forward
  adsc run demo --set train.learning_rate=1e-3 --dry-run
  adsc run llava15_7b --dry-run --workers 8 --gpu-type a100-80gb --gpu-price 1.80
  adsc run demo --root s3://bucket/adsc --mlflow http://mlflow:5000
  adsc run demo --address ray://head:10001 --workers 8 --gpus 1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workflow(parser)
    add_workers(parser)
    dry_run.add_options(parser)
    add_ray(parser)


def run(options: argparse.Namespace) -> int:
    """Run the unfinished stages; print results and next steps."""
    from pipeline.durable import graph
    from pipeline.durable.session import send_pending
    from pipeline.store import check_for_runs, open_store
    from workflows.renamed import former

    workflow = load_workflow(options.workflow, options.changes)
    stages = workflow.stages()
    store = open_store(options.root)
    check_for_runs(store.root)
    console = terminal.console()
    states = graph.state(store, stages)
    _print_states(console, states, {s.name: s.title for s in stages})
    another = former(workflow, options.changes, store)
    if options.dry_run:
        terminal.note(another)
        return dry_run.show(console, workflow.config, options)
    if another:
        raise ValueError(another)
    parameters = workflow.parameters(options.changes)
    context = run_context(options, options.workflow, parameters, workflow.setup)
    finished = graph.run(stages, context, console, states)
    if unsent := send_pending(context.root, context.tracking_uri, context.cache):
        console.print(unsent, markup=False)
    _print_results(console, finished)
    _print_next(console, finished, context)
    return 0


def _print_states(console: Console, states: Sequence[Any], titles: dict[str, str]) -> None:
    table = terminal.table("stage", "description", "state")
    for state in states:
        title = titles[state.name].partition(": ")[2] or titles[state.name]
        table.add_row(state.name, title, state.state)
    console.print(table)


def _print_results(console: Console, finished: dict[str, Record]) -> None:
    if "evaluate" not in finished:
        return
    outputs = finished["evaluate"].outputs
    table = terminal.table(
        "arm", "plan", "accuracy", "of control", "vision tokens", "GFLOPs", "KV KiB", "prefill ms",
        title="Accuracy and cost of one question",
    )  # fmt: skip
    for name, arm in outputs["arms"].items():
        retention = arm["retention"]
        table.add_row(
            name,
            arm["plan"] or "-",
            f"{arm['accuracy']:.3f}",
            "-" if retention is None else f"{100 * retention:.1f} %",
            f"{arm['average_vision_tokens']:.1f}",
            f"{arm['flops'] / 1e9:.3f}",
            f"{arm['kv_cache_bytes'] / 1024:.0f}",
            f"{arm['prefill_ms']:.1f}",
        )
    table.add_row("majority answer", "-", f"{outputs['majority']:.3f}", "-", "0", "-", "-", "-")
    console.print(table)


def _print_next(console: Console, finished: dict[str, Record], context: RunContext) -> None:
    from pipeline.durable.record import workflow_run

    programs = Path(sys.executable).parent
    lines = []
    if shutil.which("adsc") is None and (programs / "activate").is_file():
        lines.append(f"source {shlex.quote(str(programs / 'activate'))}    # puts `adsc` on PATH")
    lines += _browsing(context.tracking_uri or "", workflow_run(finished.values()), programs)
    if "report" in finished:
        lines.append(_opening(f"{finished['report'].uri}/report.html"))
    if "export" in finished and "evaluate" in finished:
        picture = f"{finished['evaluate'].uri}/pictures/0.png"
        lines.append(
            f"{programs}/adsc chat {shlex.quote(finished['export'].uri)} "
            f'{shlex.quote(picture)} "is there a bag?"'
        )
    console.print("Next: browse the runs, read the report, ask the checkpoint", markup=False)
    for line in lines:
        console.print(f"  {line}", soft_wrap=True, markup=False, highlight=False)


def _browsing(uri: str, run: str, programs: Path) -> list[str]:
    """Where the workflow's run and the list of runs are shown, and what serves them."""
    from pipeline.redact import redact
    from pipeline.tracking.address import page_address
    from pipeline.tracking.view import ADDRESS

    if not uri:
        return []
    pages = [(run, "this workflow's run")]
    if run:
        pages.append((f"{run.rpartition('/')[0]}{ADDRESS}", "all workflows"))
    if uri.startswith("http"):
        served, lines = uri, [] if run else [redact(uri)]
    else:
        served = "http://127.0.0.1:5000"
        lines = [f"{programs}/mlflow ui --backend-store-uri {shlex.quote(redact(uri))}"]
    return lines + [f"{page_address(served, page)}    # {what}" for page, what in pages if page]


def _opening(page: str) -> str:
    """A shell command that opens a page in a browser; for a page in a bucket, its address."""
    if "://" in page:
        return page
    address = Path(page).resolve().as_uri()
    return f"{shlex.quote(sys.executable)} -m webbrowser -t {shlex.quote(address)}"
