"""Progress of stages: reported from any process of a run, shown by the driver.

One small Ray actor holds the latest report of each stage. Nothing is stored and nothing depends on
it: a lost report is replaced by the next. Metrics belong to tracking, not here.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

_EVERY = 0.2  # seconds between two reports of one handle
PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
"""For `Console.print`: text without markup, in lines that are never wrapped."""
_LINE_EVERY = 10.0  # seconds between two lines of one stage where there is no terminal


@dataclass(frozen=True, kw_only=True)
class Report:
    """The latest report of one stage. `state` is waiting, running, done or failed."""

    state: str = ""
    done: float = 0.0
    total: float = 0.0
    note: str = ""


class Board:
    """The actor: the latest report of each stage."""

    def __init__(self) -> None:
        self._reports: dict[str, Report] = {}

    def put(self, stage: str, report: Report) -> None:
        self._reports[stage] = report

    def all(self) -> dict[str, Report]:
        return self._reports


@dataclass(kw_only=True)
class ProgressHandle:
    """Reports the progress of one stage; it can be pickled, for the workers of Ray Train.

    Without a board (a stage outside of Ray) reports are dropped.
    """

    stage: str
    board: Any = None
    _last: float = field(default=0.0, repr=False, compare=False)

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """Report `done` of `total`, in any unit; at most a few reports a second are sent."""
        now = time.monotonic()
        if now - self._last >= _EVERY or done >= total:
            self._last = now
            self.send(Report(state="running", done=done, total=total, note=note))

    def send(self, report: Report) -> None:
        if self.board is not None:
            self.board.put.remote(self.stage, report)


class Display:
    """One bar per stage on a terminal; elsewhere a line per stage about every ten seconds, if it
    says anything new."""

    def __init__(self, console: Console, titles: Mapping[str, str]) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._console, self._titles = console, dict(titles)
        self._width = max(map(len, self._titles.values()), default=0)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(compact=True),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._first: dict[str, tuple[float, float]] = {}
        self._lines: dict[str, tuple[float, str, str]] = {}

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def update(self, reports: Mapping[str, Report]) -> None:
        """Show the latest reports."""
        for stage, report in reports.items():
            if stage not in self._titles:
                continue
            if self._console.is_terminal:
                self._draw(stage, report)
            else:
                self._print(stage, report)

    def end(self, stage: str, text: str, style: str = "") -> None:
        """Print how a stage ended."""
        task = self._tasks.pop(stage, None)
        if task is not None:
            self._bars.remove_task(task)
        self._titled(stage, text, style)
        self._titles.pop(stage)

    def _draw(self, stage: str, report: Report) -> None:
        title = self._titles[stage].ljust(self._width)
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(title, total=None, note="")
        note = report.note if report.state == "running" else f"{report.state} {report.note}"
        self._bars.update(
            self._tasks[stage],
            completed=report.done,
            total=report.total or None,  # unknown so far: the bar pulses
            note=note,
            refresh=True,
        )

    def _print(self, stage: str, report: Report) -> None:
        now = time.monotonic()
        since, start = now, report.done
        if report.total:  # what came before, such as starting workers, tells nothing of the speed
            since, start = self._first.setdefault(stage, (now, report.done))
        last, state, shown = self._lines.get(stage, (0.0, "", ""))
        if state == report.state and now - last < _LINE_EVERY:
            return
        text = report.state
        if report.total:
            text += f" {100 * report.done / report.total:.0f} % ({report.done:g}/{report.total:g})"
            if report.done > start and now > since:
                left = (now - since) * (report.total - report.done) / (report.done - start)
                text += f", {left:.0f} s left"
        text = f"{text}  {report.note}".rstrip()
        self._lines[stage] = (now, report.state, text)
        if text != shown:
            self._titled(stage, text)

    def _titled(self, stage: str, text: str, style: str = "") -> None:
        title = self._titles[stage].ljust(self._width)
        self._console.print(f"{title}  {text}", style=style, **PLAIN)


def table(rows: Iterable[tuple[str, str, str]]) -> str:
    """Stages with state and path, in lines that are never wrapped, so that paths can be copied."""
    lines = [("stage", "state", "path"), *rows]
    first, second = (max(len(line[column]) for line in lines) for column in (0, 1))
    return "\n".join(f"{a.ljust(first)}  {b.ljust(second)}  {c}" for a, b, c in lines)
