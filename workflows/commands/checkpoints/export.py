"""`adsc export`: publish a checkpoint at an address, as the stage `export` does.

What it does stands in pipeline/publishing/publish.py.
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

CHECKPOINT is the folder of an export stage, or any folder that save_pretrained made: that one gets
a card, a probe and a manifest first. It is uploaded, loaded back from there in a fresh process, and
only then can be seen. The same command goes on after a kill, and is a no-op once it is done.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a folder")
    parser.add_argument("address", help="s3://bucket/prefix, or a folder; for this one checkpoint")
    parser.add_argument("--name", help="on its card (default: the address's last part)")
    parser.add_argument("--base", default="", help="what the base is called, for the card")
    parser.add_argument("--licence", default="", help="of the base, as hubs write it: apache-2.0")
    parser.add_argument("--encryption", default="", choices=("AES256", "aws:kms"), help="on S3")
    parser.add_argument("--kms-key", default="", metavar="ARN", help="for aws:kms")
    parser.add_argument(
        "--tag", action="append", default=[], metavar="KEY=VALUE", help="of each object; repeatable"
    )
    parser.add_argument(
        "--tolerance",
        type=terminal.number(float, least=0),
        metavar="SHARE",
        help="largest difference of a logit (default: 1e-4 of the largest)",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Publish it, loaded back from there in a fresh process."""
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
    with _whole(options.checkpoint, config) as folder, bar(options.json) as report:
        done = publish(
            folder, config.store(), lambda copy: check_in_fresh_process(copy, config), report
        )
    text = f"{done.moved} files sent" if done.probe else "it was there already: nothing was done"
    print_summary(options, done, text)
    return 0


@contextlib.contextmanager
def _whole(checkpoint: Path, config: Any) -> Iterator[Path]:
    """The folder, if an export stage made it; else a copy with probe, card and manifest."""
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
