"""The `adsc` command: a table of commands, each a module that is imported only when called.

The module of a command is `workflows.commands.NAME`, or in a folder of `FOLDERS`, and has

    EXAMPLES                 lines for --help
    add_arguments(parser)    its arguments
    run(options)             runs it; returns the exit code, None for 0
    parse(parser, words)     only where arguments of another program may follow

These modules only parse and print; the work of a command is a function elsewhere.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from workflows.commands import terminal

COMMANDS = {
    "run": "run a workflow; finished stages are not repeated",
    "eval": "score a checkpoint with several methods on questions",
    "search": "find where and how much to prune, at a budget",
    "ls": "workflows, or the stages of one with their state",
    "show": "the record of a finished stage",
    "prepare": "turn records and pictures into validated, tokenised Parquet shards",
    "chat": "ask an exported checkpoint about a picture",
    "export": "publish a checkpoint at an address and verify it there",
    "pull": "copy a published checkpoint into a folder and verify it",
    "serve": "serve a checkpoint with its plan on vLLM",
    "promote": "give a registered model an alias if it passes the gates",
    "submit": "run a workflow on a Ray cluster, as a job",
    "status": "jobs of a cluster, or one job and its stages",
    "logs": "print the output of a job",
    "cancel": "stop a job; submit it again to resume",
    "doctor": "check this installation, with a way out of each problem",
    "cost": "FLOPs and KV cache of a model, dense and under a plan",
    "plan": "placements of drops that meet a token budget",
}
"""Name -> its purpose, in one line."""
FOLDERS = {
    "checkpoints": ("chat", "export", "pull", "promote", "serve"),
    "cluster": ("submit", "status", "logs", "cancel", "doctor"),
}
"""Folder of this package -> the commands in it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    with terminal.streams():
        return _main(list(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    first = next(iter(arguments), "--help")
    if first not in COMMANDS and not first.startswith("-"):
        near = get_close_matches(first, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"adsc: command {first!r} is unknown; {hint}", file=sys.stderr)
        return 2
    options = _parse(arguments)
    options.command = shlex.join(["adsc", *arguments])
    try:
        return int(options.run(options) or 0)
    except KeyboardInterrupt:
        return terminal.interrupted()
    except _user_errors() as error:
        from pipeline.redact import redact

        print(f"adsc: {redact(str(error))}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2


def _user_errors() -> tuple[type[Exception], ...]:
    from pipeline.cluster.jobs import JobFailed
    from pipeline.durable.failure import RunFailed
    from workflows.serving import ServingError

    return (ValueError, RunFailed, JobFailed, ServingError)


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Build only the parser of the given command. Options may come before, between and after its
    positional arguments, which argparse does not allow for subcommands."""
    if arguments and arguments[0] in COMMANDS:
        parser, words = command_parser(arguments[0]), arguments[1:]
        if (parse := getattr(_module(arguments[0]), "parse", None)) is not None:
            options: argparse.Namespace = parse(parser, words)
            return options
        return parser.parse_intermixed_args(words)
    overview, _ = _overview()
    return overview.parse_args(arguments or ["--help"])


def command_parser(name: str) -> argparse.ArgumentParser:
    """The complete parser of one command."""
    return _fill(argparse.ArgumentParser(prog=f"adsc {name}", **_described(name)), name)


def build_parser() -> argparse.ArgumentParser:
    """The complete parser with every command: for docs and tests, since it imports them all."""
    parser, commands = _overview()
    for name, one in commands.items():
        _fill(one, name)
    return parser


def _overview() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser with the names of the commands, and an empty one for each."""
    parser = argparse.ArgumentParser(
        prog="adsc",
        description="Train LLaVA-type models to live with fewer vision tokens.",
        epilog="Start with `adsc run demo`.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="the version and its commit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    each = {
        name: commands.add_parser(name, help=text, **_described(name))
        for name, text in COMMANDS.items()
    }
    return parser, each


class _Version(argparse.Action):
    """`--version`: looks up the commit only when used."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        from pipeline.commit import git_commit

        commit = git_commit()
        print(f"adsc {version('adsc')}{f' ({commit})' if commit else ''}")
        parser.exit()


def _described(name: str) -> dict[str, Any]:
    text = COMMANDS[name]
    return {
        "description": f"{text[0].upper()}{text[1:]}.",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _fill(parser: argparse.ArgumentParser, name: str) -> argparse.ArgumentParser:
    module = _module(name)
    parser.epilog = module.EXAMPLES
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)
    return parser


def _module(name: str) -> Any:
    folder = next((f".{folder}" for folder, names in FOLDERS.items() if name in names), "")
    return importlib.import_module(f"workflows.commands{folder}.{name}")


if __name__ == "__main__":
    sys.exit(main())
