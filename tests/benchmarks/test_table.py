"""The table of `python -m benchmarks`: what holds, what is unclear, and what was cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as table


@pytest.mark.parametrize(
    ("low", "high", "most", "holds"),
    [
        (0.91, 0.95, False, "yes"),
        (0.85, 0.89, False, "no"),
        (0.85, 0.95, False, "unclear"),
        (0.85, 0.89, True, "yes"),
        (0.91, 0.95, True, "no"),
        (0.85, 0.95, True, "unclear"),
    ],
)
def test_a_goal_holds_only_where_the_whole_range_meets_it(
    low: float, high: float, most: bool, holds: str
) -> None:
    measured = {"value": 2 * (low + high) / 2, "low": 2 * low, "high": 2 * high}
    row = table.line("x", measured, 0.9, most=most, by=2)
    assert row["holds"] == holds
    assert (row["low"], row["high"]) == pytest.approx((low, high))
    assert table.line("x", measured)["holds"] == table.line("x", measured)["goal"] == "-"


def test_every_part_reads_the_rows_that_its_benchmark_writes() -> None:
    """Columns as the benchmarks name them (tests/benchmarks/test_benchmarks.py runs those)."""
    speed = {"speed-up": 1.8, "low": 1.7, "high": 1.9, "bound": 2.0}
    rows = {
        "prefill": [{"case": "dense", **speed}, {"case": "hooks only", **speed}],
        "pooling": [{"plan": "1:1/4;pool=tiles", "share": 0.004}],
        "steps": [{"case": "average 64", **speed}, {"what": "MFU", "dense": None}],
        "prepare": [{"case": "loop"}, {"case": "ratio", "ratio": 0.9, "low": 0.8, "high": 0.99}],
        "decode": [{"batch": 32, "case": "average 64", **speed}],
        "launchers": [
            {"launcher": "bare loop"},
            {"launcher": "Ray Train", "cpu": 1.0, "cpu low": 0.9, "cpu high": 1.1}
            | {"wait": 0.0, "wait high": 0.01},
        ],
    }
    shown = {part.name: list(part.shown(rows[part.name])) for part in table.PARTS}
    assert [len(found) for found in shown.values()] == [1, 1, 1, 1, 1, 2]
    assert shown["pooling"][0]["holds"] == "yes" and shown["prepare"][0]["holds"] == "unclear"


def test_what_fails_or_is_cut_off_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = table.Part("broken", ("prefill", "--no-such-option"), table._prefill)
    slow = table.Part("slow", ("prefill",), table._prefill)
    monkeypatch.setattr(table, "PARTS", (broken,))
    (row,) = table.measure(tmp_path, 600)
    assert row["what"].startswith("broken: failed: ") and "--no-such-option" in row["what"]
    monkeypatch.setattr(table, "PARTS", (slow,))
    (row,) = table.measure(tmp_path, 0)
    assert row["what"].startswith("slow: not finished")
    assert "slow ..." in capsys.readouterr().err
    assert json.dumps(row)
