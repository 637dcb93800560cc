"""What all commands share with the terminal: its streams, a console, tables and numbers.

Heavy imports wait until something is printed. What a command says is its own business.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


BROKEN_PIPE = 141
"""Exit status of a command whose output is no longer read, as shells have it: 128 + SIGPIPE."""


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """The standard streams for the length of a command. A reader that goes, such as `head`, ends it
    without a traceback; a stream that was closed before it began leads nowhere.

    Raises:
        SystemExit: the reader went.
    """
    # Else the next file that is opened gets its number, and what is printed is written into it.
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
        # What is still buffered is tried again when Python ends: it goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)


def _unread(stream: Any) -> bool:
    """Whether a stream is a pipe that nothing reads any more."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), select.POLLOUT)
    except (OSError, ValueError):
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def interrupted() -> int:
    """What Ctrl-C says, in one line; the exit status."""
    sys.stderr.write("adsc: interrupted; run the same command to resume\n")
    return 130


def number(
    kind: type, above: float = -math.inf, least: float = -math.inf, most: float = math.inf
) -> Callable[[str], Any]:
    """An argparse type: a finite number within bounds."""
    limits = [f"above {above:g}"] if above > -math.inf else []
    limits += [f"from {least:g}"] if least > -math.inf else []
    limits += [f"up to {most:g}"] if most < math.inf else []
    what = " ".join(["a whole number" if kind is int else "a number", *limits])

    def parse(text: str) -> Any:
        try:
            value = kind(text)
            fits = math.isfinite(value) and value > above and least <= value <= most
        except (ValueError, OverflowError):
            fits = False
        if not fits:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


def note(text: str | None) -> None:
    """A line for people, beside the output."""
    if text:
        print(f"adsc: {text}", file=sys.stderr)


def console(data: bool = False) -> Console:
    """A terminal's own width; elsewhere (a job's log, a pipe) wide enough for every table.

    Args:
        data: what is printed goes to a program: people read progress on the other stream.
    """
    from rich.console import Console

    if data:
        return Console(stderr=True, width=200)

    class Piped(Console):
        def on_broken_pipe(self) -> None:
            """Rich ends the process with status 1; `streams` knows better."""
            raise BrokenPipeError

    found = Piped()
    return found if found.is_terminal else Piped(width=200)


def print_rows(*rows: Sequence[object]) -> None:
    """Rows of cells as aligned lines, which are never cut: paths are there to be copied."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (str(cell).ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def table(*columns: str, title: str | None = None) -> Table:
    """Without lines, so that its rows can be cut and searched."""
    from rich.table import Table

    return Table(*columns, title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
