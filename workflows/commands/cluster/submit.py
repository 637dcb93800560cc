"""`adsc submit`: run a workflow on a Ray cluster as a job; workflows/jobs.py is its driver."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from workflows.commands import terminal
from workflows.commands.cluster.logs import follow_job
from workflows.commands.options import add_job_server, add_workers, add_workflow

if TYPE_CHECKING:
    from pipeline.durable.workflow import Workflow

DRIVER = "workflows.jobs"
"""The module that runs on the cluster's head."""
PACKAGES = ("adsc", "pipeline", "workflows")
"""The packages uploaded with a job."""

EXAMPLES = """examples:
  adsc submit demo --address http://head:8265 --root s3://bucket/adsc --mlflow http://mlflow:5000
  adsc submit demo --address http://head:8265 --root s3://bucket/adsc --mlflow off --no-follow
  adsc submit demo --address http://head:8265 --root /mnt/shared/adsc --shared-root --workers 8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job_server(parser)
    add_workflow(parser)
    add_workers(parser)
    parser.add_argument(
        "--shared-root", action="store_true", help="--root is a folder that every node mounts"
    )
    parser.add_argument("--no-follow", action="store_true", help="print the job's id and return")
    parser.add_argument(
        "--python", default="python", help="Python interpreter on the cluster (python)"
    )
    parser.add_argument(
        "--any-versions", action="store_true", help="allow nodes with other package versions"
    )


def run(options: argparse.Namespace) -> int:
    """Submit it and follow its output."""
    from pipeline.cluster.jobs import connected, plan_submission, start
    from pipeline.tracking.address import chosen
    from workflows.registry import load_workflow

    workers = options.workers if isinstance(options.workers, tuple) else (options.workers,)
    words = [
        f"--workers={'-'.join(map(str, workers))}",
        f"--cpus={options.cpus}",
        f"--gpus={options.gpus}",
    ]
    workflow = load_workflow(options.workflow, options.changes)
    submission = plan_submission(
        workflow,
        options.changes,
        options.root,
        shared_root=options.shared_root,
        mlflow=chosen(options.mlflow),
        options=[*words, f"--data-workers={options.data_workers}", f"--lease={options.lease}"],
        python=options.python,
        any_versions=options.any_versions,
        driver=DRIVER,
        packages=PACKAGES,
    )
    if _finished(workflow, options.root):
        return 0
    with connected(options.address) as client:
        job, new = start(client, submission)
        print(job, flush=True)
        if not new:
            print(
                "adsc: this workflow is already running there, with the options of that job",
                file=sys.stderr,
            )
        if options.no_follow:
            return 0
        return follow_job(client, job, options.address)


def _finished(workflow: Workflow, root: str) -> bool:
    """Whether every stage is finished, as far as this machine can read the store: a job would take
    most of a minute to find nothing to do. Prints where the results are."""
    from pipeline.durable import graph
    from pipeline.store import StoreError, open_store

    stages = workflow.stages()
    try:
        store = open_store(root)
        if len(graph.finished(store, stages)) < len(stages):
            return False  # without waiting for the heartbeats of a job that runs
        states = graph.state(store, stages)
    except StoreError:  # the cluster's nodes may have access that this machine lacks
        return False
    if any(state.state != "cached" for state in states):
        return False
    terminal.print_rows(("name", "state", "path"), *(state.row.values() for state in states))
    print("every stage is finished: nothing was submitted")
    return True
