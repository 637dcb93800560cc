"""When the stages of a workflow ran: bars over time, from their records, as text or as a figure.

A record has the attempt that finished: what a killed attempt took is not in it. Stages can come
from several runs, days apart, so times at which none of them ran are cut out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from pipeline.durable.record import Record, input_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONGEST_GAP = 60.0
"""Seconds without any stage that are still shown."""


class Bar(NamedTuple):
    """One stage, in seconds since the first one began, without what was cut out."""

    stage: str
    start: float
    end: float
    gap: float
    """Seconds cut out just before it; 0 almost always."""


def records_behind(record: Record) -> list[Record]:
    """A finished stage's record and those of everything that it needed, each once, as far as they
    are found."""
    found: dict[str, Record] = {}
    todo = [record]
    while todo:
        one = todo.pop()
        if one.fingerprint not in found:
            found[one.fingerprint] = one
            todo += input_records(one)
    return list(found.values())


def bars(records: Iterable[Record]) -> list[Bar]:
    """The stages in the order in which they began; those without times, pinned ones, are left
    out."""
    timed = sorted(
        (datetime.fromisoformat(it.started).timestamp(), it.seconds, it.stage)
        for it in records
        if it.started
    )
    found: list[Bar] = []
    cut, latest = 0.0, timed[0][0] if timed else 0.0
    origin = latest
    for start, seconds, stage in timed:
        gap = start - latest if start - latest > LONGEST_GAP else 0.0
        cut += gap
        latest = max(latest, start + seconds)
        found.append(Bar(stage, start - origin - cut, start - origin - cut + seconds, gap))
    return found


def lines(bars: Sequence[Bar], width: int = 60) -> Iterator[str]:
    """One line a stage: its name, its beginning, how long it took, and its bar of blocks."""
    name = max((len(bar.stage) for bar in bars), default=0)
    scale = width / max((bar.end for bar in bars), default=1.0)
    yield f"{'stage':<{name}}  {'from':>8}  {'took':>8}"
    for bar in bars:
        if bar.gap:
            yield f"{'':<{name}}  ({_clock(bar.gap)} without a stage)"
        first = min(width - 1, int(bar.start * scale))
        length = max(1, round(bar.end * scale) - first)
        took = _clock(bar.end - bar.start)
        drawn = " " * first + "█" * length
        yield f"{bar.stage:<{name}}  {_clock(bar.start):>8}  {took:>8}  {drawn}"


def draw(axes: Axes, bars: Sequence[Bar]) -> None:
    """The same as a panel of the report."""
    from pipeline.reporting.figure_style import COLOURS, MUTED

    longest = max((bar.end for bar in bars), default=1.0)
    unit, seconds = ("h", 3600.0) if longest > 3 * 3600 else ("min", 60.0)
    for row, bar in enumerate(bars):
        axes.barh(row, (bar.end - bar.start) / seconds, 0.7, bar.start / seconds, color=COLOURS[1])
        if bar.gap:
            axes.axvline(bar.start / seconds, color=MUTED, ls=":", lw=1)
            axes.text(
                bar.start / seconds, row - 0.55, f" {_clock(bar.gap)} cut out", color=MUTED, size=7
            )
    axes.set_yticks(range(len(bars)), [bar.stage for bar in bars])
    axes.set_ylim(len(bars) - 0.4, -0.8)
    axes.set_xlim(0, 1.02 * longest / seconds)
    axes.set_xlabel(f"{unit} since the first stage began")
    axes.set_title("When each stage ran")
    axes.grid(visible=False, axis="y")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
