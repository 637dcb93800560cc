"""The command `python -m workflows.evidence`: the evidence on one machine, without Ray.

Only parsing stands here; workflows/evidence_here.py runs the arms.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.config import edit
from workflows import evidence_here
from workflows.evidence import EvidenceConfig, evidence_576_config, evidence_config
from workflows.stamps import stamps_config


def scales() -> dict[str, Callable[[], EvidenceConfig]]:
    """What `--scale` takes."""
    return {"demo": evidence_config, "576": evidence_576_config, "stamps": stamps_config}


def main(words: list[str] | None = None) -> int:
    """The command: 0 when every arm has been run."""
    parser = argparse.ArgumentParser(
        prog="workflows.evidence", description="the evidence on one machine, without Ray"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of all that is made")
    parser.add_argument("--scale", choices=tuple(scales()), default="demo")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the config"
    )
    parser.add_argument("--processes", type=int, default=1, help="arms at a time, on one device")
    parser.add_argument("--arms", nargs="+", help="only these, by name")
    parser.add_argument("--base-only", action="store_true", help="make base and data, no arm")
    parser.add_argument(
        "--stop-after", type=float, default=float("inf"), help="begin no arm after these seconds"
    )
    given = parser.parse_args(words)
    try:
        config = edit(scales()[given.scale](), dict(one.split("=", 1) for one in given.set))
        return evidence_here.run(
            config,
            given.out,
            processes=given.processes,
            only=given.arms,
            base_only=given.base_only,
            stop_after=given.stop_after,
        )
    except ValueError as error:
        sys.stderr.write(f"evidence: {error}\n")
        return 2
