"""`adsc pull`: copy a published checkpoint into a folder and verify it; the work is done in
pipeline/publishing/publish.py."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from workflows.commands.checkpoints.transfers import bar, print_summary
from workflows.commands.options import add_json

EXAMPLES = """examples:
  adsc pull s3://models/tiny-llava tiny-llava
  adsc pull s3://models/tiny-llava tiny-llava --expect 3f0c...  (the manifest's SHA-256, as printed
                                                                 by `adsc export` and in MLflow)
  adsc pull s3://models/tiny-llava tiny-llava --check           (load it, compare its logits)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", help="s3://bucket/prefix, or any address that fsspec knows")
    parser.add_argument("folder", type=Path, metavar="DIR", help="target; created if missing")
    parser.add_argument(
        "--expect", default="", metavar="SHA256", help="expected digest of its manifest"
    )
    parser.add_argument(
        "--check", action="store_true", help="load it in a fresh process and compare its logits"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Fetch and verify it; with `--check` load it in a fresh process."""
    from pipeline.kinds.export import ExportConfig
    from pipeline.publishing.publish import pull
    from pipeline.stages.export import check_in_fresh_process
    from pipeline.store import open_store

    with bar(options.json) as report:
        done = pull(open_store(options.address), options.folder, options.expect, report)
        if options.check:
            report(1, 1, "loading it in a fresh process")
            probe = check_in_fresh_process(options.folder, ExportConfig())
            done = dataclasses.replace(done, probe=probe)
    print_summary(options, done, f"{done.moved} files fetched to {options.folder}, all verified")
    return 0
