"""The commands that run workflows on a cluster: `adsc submit | status | logs | cancel`.

Only parsing and printing stand here; what a job does on the cluster's head is workflows/jobs.py's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from workflows.commands.terminal import add_command

DRIVER = "workflows.jobs"
"""The module that runs on the cluster's head."""
PACKAGES = ("adsc", "pipeline", "workflows")
"""What travels with a job."""

SUBMIT_EXAMPLES = """examples:
  adsc submit demo --address http://head:8265 --root s3://bucket/adsc --mlflow http://mlflow:5000
  adsc submit demo --address http://head:8265 --root s3://bucket/adsc --mlflow off --no-follow
  adsc submit demo --address http://head:8265 --root /mnt/shared/adsc --shared-root --workers 8
"""
STATUS_EXAMPLES = """examples:
  adsc status --address http://head:8265                   (all jobs of adsc)
  adsc status --address http://head:8265 adsc-demo-1f0c2ab94d3e-1
"""
LOGS_EXAMPLES = """examples:
  adsc logs --address http://head:8265 adsc-demo-1f0c2ab94d3e-1
  adsc logs --address http://head:8265 --follow            (the newest job)
"""
CANCEL_EXAMPLES = """examples:
  adsc cancel --address http://head:8265 adsc-demo-1f0c2ab94d3e-1
"""


def add_commands(
    subparsers: Any, add_run_options: Callable[[argparse.ArgumentParser], None]
) -> None:
    """Add `submit`, `status`, `logs` and `cancel`; `add_run_options` adds what `run` takes too."""

    def command(name: str, help_text: str, examples: str) -> argparse.ArgumentParser:
        parser = add_command(subparsers, name, help_text, examples)
        parser.add_argument(
            "--address",
            default=os.environ.get("RAY_API_SERVER_ADDRESS"),
            help="the cluster's dashboard, http://HEAD:8265 (default: $RAY_API_SERVER_ADDRESS)",
        )
        return parser

    submit = command("submit", "run a workflow on a Ray cluster, as a job", SUBMIT_EXAMPLES)
    add_run_options(submit)
    submit.add_argument(
        "--shared-root", action="store_true", help="--root is a folder that every node mounts"
    )
    submit.add_argument("--no-follow", action="store_true", help="print the job's id and return")
    submit.add_argument(
        "--python", default="python", help="Python of the cluster's environment (python)"
    )
    submit.add_argument(
        "--any-versions", action="store_true", help="don't compare package versions with the nodes'"
    )
    submit.set_defaults(run=_submit)
    status = command("status", "jobs of a cluster, or one job and its stages", STATUS_EXAMPLES)
    status.add_argument("job", nargs="?", help="a job's id; without one all are listed")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(run=_status)
    logs = command("logs", "what a job printed", LOGS_EXAMPLES)
    logs.add_argument("job", nargs="?", help="a job's id (default: the newest)")
    logs.add_argument("--follow", action="store_true", help="go on until the job ends")
    logs.set_defaults(run=_logs)
    cancel = command(
        "cancel", "stop a job; submitting it again goes on from there", CANCEL_EXAMPLES
    )
    cancel.add_argument("job", help="a job's id")
    cancel.set_defaults(run=_cancel)


def _submit(options: argparse.Namespace) -> int:
    from pipeline.cluster.jobs import connected, plan_submission, start
    from pipeline.tracking.address import chosen
    from workflows.registry import load_workflow

    workers = options.workers if isinstance(options.workers, tuple) else (options.workers,)
    words = [
        f"--workers={'-'.join(map(str, workers))}",
        f"--cpus={options.cpus}",
        f"--gpus={options.gpus}",
    ]
    submission = plan_submission(
        load_workflow(options.workflow, options.changes),
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
    with connected(options.address) as client:
        job, new = start(client, submission)
        print(job, flush=True)
        if not new:
            print("adsc: this very work runs there already, with its own options", file=sys.stderr)
        if options.no_follow:
            return 0
        return _followed(client, job, options.address)


def _followed(client: Any, job: str, address: str) -> int:
    from pipeline.cluster.jobs import JobFailed, follow, found

    def write(text: str) -> None:
        print(text, end="", flush=True)

    try:
        status = follow(client, job, write)
    except KeyboardInterrupt:
        more = f"--address {address} {job}"
        print(
            f"\nadsc: the job goes on. `adsc logs --follow {more}` looks again, "
            f"`adsc cancel {more}` stops it",
            file=sys.stderr,
        )
        return 130
    if status != "SUCCEEDED":
        message = found(client, job).message or ""
        raise JobFailed(f"{job} {status}: {message.strip().splitlines()[0] if message else ''}")
    return 0


def _status(options: argparse.Namespace) -> int:
    from pipeline.cluster.jobs import connected, found, ours

    with connected(options.address) as client:
        jobs = [found(client, options.job)] if options.job else ours(client)
        rows = [_row(job) for job in jobs]
    if options.job:
        rows[0]["message"] = jobs[0].message or ""
        rows[0]["stages"] = _stages(jobs[0].metadata or {})
    if options.json:
        print(json.dumps(rows[0] if options.job else rows))
        return 0
    names = ("job", "status", "started", "minutes", "root")
    lines = [names, *(tuple(row[name] for name in names) for row in rows)]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join(cells).rstrip())
    if options.job:
        print(rows[0]["message"])
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


def _stages(metadata: Mapping[str, str]) -> dict[str, str]:
    """The states of a job's stages, as far as its store can be read from here."""
    from pipeline.durable import graph
    from pipeline.store import open_store
    from workflows.registry import load_workflow

    try:
        workflow = load_workflow(metadata["workflow"], json.loads(metadata["changes"]))
        states = graph.state(open_store(metadata["root"]), workflow.stages())
    except (KeyError, ValueError) as error:
        return {"stages": f"can't be read from here: {error}"}
    return {state.name: state.state for state in states}


def _logs(options: argparse.Namespace) -> int:
    from pipeline.cluster.jobs import JobError, connected, found, ours

    with connected(options.address) as client:
        jobs = ours(client)
        if not options.job and not jobs:
            raise JobError(f"there are no jobs of adsc at {options.address}")
        job = options.job or jobs[-1].submission_id
        found(client, job)
        if options.follow:
            return _followed(client, job, options.address)
        print(client.get_job_logs(job), end="")
    return 0


def _cancel(options: argparse.Namespace) -> int:
    from pipeline.cluster.jobs import ENDED, STOP_SECONDS, JobFailed, connected, found

    with connected(options.address) as client:
        status = str(found(client, options.job).status.value)
        if status in ENDED:
            print(f"{options.job} has ended already: {status}")
            return 0
        client.stop_job(options.job)
        deadline = time.monotonic() + STOP_SECONDS + 30
        while (status := str(found(client, options.job).status.value)) not in ENDED:
            if time.monotonic() > deadline:
                raise JobFailed(f"{options.job} is still {status}; ask again with `adsc status`")
            time.sleep(0.5)
    print(f"{options.job} {status}; the same `adsc submit` goes on from what is finished")
    return 0
