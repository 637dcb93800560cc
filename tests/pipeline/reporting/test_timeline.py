"""When stages ran, from their records."""

from __future__ import annotations

from pathlib import Path

from pipeline.durable.record import Record, Source, publish
from pipeline.reporting.timeline import bars, lines, records_behind
from pipeline.store import open_store


def record(stage: str, started: str, seconds: float) -> Record:
    day = "" if not started else f"2026-01-01T{started}+00:00"
    return Record(stage=stage, fingerprint=stage[0] * 64, attempt="1", started=day, seconds=seconds)


def test_bars_in_order_with_the_time_between_runs_cut_out() -> None:
    found = bars(
        [
            record("evaluate", "03:00:00", 30),
            record("train", "00:00:10", 100),
            record("control", "00:00:20", 60),
            record("pinned", "", 0),
            record("base", "00:00:00", 8),
        ]
    )
    assert [(bar.stage, bar.start, bar.end) for bar in found] == [
        ("base", 0, 8),
        ("train", 10, 110),
        ("control", 20, 80),
        ("evaluate", 110, 140),
    ]
    assert [bar.gap for bar in found] == [0, 0, 0, 3 * 3600 - 110]
    text = list(lines(found, width=14))
    assert text[2].split() == ["train", "0:10", "1:40", "█" * 10]
    assert text[3].endswith("  ██████")
    assert "2:58:10 without a stage" in text[4]
    assert len(list(lines(bars([])))) == 1


def test_the_records_behind_a_stage_are_found_in_its_store(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    base = publish(store, record("base", "00:00:00", 1))
    made = {"base": Source(fingerprint=base.fingerprint, uri=base.uri)}
    train = publish(store, record("train", "00:00:01", 1).model_copy(update={"inputs": made}))
    both = made | {"train": Source(fingerprint=train.fingerprint, uri=train.uri)}
    last = publish(store, record("merge", "00:00:02", 1).model_copy(update={"inputs": both}))
    assert sorted(it.stage for it in records_behind(last)) == ["base", "merge", "train"]
