"""The `adsc` command: run workflows, look at the store, count costs, chat with a checkpoint.

Only parsing and printing stand here; whatever a command does is a function elsewhere. Heavy
imports wait until a command needs them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adsc.cli import add_commands
from workflows import (
    dry_run,
    eval_cli,
    export_cli,
    jobs_cli,
    prepare_cli,
    search_cli,
    serve_cli,
    terminal,
)
from workflows.registry import WORKFLOWS, load_workflow
from workflows.terminal import add_command

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.record import Record
    from pipeline.stage import RunContext
    from pipeline.store import Store
    from pipeline.workflow import Workflow

DEFAULT_ROOT = "runs"

RUN_EXAMPLES = """examples:
  adsc run demo
  adsc run demo --set plan=1:1/3,4:1/3 --set curriculum.order=forward
  adsc run demo --set train.learning_rate=1e-3 --dry-run
  adsc run llava15_7b --dry-run --workers 8 --gpu-type a100-80gb --gpu-price 1.80
  adsc run demo --root s3://bucket/adsc --mlflow http://mlflow:5000
  adsc run demo --address ray://head:10001 --workers 8 --gpus 1
"""
LS_EXAMPLES = """examples:
  adsc ls                     (the workflows)
  adsc ls demo                (each stage: its state and where it lies)
  adsc ls demo --json
"""
SHOW_EXAMPLES = """examples:
  adsc show demo evaluate             (the record of a finished stage)
  adsc show demo export --path        (where its files are)
  adsc show demo --config             (every key that --set takes)
