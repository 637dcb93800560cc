"""`adsc cancel`: stop a job; submit it again to resume."""

from __future__ import annotations

import argparse
import time

from workflows.commands.options import add_job_server

EXAMPLES = """examples:
  adsc cancel --address http://head:8265 adsc-demo-1f0c2ab94d3e-1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job_server(parser)
    parser.add_argument("job", help="a job's id")


def run(options: argparse.Namespace) -> int:
    """Stop it and wait until it has ended."""
    from pipeline.cluster.jobs import ENDED, STOP_SECONDS, JobFailed, connected, job_details

    with connected(options.address) as client:
        status = str(job_details(client, options.job).status.value)
        if status in ENDED:
            print(f"{options.job} has ended already: {status}")
            return 0
        client.stop_job(options.job)
        deadline = time.monotonic() + STOP_SECONDS + 30
        while (status := str(job_details(client, options.job).status.value)) not in ENDED:
            if time.monotonic() > deadline:
                raise JobFailed(f"{options.job} is still {status}; check again with `adsc status`")
            time.sleep(0.5)
    print(f"{options.job} {status}; rerun the same `adsc submit` to resume")
    return 0
