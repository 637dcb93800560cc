"""How every benchmark here measures and reports: turns, ratios within one run, one JSON form.

Cases take turns within each round, every other round in reverse, and a ratio is made of two times
of the same round: so it holds on a machine whose speed drifts, where absolute times do not. A row
gives the median over rounds with the lowest and the highest. Nothing here knows of models.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

Row = dict[str, Any]


def _nothing() -> None:
    """The default preparation of a case."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to time.

    Args:
        name: what its row is called.
        call: what is timed.
        prepare: what has to happen before each call, untimed.
    """

    name: str
    call: Callable[[], Any]
    prepare: Callable[[], Any] = _nothing


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device) -> Callable[[], float]:
    """Wall time; for a single thread on a CPU its processor time, which leaves out the turns that
    other processes have on a shared machine."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def take_turns(
    cases: Sequence[Case], rounds: int, device: torch.device, *, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of each case in each round.

    Args:
        cases: they take turns in this order, and in reverse in every other round.
        rounds: timed rounds; one more comes first and is not counted.
        device: is waited for before and after each timed call.
        warm: whether an untimed call of the same case comes before each timed one.
    """
    now = clock(device)
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    for turn in range(rounds + 1):
        for case in cases if turn % 2 else reversed(cases):
            case.prepare()
            if warm:
                case.call()
            synchronize(device)
            start = now()
            case.call()
            synchronize(device)
            seconds = now() - start
            if turn:
                times[case.name].append(seconds)
    return times


def speedup(times: Mapping[str, Sequence[float]], name: str, over: str = "dense") -> Row:
    """How many times faster than `over` a case is: median, lowest and highest over the rounds."""
    ratios = [a / b for a, b in zip(times[over], times[name], strict=True)]
    return {"speed-up": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def machine(device: torch.device) -> Row:
    """What a figure depends on beside the code."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "clock": clock(device).__name__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    """The processor's name where Linux tells it."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """The commit of this checkout; None outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def tables(rows: Iterable[Row]) -> str:
    """A table for each kind of row, in the order in which they come up."""
    kinds: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        kinds.setdefault(tuple(row), []).append(row)
    return "\n\n".join(map(table, kinds.values()))


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table, aligned: what is printed is what goes into docs/performance.md."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    cells.insert(1, ["-" * width for width in widths])
    lines = (
        " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True))
        for line in cells
    )
    return "\n".join(f"| {line} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if not isinstance(value, float):
        return str(value)
    if 0 < abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3f}"


def report(
    name: str, settings: Row, rows: list[Row], device: torch.device, path: Path | None
) -> None:
    """Print the machine, the settings and the table; write them to `path` if there is one."""
    about = machine(device)
    print(", ".join(f"{key} {value}" for key, value in about.items() if value is not None))
    print(", ".join(f"{key} {value}" for key, value in settings.items()), "\n")
    print(tables(rows), flush=True)
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"benchmark": name, "machine": about, "settings": settings, "rows": rows}
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(document, indent=1, default=str) + "\n")
    unfinished.replace(path)  # a file that exists is a whole one
