"""`adsc show`: the record of a finished stage, all of them over time, or a workflow's config."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from workflows.commands import terminal
from workflows.commands.options import add_workflow
from workflows.registry import load_workflow

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.durable.workflow import Workflow

EXAMPLES = """examples:
  adsc show demo evaluate             (the record of a finished stage)
  adsc show demo export --path        (where its files are)
  adsc show demo --timeline           (when each finished stage ran, and how long)
  adsc show demo --config             (every key that --set takes)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workflow(parser)
    parser.add_argument("stage", nargs="?", help="name of a stage (default: show the config)")
    parser.add_argument(
        "--path", action="store_true", help="only print the path of the stage's files"
    )
    parser.add_argument(
        "--timeline", action="store_true", help="print the finished stages as bars over time"
    )
    parser.add_argument("--config", action="store_true", help="print every key that --set takes")


def run(options: argparse.Namespace) -> int:
    """Print a config, a record, or a path."""
    workflow = load_workflow(options.workflow, options.changes)
    if options.timeline:
        _print_timeline(workflow, options)
    elif options.stage is None or options.config:
        _print_config(workflow.config)
    else:
        _print_record(workflow, options)
    return 0


def _print_config(config: Config) -> None:
    from pipeline.config import keys

    values = config.model_dump(mode="json")
    for key in keys(config):
        value: Any = values
        for part in key.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        if not isinstance(value, dict):
            print(f"{key} = {json.dumps(value)}")


def _print_timeline(workflow: Workflow, options: argparse.Namespace) -> None:
    from pipeline.durable import graph
    from pipeline.reporting.timeline import bars, lines
    from pipeline.store import open_store

    finished = graph.finished(open_store(options.root), workflow.stages())
    found = bars(finished.values())
    if not found:
        raise ValueError(f"no stage of {workflow.name} is finished in {options.root}")
    for line in lines(found):
        print(line)


def _print_record(workflow: Workflow, options: argparse.Namespace) -> None:
    from pipeline.durable import graph
    from pipeline.durable import record as records
    from pipeline.store import open_store
    from workflows.renamed import former

    stages = workflow.stages()
    names = [stage.name for stage in stages]
    if options.stage not in names:
        raise ValueError(
            f"{workflow.name} has no stage {options.stage!r}; it has {', '.join(names)}"
        )
    store = open_store(options.root)
    terminal.note(former(workflow, options.changes, store))
    record = records.load(store, options.stage, graph.fingerprints(stages)[options.stage])
    if record is None:
        raise ValueError(
            f"stage {options.stage} is not finished in {options.root}; "
            f"run it with `adsc run {workflow.name} --root {options.root}`"
        )
    print(record.uri if options.path else json.dumps(record.model_dump(), indent=1))
