"""`adsc doctor`: check this machine or a cluster (pipeline/cluster/doctor.py)."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING

from workflows.commands import terminal
from workflows.commands.options import add_json, add_ray, add_root

if TYPE_CHECKING:
    from pipeline.cluster.doctor import Finding

EXAMPLES = """examples:
  adsc doctor                                        (this machine, with the store in runs)
  adsc doctor --root s3://bucket/adsc --mlflow http://mlflow:5000
  adsc doctor --address HEAD:6379 --cluster --root s3://bucket/adsc       (on every node)

The exit code is 1 if something that a workflow needs is missing.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_root(parser)
    add_ray(parser)
    parser.add_argument(
        "--mlflow", metavar="URI", help="MLflow server, or off (default: SQLite in the root)"
    )
    parser.add_argument(
        "--cluster", action="store_true", help="also check every node of the Ray cluster"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Check this machine, and with `--cluster` every node; returns 1 if something is missing."""
    from pipeline.cluster.doctor import examine, examine_driver
    from pipeline.tracking.address import TrackingError, chosen, default_uri

    tracking = chosen(options.mlflow)
    if tracking is None:
        try:
            tracking = default_uri(options.root if "://" not in options.root else "runs")
        except TrackingError as error:
            tracking = str(error)
    address = options.address or os.environ.get("RAY_ADDRESS")
    here = [
        *examine(options.root, ""),
        *examine_driver(address, None if tracking == "off" else tracking, options.dashboard_port),
    ]
    found = {"this machine": here}
    if options.cluster and not any(it.what == "Ray" and it.state == "missing" for it in here):
        found |= _nodes(options)
    missing = sum(it.state == "missing" for each in found.values() for it in each)
    if options.json:
        print(json.dumps({name: [it._asdict() for it in each] for name, each in found.items()}))
    else:
        _print(found, missing)
    return 1 if missing else 0


def _nodes(options: argparse.Namespace) -> dict[str, list[Finding]]:
    from pipeline.cluster.doctor import examine_nodes
    from pipeline.durable.session import ray_for
    from pipeline.durable.stage import RunContext

    context = RunContext(root=options.root, workflow="doctor", address=options.address)
    with ray_for(context):
        return examine_nodes(options.root, context.cache)


def _print(found: dict[str, list[Finding]], missing: int) -> None:
    console = terminal.console()
    for name, each in found.items():
        table = terminal.table("", "", "found", "what to do", title=name)
        for it in each:
            table.add_row(it.what, it.state, it.found, it.way_out)
        console.print(table, markup=False)
    console.print(
        f"{missing} missing: see the last column" if missing else "Nothing is missing.",
        markup=False,
    )
