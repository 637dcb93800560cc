"""Copies of remote inputs: made once, bounded, and never deleted under a reader."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.durable.record import Record, manifest
from pipeline.durable.stage import Input
from pipeline.store import open_store
from pipeline.store.cache import fetch, make_room


def kilobytes(folder: Path) -> None:
    (folder / "weights").write_bytes(bytes(1000))


def names(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()}


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    for age, name in ((30, "a"), (20, "b"), (10, "c")):
        fetch(tmp_path, name, 10_000, kilobytes).close()
        os.utime(tmp_path / f"{name}.lock", (time.time() - age,) * 2)
    fetch(tmp_path, "a", 10_000, kilobytes).close()
    fetch(tmp_path, "d", 3_000, kilobytes).close()
    assert names(tmp_path) == {n for copy in "acd" for n in (copy, f"{copy}.lock")}


def test_a_copy_in_use_stays_even_if_nothing_fits(tmp_path: Path) -> None:
    used = fetch(tmp_path, "used", 0, kilobytes)
    other = fetch(tmp_path, "other", 0, kilobytes)
    other.close()
    make_room(tmp_path, 0)
    assert used.folder.is_dir() and not other.folder.is_dir()
    used.close()
    make_room(tmp_path, 0)
    assert not names(tmp_path)


def test_a_dead_reader_holds_nothing_and_a_half_made_copy_goes(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from pipeline.store.cache import fetch\n"
        "use = fetch(Path(sys.argv[1]), 'used', 0, lambda f: (f / 'x').write_text('x'))\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert reader.stdout and reader.stdout.readline() == "ready\n"
    (tmp_path / ".tmp-dead" / "used").mkdir(parents=True)
    os.utime(tmp_path / ".tmp-dead", (0, 0))
    make_room(tmp_path, 0)
    assert names(tmp_path) == {"used", "used.lock"}
    reader.kill()
    reader.wait()
    make_room(tmp_path, 0)
    assert not names(tmp_path)


def test_readers_and_deleters_at_once(tmp_path: Path) -> None:
    def read(number: int) -> bool:
        use = fetch(tmp_path, f"copy-{number % 3}", 1_500, kilobytes)
        try:
            return (use.folder / "weights").stat().st_size == 1000
        finally:
            use.close()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(200)))


def test_an_input_is_fetched_again_where_it_was_deleted(
    s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "x").write_text("content")
    store = open_store(f"s3://lab/{uuid.uuid4().hex}")
    store.upload(tmp_path / "made", "attempts/1")
    record = Record(
        stage="make",
        fingerprint="0" * 64,
        attempt="1",
        files=manifest(tmp_path / "made"),
        uri=store.uri("attempts/1"),
    )
    cache = tmp_path / "cache"
    first = Input(record, str(cache), 0.0)
    assert (first.folder / "x").read_text() == "content"
    sent = pickle.loads(pickle.dumps(first))
    del first
    make_room(cache, 0)
    assert not names(cache)
    assert (sent.folder / "x").read_text() == "content"
