"""A driver process: runs the toy pipeline and prints the attempts that its records name.

python -m tests.pipeline.durable.drive '{"root": ..., "log": ..., "changes": {}, "context": {}}'
"""

from __future__ import annotations

import json
import sys

from rich.console import Console

from pipeline.durable import graph
from tests.pipeline.durable import toy


def main(job: dict) -> None:
    found = graph.run(
        toy.stages(job["log"], **job.get("changes", {})),
        toy.context(job["root"], **job.get("context", {})),
        Console(file=sys.stderr),
    )
    attempts = {name: record.attempt for name, record in found.items()}
    loaded = "ray" in sys.modules
    sys.stdout.write(json.dumps({"attempts": attempts, "ray": loaded}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
