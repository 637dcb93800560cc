"""The driver of a job: checks every node of the cluster, then runs the same `adsc run` as anywhere.

    python -m workflows.jobs '{"root": ..., "expected": ...}' run demo

The commands that submit and inspect jobs are in workflows/commands/cluster.
"""

import json
import sys
from collections.abc import Sequence


def drive(arguments: Sequence[str]) -> int:
    """On the cluster's head: check every node, then run the workflow."""
    from pipeline.cluster import preflight
    from pipeline.durable.session import ray_for
    from pipeline.durable.stage import RunContext
    from pipeline.store import open_store
    from workflows.commands import main as cli

    given = json.loads(arguments[0])
    try:
        # Import everything the check needs before Ray connects: where two nodes share a machine,
        # the other node unpacks this code again and replaces the files.
        open_store(given["root"])
        with ray_for(RunContext(root=given["root"], workflow="", address="auto")):
            for node, result in preflight.check(given["root"], given["expected"]).items():
                print(f"node {node}: {result}")
            return cli.main(arguments[1:])
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        print(f"adsc: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(drive(sys.argv[1:]))
