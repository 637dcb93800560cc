"""Options that several commands share: the workflow, the store, workers and Ray."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflows.commands import terminal
from workflows.registry import WORKFLOWS

if TYPE_CHECKING:
    from pipeline.durable.stage import RunContext

DEFAULT_ROOT = "runs"


def positive(kind: type) -> Callable[[str], Any]:
    """An argparse type: a finite number above zero."""
    return terminal.number(kind, above=0)


def add_workflow(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """A workflow's name, changes to its config, and the store."""
    parser.add_argument("workflow", nargs="?" if optional else None, help=", ".join(WORKFLOWS))
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="changes",
        help="change a config key; repeatable",
    )
    add_root(parser)


def add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root",
        default=os.environ.get("ADSC_ROOT") or DEFAULT_ROOT,
        help="the store: a folder or s3://bucket/prefix (default: $ADSC_ROOT or runs)",
    )


def add_ray(parser: argparse.ArgumentParser) -> None:
    """The Ray cluster to use."""
    parser.add_argument("--address", help="an existing Ray cluster (default: Ray on this machine)")
    parser.add_argument(
        "--dashboard-port",
        type=terminal.number(int, above=0, most=65535),
        help="port of the embedded Ray's dashboard",
    )


def add_job_server(parser: argparse.ArgumentParser) -> None:
    """The job server of a cluster."""
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS"),
        help="the cluster's dashboard, http://HEAD:8265 (default: $RAY_API_SERVER_ADDRESS)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Workers and tracking: they don't change what is computed."""
    parser.add_argument(
        "--mlflow", metavar="URI", help="MLflow server, or off (default: SQLite in the root)"
    )
    parser.add_argument(
        "--workers",
        type=_workers,
        default=1,
        help="workers for training and evaluation; 2-8 uses as many as the cluster has (1)",
    )
    parser.add_argument("--cpus", type=positive(float), default=1, help="CPU cores per worker (1)")
    parser.add_argument(
        "--gpus", type=terminal.number(float, least=0), default=0, help="GPUs per worker (0)"
    )
    parser.add_argument(
        "--data-workers", type=_count, default=0, metavar="N",
        help="processes per training worker that build batches (default: a thread in the worker)",
    )  # fmt: skip
    parser.add_argument(
        "--lease",
        type=positive(float),
        default=20,
        help="seconds until another run takes over from a dead one (20)",
    )


def _count(text: str) -> int:
    """An argparse type: a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _workers(text: str) -> int | tuple[int, int]:
    """An argparse type: `4`, or `2-8` for as many as the cluster has."""
    fewest, dash, most = text.partition("-")
    if not dash:
        return positive(int)(text)  # type: ignore[no-any-return]
    bounds = positive(int)(fewest), positive(int)(most)
    if bounds[0] > bounds[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: give the smaller number first, as in 2-8")
    return bounds


def run_context(
    options: argparse.Namespace,
    workflow: str,
    parameters: Mapping[str, str] | None = None,
    setup: str | None = None,
) -> RunContext:
    """The context of a run of that workflow, from the options of `add_root`, `add_workers` and
    `add_ray`.

    Args:
        parameters: what its runs are compared by (`Workflow.parameters`).
        setup: as in `Workflow.setup`.
    """
    from pipeline.durable.stage import RunContext
    from pipeline.store import open_store
    from pipeline.tracking.address import chosen, default_uri

    place = open_store(options.root).local("")
    tracking = chosen(options.mlflow)
    return RunContext(
        root=options.root,
        workflow=workflow,
        tracking_uri=None
        if tracking == "off"
        else tracking or default_uri(place or Path(DEFAULT_ROOT)),
        parameters=parameters or {},
        command=options.command,
        setup=setup,
        num_workers=options.workers,
        cpus_per_worker=options.cpus,
        gpus_per_worker=options.gpus,
        data_workers=options.data_workers,
        lease_seconds=options.lease,
        address=options.address,
        dashboard_port=options.dashboard_port,
    )
