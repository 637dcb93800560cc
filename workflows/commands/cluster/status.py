"""`adsc status`: the jobs of a cluster, or one with its stages."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from workflows.commands import terminal
from workflows.commands.options import add_job_server

EXAMPLES = """examples:
  adsc status --address http://head:8265                   (all jobs of adsc)
  adsc status --address http://head:8265 adsc-demo-1f0c2ab94d3e-1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job_server(parser)
    parser.add_argument("job", nargs="?", help="a job's id (default: list all jobs)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print jobs, or a job and its stages."""
    from pipeline.cluster.jobs import adsc_jobs, connected, job_details

    with connected(options.address) as client:
        jobs = [job_details(client, options.job)] if options.job else adsc_jobs(client)
        rows = [_row(job) for job in jobs]
    if options.job:
        rows[0]["message"] = jobs[0].message or ""
        rows[0] |= _progress(jobs[0].metadata or {})
    if options.json:
        print(json.dumps(rows[0] if options.job else rows))
        return 0
    names = ("job", "status", "started", "minutes", "root")
    terminal.print_rows(names, *([row[name] for name in names] for row in rows))
    if options.job:
        print(rows[0]["message"])
        if rows[0]["mlflow"]:
            print(rows[0]["mlflow"])
        for name, state in rows[0]["stages"].items():
            print(f"  {name}  {state}")
    return 0


def _row(job: Any) -> dict[str, Any]:
    started = (job.start_time or 0) / 1000
    ended = (job.end_time / 1000) if job.end_time else time.time()
    return {
        "job": job.submission_id,
        "status": str(job.status.value),
        "started": datetime.fromtimestamp(started).astimezone().isoformat(timespec="seconds"),
        "minutes": round((ended - started) / 60, 1),
        "root": (job.metadata or {}).get("root", ""),
    }


def _progress(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The states of a job's stages and the address of its MLflow run, as far as its store can be
    read from here. A run has an address once one of its stages has finished."""
    from pipeline.durable import graph
    from pipeline.durable.record import workflow_run
    from pipeline.store import open_store
    from pipeline.tracking.address import page_address
    from workflows.registry import load_workflow

    try:
        stages = load_workflow(metadata["workflow"], json.loads(metadata["changes"])).stages()
        states = graph.state(open_store(metadata["root"]), stages)
        run = workflow_run(state.record for state in states if state.record)
    except (KeyError, ValueError) as error:
        return {"stages": {"stages": f"can't be read from here: {error}"}, "mlflow": ""}
    return {
        "stages": {state.name: state.state for state in states},
        "mlflow": page_address(metadata.get("mlflow", ""), run),
    }
