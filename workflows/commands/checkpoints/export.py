"""`adsc export`: publish a checkpoint at an address, as the stage `export` does.

The work is done in pipeline/publishing/publish.py.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workflows.commands import terminal
from workflows.commands.checkpoints.transfers import bar, print_summary
from workflows.commands.options import add_json

EXAMPLES = """examples:
  adsc export "$(adsc show demo export --path)" s3://models/tiny-llava
  adsc export compressed s3://models/mine --base llava-hf/llava-1.5-7b-hf --licence llama2
  adsc export CHECKPOINT s3://models/mine --encryption aws:kms --kms-key ARN --tag team=vision
  adsc export CHECKPOINT /mnt/models/mine

CHECKPOINT is the folder of an export stage, or any folder written by save_pretrained, which gets a
card, a probe and a manifest first. It is uploaded, loaded back from there in a fresh process, and
becomes visible only then. Rerun the same command to resume after a kill; once done, it is a no-op.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a folder")
    parser.add_argument(
        "address", help="s3://bucket/prefix, or a folder, for this checkpoint alone"
    )
    parser.add_argument("--name", help="name on its card (default: the last part of the address)")
    parser.add_argument("--base", default="", help="name of the base model, for the card")
    parser.add_argument(
        "--licence", default="", help="licence id of the base, for the card: apache-2.0"
    )
    parser.add_argument(
        "--encryption", default="", choices=("AES256", "aws:kms"), help="encryption on S3"
    )
    parser.add_argument("--kms-key", default="", metavar="ARN", help="key for aws:kms")
    parser.add_argument(
        "--tag", action="append", default=[], metavar="KEY=VALUE",
        help="S3 tag of every object; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance",
        type=terminal.number(float, least=0),
        metavar="SHARE",
        help="largest allowed difference of a logit (default: 1e-4 of the largest logit)",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Publish it, and load it back from there in a fresh process."""
    from pydantic import ValidationError

    from pipeline.kinds.export import ExportConfig
    from pipeline.publishing.publish import publish
    from pipeline.stages.export import check_in_fresh_process

    tags = dict(_pair(text) for text in options.tag)
    name = options.name or options.address.rstrip("/").rpartition("/")[2]
    given = {} if options.tolerance is None else {"tolerance": options.tolerance}
    try:
        config = ExportConfig(
            name=name, base=options.base, licence=options.licence, to=options.address,
            encryption=options.encryption, kms_key=options.kms_key, tags=tags, **given,
        )  # fmt: skip
    except ValidationError as error:
        problems = [it["msg"].removeprefix("Value error, ") for it in error.errors()]
        raise ValueError("; ".join(problems)) from None
    with _complete(options.checkpoint, config) as folder, bar(options.json) as report:
        done = publish(
            folder, config.store(), lambda copy: check_in_fresh_process(copy, config), report
        )
    text = f"{done.moved} files uploaded" if done.probe else "already published: nothing to do"
    print_summary(options, done, text)
    return 0


@contextlib.contextmanager
def _complete(checkpoint: Path, config: Any) -> Iterator[Path]:
    """The folder, if an export stage wrote it; else a copy with probe, card and manifest."""
    from pipeline.publishing.manifest import MANIFEST
    from pipeline.stages.export import complete

    if (checkpoint / MANIFEST).is_file():
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="adsc-export-") as scratch:
        complete(checkpoint, Path(scratch), config)
        yield Path(scratch)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ValueError(f"--tag {text!r} is not KEY=VALUE, such as team=vision")
    return key, value
