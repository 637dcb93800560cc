"""Terminal helpers of all commands: standard streams, a console, tables and numeric options.

Heavy imports wait until something is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import select
import sys
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


BROKEN_PIPE = 141
"""Exit status of a command whose output is no longer read, by shell convention: 128 + SIGPIPE."""


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """The standard streams for the duration of a command. When a reader such as `head` closes the
    pipe, the command ends without a traceback; a stream closed at start becomes /dev/null.

    Raises:
        SystemExit: the reader closed the pipe.
    """
    # Otherwise the next file opened reuses the descriptor, and prints are written into that file.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            flags = os.O_RDONLY if mode == "r" else os.O_WRONLY
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode))
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        if not _unread(sys.stdout):
            raise  # a server's connection
        # Python flushes the buffer again at exit: send it to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)


def _unread(stream: Any) -> bool:
    """Whether a stream is a pipe without a reader."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), select.POLLOUT)
    except (OSError, ValueError):
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def interrupted() -> int:
    """Print one line for Ctrl-C; returns the exit status."""
    sys.stderr.write("adsc: interrupted; rerun the same command to resume\n")
    return 130


def number(
    kind: type, above: float = -math.inf, least: float = -math.inf, most: float = math.inf
) -> Callable[[str], Any]:
    """An argparse type: a finite number within bounds."""
    limits = [f"above {above:g}"] if above > -math.inf else []
    limits += [f"from {least:g}"] if least > -math.inf else []
    limits += [f"up to {most:g}"] if most < math.inf else []
    expected = " ".join(["a whole number" if kind is int else "a number", *limits])

    def parse(text: str) -> Any:
        try:
            value = kind(text)
            fits = math.isfinite(value) and value > above and least <= value <= most
        except (ValueError, OverflowError):
            fits = False
        if not fits:
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return parse


def note(text: str | None) -> None:
    """Print a line for people on stderr."""
    if text:
        print(f"adsc: {text}", file=sys.stderr)


def console(data: bool = False) -> Console:
    """A console as wide as the terminal; elsewhere (a job's log, a pipe) wide enough for tables.

    Args:
        data: stdout is for a program: progress goes to stderr.
    """
    from rich.console import Console

    if data:
        return Console(stderr=True, width=200)

    class Piped(Console):
        def on_broken_pipe(self) -> None:
            """Rich ends the process with status 1; leave the exit status to `streams`."""
            raise BrokenPipeError

    console = Piped()
    return console if console.is_terminal else Piped(width=200)


def print_rows(*rows: Collection[object]) -> None:
    """Print rows as aligned lines that are never wrapped, so that paths can be copied."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (str(cell).ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def table(*columns: str, title: str | None = None) -> Table:
    """A table without lines, so that its rows can be cut and searched."""
    from rich.table import Table

    return Table(*columns, title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
