"""`adsc ls`: the workflows, or the stages of one with their state and path."""

from __future__ import annotations

import argparse
import json

from workflows.commands import terminal
from workflows.commands.options import add_workflow
from workflows.registry import WORKFLOWS, load_workflow

EXAMPLES = """examples:
  adsc ls                     (the workflows)
  adsc ls demo                (each stage: its state and path)
  adsc ls demo --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workflow(parser, optional=True)
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def run(options: argparse.Namespace) -> int:
    """List workflows, or the stages of one."""
    if options.workflow is None:
        _list_workflows(options.json)
    else:
        _list_stages(options)
    return 0


def _list_workflows(as_json: bool) -> None:
    if as_json:
        rows = [{"name": name, "title": listed.title} for name, listed in WORKFLOWS.items()]
        print(json.dumps(rows))
        return
    titles = ((name, listed.title) for name, listed in WORKFLOWS.items())
    terminal.print_rows(("workflow", "description"), *titles)


def _list_stages(options: argparse.Namespace) -> None:
    from pipeline.durable import graph
    from pipeline.durable.session import send_pending
    from pipeline.durable.stage import RunContext
    from pipeline.store import open_store
    from pipeline.tracking.address import chosen
    from workflows.renamed import former

    workflow = load_workflow(options.workflow, options.changes)
    store = open_store(options.root)
    terminal.note(former(workflow, options.changes, store))
    states = graph.state(store, workflow.stages())
    if options.json:
        print(json.dumps([state.row for state in states]))
        return
    terminal.print_rows(("name", "state", "path"), *(state.row.values() for state in states))
    if unsent := send_pending(options.root, chosen(None), RunContext.cache):
        print(unsent)
