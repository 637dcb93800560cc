"""Progress and summary of `export` and `pull`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from workflows.commands import terminal

if TYPE_CHECKING:
    from pipeline.publishing.publish import Published, Report


@contextlib.contextmanager
def bar(quiet: bool) -> Iterator[Report]:
    """A progress bar in bytes on a terminal; elsewhere a line for each new step."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = terminal.console()
    if quiet or not console.is_terminal:
        yield _lines(lambda text: None if quiet else console.print(text, markup=False))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), console=console, transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda done, total, note: bars.update(
            task, completed=done, total=total, description=note
        )


def _lines(say: Callable[[str], None]) -> Report:
    last = ""

    def report(done: float, total: float, note: str) -> None:
        nonlocal last
        if note != last:
            last = note
            say(note)

    return report


def print_summary(options: argparse.Namespace, done: Published, text: str) -> None:
    """Print address, size and what was done; or everything as JSON."""
    if options.json:
        print(json.dumps(dataclasses.asdict(done)))
        return
    size = f"{done.files} files, {done.bytes / 2**20:.1f} MiB"
    console = terminal.console()
    console.print(f"{done.address}: {size}; {text}", markup=False, soft_wrap=True)
    if done.probe:
        console.print(
            f"logits in a fresh process differ by at most {done.probe['worst_difference']:.3g} "
            f"(largest logit {done.probe['largest_logit']:.3g})"
        )
    console.print(f"manifest SHA-256 {done.digest}", soft_wrap=True, highlight=False)
