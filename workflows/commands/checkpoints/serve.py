"""The command `adsc serve`: its arguments. The work is done in workflows/serving.py.

Options not listed here are passed to vLLM's server unchanged.
"""

from __future__ import annotations

import argparse

from workflows.commands import terminal

EXAMPLES = """examples:
  adsc serve "$(adsc show demo export --path)"
  adsc serve s3://models/tiny-llava --port 8001
  adsc serve models:/llava-compressed@champion --max-model-len 4096
  adsc serve ELASTIC --plan 64 --gpu-memory-utilization 0.8

CHECKPOINT comes first; options not listed here are passed to vLLM. The server speaks the OpenAI
API at http://HOST:PORT/v1. It needs vLLM, in a separate environment: docs/serving.md.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", help="a folder, a hub id, s3://bucket/prefix or models:/name@alias"
    )
    parser.add_argument(
        "--plan",
        help="a named plan of the checkpoint, dense, or a plan such as 2:1/4 (default: its own)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)"
    )
    parser.add_argument(
        "--port",
        type=terminal.number(int, above=0, most=65535),
        default=8000,
        help="port to listen on (8000)",
    )
    parser.add_argument(
        "--expect", default="", metavar="SHA256", help="expected digest of a fetched manifest"
    )
    parser.add_argument(
        "--mlflow", metavar="URI", help="for models:/, default: $MLFLOW_TRACKING_URI"
    )


def parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """The known options, and in `engine` the remaining arguments for vLLM, in order."""
    options, engine = parser.parse_known_args(words)
    options.engine = engine
    return options


def run(options: argparse.Namespace) -> int:
    from workflows import serving

    serving.check_engine()  # before anything heavy is imported, or fetched
    return serving.serve(options)
