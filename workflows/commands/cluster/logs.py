"""`adsc logs`: print the output of a job, once or until it ends."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from workflows.commands.options import add_job_server

EXAMPLES = """examples:
  adsc logs --address http://head:8265 adsc-demo-1f0c2ab94d3e-1
  adsc logs --address http://head:8265 --follow            (the newest job)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job_server(parser)
    parser.add_argument("job", nargs="?", help="a job's id (default: the newest)")
    parser.add_argument("--follow", action="store_true", help="follow until the job ends")


def run(options: argparse.Namespace) -> int:
    """Print the log."""
    from pipeline.cluster.jobs import JobError, adsc_jobs, connected, job_details

    with connected(options.address) as client:
        job = options.job
        if not job:
            jobs = adsc_jobs(client)
            if not jobs:
                raise JobError(f"there are no jobs of adsc at {options.address}")
            job = jobs[-1].submission_id
        if options.follow:
            return follow_job(client, job, options.address)
        job_details(client, job)
        print(client.get_job_logs(job), end="")
    return 0


def follow_job(client: Any, job: str, address: str) -> int:
    """Print a job's output until it ends; Ctrl-C leaves the job running.

    Raises:
        JobFailed: it ended without success.
    """
    from pipeline.cluster.jobs import JobFailed, follow, job_details

    def write(text: str) -> None:
        print(text, end="", flush=True)

    try:
        status = follow(client, job, write)
    except KeyboardInterrupt:
        target = f"--address {address} {job}"
        print(
            f"\nadsc: the job is still running. Follow it again with "
            f"`adsc logs --follow {target}`, stop it with `adsc cancel {target}`",
            file=sys.stderr,
        )
        return 130
    if status != "SUCCEEDED":
        message = job_details(client, job).message or ""
        raise JobFailed(f"{job} {status}: {message.strip().splitlines()[0] if message else ''}")
    return 0
