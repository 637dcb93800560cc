"""`adsc chat`: ask an exported checkpoint about a picture."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from workflows.commands.options import positive

EXAMPLES = """examples:
  adsc chat CHECKPOINT grid.png "where is the bag?"
  adsc chat ELASTIC grid.png --plan 64
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="exported checkpoint: a folder or s3://...")
    parser.add_argument("image", help="a picture: a file or s3://...")
    parser.add_argument(
        "question", nargs="*", default=[], help="default: read questions from stdin, one a line"
    )
    parser.add_argument(
        "--plan",
        help="a named plan of the checkpoint, dense, or a plan such as 2:1/4 (default: its own)",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive(int), default=64, help="longest answer in tokens (64)"
    )


def run(options: argparse.Namespace) -> int:
    """Answer one question, or one per line of stdin."""
    picture = _read_picture(options.image)
    from transformers import AutoProcessor

    import adsc
    from pipeline.evaluation.generation import Question, generate_answers
    from workflows import stamps_tower

    stamps_tower.register()
    with _local_folder(options.checkpoint) as folder:
        model = adsc.from_pretrained(folder, plan=options.plan).eval()
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    questions = [" ".join(options.question)] if options.question else map(str.strip, sys.stdin)
    for text in filter(None, questions):
        question = Question("chat", "chat", text, "", (picture,))
        print(generate_answers(model, processor, [question], 1, options.max_new_tokens)[0])
    return 0


def _read_file(path: str) -> bytes:
    from pipeline.store import open_store, split

    folder, name = split(path)
    data = open_store(folder).read(name)
    if data is None:
        raise ValueError(f"there is no picture {path!r}")
    return data


def _read_picture(path: str) -> bytes:
    from pipeline.data.config import PrepareConfig
    from pipeline.data.pictures import check_picture

    picture = _read_file(path)
    check_picture(picture, path, PrepareConfig(min_side=1).limits())
    return picture


@contextlib.contextmanager
def _local_folder(place: str) -> Iterator[Path]:
    """A checkpoint's folder; one in a remote store is downloaded for the duration of a `with`."""
    from pipeline.store import open_store

    store = open_store(place)
    if not store.list(""):
        raise ValueError(
            f"there is no checkpoint at {place!r}; `adsc show demo export --path` prints the path "
            "of the demo's"
        )
    local = store.local("")
    if local is not None:
        yield local
        return
    from pipeline.publishing.manifest import MANIFEST
    from pipeline.publishing.publish import pull

    with tempfile.TemporaryDirectory(prefix="adsc-chat-") as scratch:
        if store.read(MANIFEST) is None:
            store.download("", Path(scratch))
        else:
            pull(store, Path(scratch))
        yield Path(scratch)