"""


def _count(text: str) -> int:
    """An argparse type: a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _workers(text: str) -> int | tuple[int, int]:
    """An argparse type: `4`, or `2-8` for as many as there are."""
    fewest, dash, most = text.partition("-")
    if not dash:
        return _positive(int)(text)  # type: ignore[no-any-return]
    bounds = _positive(int)(fewest), _positive(int)(most)
    if bounds[0] > bounds[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: the fewest workers come first, as in 2-8")
    return bounds


def _positive(kind: type) -> Callable[[str], Any]:
    """An argparse type: a finite number above zero."""
    return terminal.number(kind, above=0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    with terminal.streams():
        return _main(list(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    options = _parse(arguments)
    try:
        return int(options.run(options) or 0)
    except KeyboardInterrupt:
        return terminal.interrupted()
    except _user_errors() as error:
        from pipeline.redact import redact

        print(f"adsc: {redact(str(error))}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2


def _user_errors() -> tuple[type[Exception], ...]:
    from pipeline.failure import RunFailed
    from pipeline.jobs import JobFailed
    from workflows.serving import ServingError

    return (ValueError, RunFailed, JobFailed, ServingError)


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Options may stand before, between and after a command's words, which argparse by itself does
    not allow below subcommands."""
    parser, commands = _parsers()
    command = commands.get(arguments[0]) if arguments else None
    if command and arguments[0] == serve_cli.NAME:
        return serve_cli.parse(command, arguments[1:])
    return command.parse_intermixed_args(arguments[1:]) if command else parser.parse_args(arguments)


def build_parser() -> argparse.ArgumentParser:
    return _parsers()[0]


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole parser, and that of each command."""
    parser = argparse.ArgumentParser(
        prog="adsc",
        description="Train LLaVA-type models to live with fewer vision tokens.",
        epilog="Start with `adsc run demo`.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    run = add_command(
        commands, "run", "run a workflow; finished stages are not repeated", RUN_EXAMPLES
    )
    _add_run_options(run)
    dry_run.add_options(run)
    _add_ray(run)
    run.set_defaults(run=_run)

    evaluation = add_command(
        commands, "eval", "score a checkpoint with several methods on questions", eval_cli.EXAMPLES
    )
    eval_cli.add_arguments(evaluation, _positive)
    _add_root(evaluation)
    _add_workers(evaluation)
    _add_ray(evaluation)
    evaluation.set_defaults(run=_eval, workflow="eval")

    search = add_command(
        commands, "search", "find where and how much to prune, at a budget", search_cli.EXAMPLES
    )
    search_cli.add_arguments(search, _positive)
    _add_run_options(search)
    _add_ray(search)
    search.set_defaults(run=_search)

    ls = add_command(
        commands, "ls", "workflows, or the stages of one with their state", LS_EXAMPLES
    )
    _add_workflow(ls, optional=True)
    ls.add_argument("--json", action="store_true", help="one JSON list")
    ls.set_defaults(run=_ls)

    show = add_command(commands, "show", "the record of a finished stage", SHOW_EXAMPLES)
    _add_workflow(show)
    show.add_argument("stage", nargs="?", help="name of a stage; without it the config is shown")
    show.add_argument("--path", action="store_true", help="print only where the stage's files are")
    show.add_argument("--config", action="store_true", help="print every key that --set takes")
    show.set_defaults(run=_show)

    prepare_cli.add_arguments(
        add_command(
            commands,
            "prepare",
            "records and pictures to validated, tokenised Parquet shards",
            prepare_cli.EXAMPLES,
        )
    )

    chat = add_command(
        commands,
        "chat",
        "ask an exported checkpoint about a picture",
        'examples:\n  adsc chat CHECKPOINT grid.png "where is the bag?"\n'
        "  adsc chat ELASTIC grid.png --plan 64\n",
    )
    chat.add_argument("checkpoint", help="exported checkpoint: a folder or s3://...")
    chat.add_argument("image", help="a picture: a file or s3://...")
    chat.add_argument("question", nargs="*", help="without one, questions are read line by line")
    chat.add_argument(
        "--plan",
        help="a named plan of the checkpoint, dense, or a plan such as 2:1/4 (default: its own)",
    )
    chat.add_argument(
        "--max-new-tokens", type=_positive(int), default=64, help="longest answer in tokens"
    )
    chat.set_defaults(run=_chat)
    export_cli.add_commands(commands)
    serve_cli.add_commands(commands)
    jobs_cli.add_commands(commands, _add_run_options)
    add_commands(commands)
    return parser, dict(commands.choices)


def _add_workflow(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    parser.add_argument("workflow", nargs="?" if optional else None, help=", ".join(WORKFLOWS))
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="changes",
        help="change the config; repeatable",
    )
    _add_root(parser)


def _add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root",
        default=os.environ.get("ADSC_ROOT") or DEFAULT_ROOT,
        help="the store: a folder or s3://bucket/prefix (default: $ADSC_ROOT or runs)",
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes, here or on a cluster."""
    _add_workflow(parser)
    _add_workers(parser)


def _add_ray(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", help="an existing Ray cluster (default: Ray on this machine)")
    parser.add_argument(
        "--dashboard-port",
        type=terminal.number(int, above=0, most=65535),
        help="port of the embedded Ray's dashboard",
    )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    """On what it runs, and where it is seen: no part of what is computed."""
    parser.add_argument(
        "--mlflow", metavar="URI", help="MLflow server, or off (default: SQLite in the root)"
    )
    parser.add_argument(
        "--workers",
        type=_workers,
        default=1,
        help="workers that train, or answer questions; 2-8 takes as many as the cluster has",
    )
    parser.add_argument("--cpus", type=_positive(float), default=1, help="CPU cores of a worker")
    parser.add_argument(
        "--gpus", type=terminal.number(float, least=0), default=0, help="GPUs of a worker"
    )
    parser.add_argument(
        "--data-workers", type=_count, default=0, metavar="N",
        help="processes that make batches for each training worker (default: a thread of its own)",
    )  # fmt: skip
    parser.add_argument(
        "--lease", type=_positive(float), default=20, help="seconds until a dead run is taken over"
    )


def _context(options: argparse.Namespace) -> RunContext:
    from pipeline.stage import RunContext
    from pipeline.store import open_store
    from pipeline.tracking.address import chosen, default_uri

    place = open_store(options.root).local("")
    tracking = chosen(options.mlflow)
    return RunContext(
        root=options.root,
        workflow=options.workflow,
        tracking_uri=None
        if tracking == "off"
        else tracking or default_uri(place or Path(DEFAULT_ROOT)),
        num_workers=options.workers,
        cpus_per_worker=options.cpus,
        gpus_per_worker=options.gpus,
        data_workers=options.data_workers,
        lease_seconds=options.lease,
        address=options.address,
        dashboard_port=options.dashboard_port,
    )


def _run(options: argparse.Namespace) -> int:
    from pipeline import graph
    from pipeline.driver import settle
    from pipeline.store import check_for_runs, open_store

    workflow = load_workflow(options.workflow, options.changes)
    stages = workflow.stages()
    store = open_store(options.root)
    check_for_runs(store.root)
    console = terminal.console()
    _print_states(console, graph.state(store, stages), {s.name: s.title for s in stages})
    another = _former(workflow, options, store)
    if options.dry_run:
        _note(another)
        return dry_run.show(console, workflow.config, options)
    if another:
        raise ValueError(another)
    context = dataclasses.replace(_context(options), setup=workflow.setup)
    found = graph.run(stages, context, console)
    if told := settle(context.root, context.tracking_uri, context.cache):
        console.print(told, markup=False)
    _print_results(console, found)
    _print_next(console, found, context)
    return 0


def _former(workflow: Workflow, options: argparse.Namespace, store: Store) -> str | None:
    from workflows.renamed import former

    return former(workflow, options.changes, store)


def _note(text: str | None) -> None:
    if text:
        print(f"adsc: {text}", file=sys.stderr)


def _eval(options: argparse.Namespace) -> int:
    from rich.console import Console

    # What is printed as JSON goes to a program: people read progress on the other stream.
    console = Console(stderr=True, width=200) if options.json else terminal.console()
    return eval_cli.run(options, _context(options), console)


def _search(options: argparse.Namespace) -> int:
    from rich.console import Console

    workflow = search_cli.edited(load_workflow(options.workflow, options.changes), options)
    console = Console(stderr=True, width=200) if options.json else terminal.console()
    return search_cli.run(workflow, options, _context(options), console)


def _print_states(console: Console, states: Sequence[Any], titles: dict[str, str]) -> None:
    table = terminal.table("stage", "what", "state")
    for state in states:
        title = titles[state.name].partition(": ")[2] or titles[state.name]
        table.add_row(state.name, title, state.state)
    console.print(table)


def _print_results(console: Console, found: dict[str, Record]) -> None:
    if "evaluate" not in found:
        return
    outputs = found["evaluate"].outputs
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


def _print_next(console: Console, found: dict[str, Record], context: RunContext) -> None:
    from pipeline.redact import redact

    programs = Path(sys.executable).parent
    uri = redact(context.tracking_uri or "")
    served = uri.startswith("http")
    lines = [uri if served else f"{programs}/mlflow ui --backend-store-uri {shlex.quote(uri)}"]
    if not uri:
        lines = []
    if "report" in found:
        lines.append(f"{found['report'].uri}/report.html")
    if "export" in found and "evaluate" in found:
        picture = f"{found['evaluate'].uri}/pictures/0.png"
        lines.append(
            f"{programs}/adsc chat {shlex.quote(found['export'].uri)} "
            f'{shlex.quote(picture)} "is there a bag?"'
        )
    console.print("Next: browse the runs, read the report, ask the checkpoint", markup=False)
    for line in lines:
        console.print(f"  {line}", soft_wrap=True, markup=False, highlight=False)


def _ls(options: argparse.Namespace) -> int:
    from pipeline import graph
    from pipeline.driver import settle
    from pipeline.stage import RunContext
    from pipeline.store import open_store
    from pipeline.tracking.address import chosen

    console = terminal.console()
    if options.workflow is None:
        table = terminal.table("workflow", "what")
        rows = [(name, load_workflow(name).title) for name in WORKFLOWS]
        if options.json:
            print(json.dumps([{"name": name, "title": title} for name, title in rows]))
            return 0
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return 0
    workflow = load_workflow(options.workflow, options.changes)
    _note(_former(workflow, options, open_store(options.root)))
    states = graph.state(open_store(options.root), workflow.stages())
    if options.json:
        print(json.dumps([state._asdict() for state in states]))
        return 0
    table = terminal.table("name", "state", "path")
    for state in states:
        table.add_row(*state)
    console.print(table, soft_wrap=True)
    told = settle(options.root, chosen(None), RunContext.cache)
    if told:
        console.print(told, markup=False)
    return 0


def _show(options: argparse.Namespace) -> int:
    from pipeline import graph
    from pipeline import record as records
    from pipeline.config import keys
    from pipeline.store import open_store

    workflow = load_workflow(options.workflow, options.changes)
    if options.stage is None or options.config:
        values = workflow.config.model_dump(mode="json")
        for key in keys(workflow.config):
            value: Any = values
            for part in key.split("."):
                value = value[int(part)] if isinstance(value, list) else value[part]
            if not isinstance(value, dict):
                print(f"{key} = {json.dumps(value)}")
        return 0
    stages = workflow.stages()
    names = [stage.name for stage in stages]
    if options.stage not in names:
        raise ValueError(
            f"{workflow.name} has no stage {options.stage!r}; it has {', '.join(names)}"
        )
    _note(_former(workflow, options, open_store(options.root)))
    record = records.load(
        open_store(options.root), options.stage, graph.fingerprints(stages)[options.stage]
    )
    if record is None:
        raise ValueError(
            f"stage {options.stage} is not finished in {options.root}; "
            f"`adsc run {workflow.name} --root {options.root}` makes it"
        )
    print(record.uri if options.path else json.dumps(record.model_dump(), indent=1))
    return 0


def _read_file(path: str) -> bytes:
    from pipeline.store import open_store, split

    folder, name = split(path)
    data = open_store(folder).read(name)
    if data is None:
        raise ValueError(f"there is no picture {path!r}")
    return data


def _read_picture(path: str) -> bytes:
    from pipeline.data.config import PrepareConfig
    from pipeline.data.pictures import check_picture

    picture = _read_file(path)
    check_picture(picture, path, PrepareConfig(min_side=1).limits())
    return picture


@contextlib.contextmanager
def _local_folder(place: str) -> Iterator[Path]:
    """A checkpoint's folder; one in a remote store is downloaded for the time of a `with`."""
    from pipeline.store import open_store

    store = open_store(place)
    if not store.list(""):
        raise ValueError(
            f"there is no checkpoint at {place!r}; `adsc show demo export --path` prints a place"
        )
    local = store.local("")
    if local is not None:
        yield local
        return
    from pipeline.manifest import MANIFEST
    from pipeline.publish import pull

    with tempfile.TemporaryDirectory(prefix="adsc-chat-") as scratch:
        if store.read(MANIFEST) is None:
            store.download("", Path(scratch))
        else:
            pull(store, Path(scratch))
        yield Path(scratch)


def _chat(options: argparse.Namespace) -> int:
    from transformers import AutoProcessor

    import adsc
    from pipeline.evaluation.generation import Question, generate_answers
    from workflows import stamps_tower

    stamps_tower.register()
    picture = _read_picture(options.image)
    with _local_folder(options.checkpoint) as folder:
        model = adsc.from_pretrained(folder, plan=options.plan).eval()
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    asked = [" ".join(options.question)] if options.question else map(str.strip, sys.stdin)
    for text in filter(None, asked):
        question = Question("chat", "chat", text, "", (picture,))
        print(generate_answers(model, processor, [question], 1, options.max_new_tokens)[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
