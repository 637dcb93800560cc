"""What all commands share with the terminal: a console, tables, and parsers with examples.

Heavy imports wait until something is printed. What a command says is its own business.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def console() -> Console:
    """A terminal's own width; elsewhere (a job's log, a pipe) wide enough for every table."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=200)


def table(*columns: str, title: str | None = None) -> Table:
    """Without lines, so that its rows can be cut and searched."""
    from rich.table import Table

    return Table(*columns, title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))


def add_command(commands: Any, name: str, help_text: str, examples: str) -> argparse.ArgumentParser:
    """A subcommand's parser; `commands` is what `add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser
