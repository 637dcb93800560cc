"""What a job does on a cluster's head before it is the same `adsc run` as anywhere:

    python -m workflows.jobs '{"root": ..., "expected": ...}' run demo

The commands that submit jobs and look at them are in workflows/commands/cluster/submit.py.
"""

import json
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn


def drive(arguments: Sequence[str]) -> int:
    """On the cluster's head: look at every node, then run the workflow."""
    from pipeline.cluster import preflight
    from pipeline.durable.session import ray_for
    from pipeline.durable.stage import RunContext
    from pipeline.store import open_store
    from workflows.commands import main as cli

    given = json.loads(arguments[0])
    try:
        # All that is imported before every node was asked is imported before Ray knows of us: where
        # two nodes share a machine, the other one unpacks this code once more under our feet.
        open_store(given["root"])
        with ray_for(RunContext(root=given["root"], workflow="", address="auto")):
            signal.signal(signal.SIGTERM, _interrupt)  # Ray has set a handler of its own by now
            for node, said in preflight.check(given["root"], given["expected"]).items():
                print(f"node {node}: {said}")
            return cli.main(arguments[1:])
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        print(f"adsc: {error}", file=sys.stderr)
        return 2


def _interrupt(*_: object) -> NoReturn:
    """A job that is stopped ends like a command on which somebody pressed Ctrl-C."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(drive(sys.argv[1:]))
