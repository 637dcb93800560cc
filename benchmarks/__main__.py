"""Every benchmark of a CPU in a few minutes, as one table with the goals beside the figures.

    python -m benchmarks                        # what `make bench` runs
    python -m benchmarks --minutes 30 --out runs/bench

Each benchmark runs as a process of its own, in this order, until the time is used up; one that is
cut off is named in the table. Fewer rounds than its own defaults make wider ranges: `holds` is yes
or no only where the whole range is on one side of the goal, and else unclear. The files in --out
have what the table leaves out. benchmarks/gpu.py is the same for a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measure import Row, table


class Part(NamedTuple):
    """A benchmark, how it is called, and which of its rows the table shows."""

    name: str
    command: tuple[str, ...]
    shown: Callable[[list[Row]], Iterator[Row]]


def line(
    what: str, measured: Row, goal: float | None = None, *, most: bool = False, by: float = 1.0
) -> Row:
    """A row of the table.

    Args:
        measured: median (`value`), `low` and `high`.
        goal: the least value that is wanted, or with `most` the most; None if there is no goal.
        by: divides the measured values.
    """
    low, high = measured["low"] / by, measured["high"] / by
    if goal is None:
        wanted, holds = "-", "-"
    else:
        wanted = f"at {'most' if most else 'least'} {goal:g}"
        good, bad = (high <= goal, low > goal) if most else (low >= goal, high < goal)
        holds = "yes" if good else "no" if bad else "unclear"
    value = measured["value"] / by
    return {"what": what, "goal": wanted, "measured": value, "low": low, "high": high} | {
        "holds": holds
    }


def _named(row: Row, name: str) -> Row:
    return {"value": row[name], "low": row["low"], "high": row["high"]}


def _prefill(rows: list[Row]) -> Iterator[Row]:
    for row in rows:
        measured = _named(row, "speed-up")
        if row["case"].startswith("average"):
            what = f"prefill, {row['case']}: share of what FLOPs allow"
            yield line(what, measured, 0.9, by=row["bound"])
        elif row["case"] != "dense":
            yield line(f"prefill, {row['case']}: speed over dense", measured)


def _pooling(rows: list[Row]) -> Iterator[Row]:
    for row in rows:
        measured = {"value": row["share"], "low": row["share"], "high": row["share"]}
        yield line(f"pooling {row['plan']}: share of a prefill", measured, 0.01, most=True)


def _decode(rows: list[Row]) -> Iterator[Row]:
    for row in rows:
        if row["case"] != "dense":
            what = f"decoding, batch {row['batch']}, {row['case']}: speed over dense"
            yield line(what, _named(row, "speed-up"))


def _steps(rows: list[Row]) -> Iterator[Row]:
    for row in rows:
        if row.get("case", "dense") != "dense":
            what = f"LoRA step, {row['case']}: share of what FLOPs allow"
            yield line(what, _named(row, "speed-up"), by=row["bound"])


def _launchers(rows: list[Row]) -> Iterator[Row]:
    for row in rows:
        if "launcher" in row and row["launcher"] != "bare loop":
            name = row["launcher"]
            measured = {"value": row["cpu"], "low": row["cpu low"], "high": row["cpu high"]}
            yield line(f"{name}: processor time of a step over a bare loop's", measured, 1.03,
                       most=True)  # fmt: skip
            wait = {"value": row["wait"], "low": row["wait"], "high": row["wait high"]}
            yield line(f"{name}: share of the time without data", wait, 0.02, most=True)


def _prepare(rows: list[Row]) -> Iterator[Row]:
    for row in rows:
        if row["case"] == "ratio":
            what = "adsc prepare: records a second over a multiprocessing loop's"
            yield line(what, _named(row, "ratio"), 0.95)


PARTS = (
    Part("prefill", ("prefill", "--rounds", "5"), _prefill),
    Part("pooling", ("pooling", "--rounds", "3"), _pooling),
    Part("steps", ("train", "--part", "steps", "--rounds", "3"), _steps),
    Part("prepare", ("prepare", "speed", "--records", "4000", "--rounds", "3"), _prepare),
    Part("decode", ("decode", "--rounds", "2", "--steps", "8"), _decode),
    Part("launchers", ("train", "--part", "launchers", "--rounds", "2"), _launchers),
)


def measure(out: Path, seconds: float, more: tuple[str, ...] = ()) -> Iterator[Row]:
    """The rows of the table; each part writes its own file into `out`.

    Args:
        more: arguments for every benchmark of a model, such as --geometry tiny.
    """
    end = time.monotonic() + seconds
    for part in PARTS:
        file = out / f"{part.name}.json"
        file.unlink(missing_ok=True)
        module, *arguments = part.command
        command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--json", str(file)]
        command += more if module != "prepare" else ()
        left = end - time.monotonic()
        print(f"{part.name} ...", file=sys.stderr, flush=True)
        try:
            done = subprocess.run(
                command, timeout=max(1.0, left), capture_output=True, text=True, check=False
            )
        except subprocess.TimeoutExpired:
            yield {"what": f"{part.name}: not finished in the {max(0, left):.0f} s that were left"}
            continue
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            yield {"what": f"{part.name}: failed: {last[:200]}"}
            continue
        document: dict[str, Any] = json.loads(file.read_text())
        yield from part.shown(document["rows"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="time for all of them (10)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the files")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = list(measure(options.out, 60 * options.minutes))
    print(table(rows))
    print(f"\nmachine, settings and the other columns: {options.out}")


if __name__ == "__main__":
    main()
