"""Leases, between threads and between processes, on both kinds of store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from pipeline.durable.lease import LOST_LEASE_EXIT, Holder, Lease, acquire, alive
from pipeline.store import Store, open_store
from tests.faults.proxy import Proxy

KEY = "stage/lease.json"
HOLD = """
import sys, time
from pipeline.durable.lease import Lease
from pipeline.store import open_store
lease = Lease(open_store(sys.argv[1]), "stage/lease.json", "other", float(sys.argv[2]))
assert lease.take()
print("taken", flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "runs"))
    request.getfixturevalue("s3_endpoint")
    return open_store(f"s3://lab/{uuid.uuid4().hex}")


def lease_of(store: Store, attempt: str, seconds: float) -> Lease:
    """A lease of this process, which is not to end where a slow machine loses it."""
    return Lease(store, KEY, attempt, seconds, on_lost=lambda: None)


def held_elsewhere(store: Store, seconds: float) -> subprocess.Popen[str]:
    """Another process that holds the lease."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, store.root, str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "taken\n"
    return process


def test_one_holder_at_a_time(store: Store) -> None:
    first, second = lease_of(store, "first", 10), lease_of(store, "second", 10)
    assert first.take()
    assert not second.take()
    holder = Holder.read(store, KEY)
    assert holder and holder.attempt == "first" and str(os.getpid()) in holder.holder
    first.release()
    assert second.take()
    first.release()  # once more does no harm to the next holder
    assert second.confirm()
    second.release()
    assert store.read(KEY) is None


def test_a_waiter_learns_who_holds_it_and_gets_it_after_the_release(store: Store) -> None:
    first, second = lease_of(store, "first", 3), lease_of(store, "second", 3)
    assert first.take()
    reported: list[tuple[str, float]] = []
    threading.Timer(4, first.release).start()
    started = time.monotonic()
    # Longer than the lease's life: a holder that is alive keeps it.
    assert acquire(second, lambda: False, lambda holder, s: reported.append((holder.attempt, s)))
    assert time.monotonic() - started > 3.9
    assert {attempt for attempt, _ in reported} == {"first"}
    assert reported[-1][1] > 3
    second.release()


def test_a_waiter_stops_when_the_work_is_done(store: Store) -> None:
    first, second = lease_of(store, "first", 5), lease_of(store, "second", 5)
    assert first.take()
    assert not acquire(second, lambda: True)
    first.release()


def test_a_dead_holder_is_followed_after_the_life_of_the_lease(store: Store) -> None:
    process = held_elsewhere(store, 2.0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    started = time.monotonic()
    lease = lease_of(store, "next", 60)  # what counts is the life that the holder promised
    assert acquire(lease, lambda: False)
    assert 2.0 < time.monotonic() - started < 60
    lease.release()


def test_a_holder_that_lost_its_lease_ends(store: Store) -> None:
    process = held_elsewhere(store, 2.0)
    assert store.delete(KEY)
    assert store.create(KEY, json.dumps({"attempt": "thief"}).encode())
    assert process.wait(timeout=60) == LOST_LEASE_EXIT
    assert store.read(KEY) == b'{"attempt": "thief"}'


def test_a_stopped_holder_ends_when_it_wakes_up(store: Store) -> None:
    process = held_elsewhere(store, 1.0)
    process.send_signal(signal.SIGSTOP)
    lease = lease_of(store, "next", 60)
    assert acquire(lease, lambda: False)
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=60) == LOST_LEASE_EXIT
    assert lease.confirm()
    lease.release()


def test_a_holder_whose_store_is_unavailable_gives_up_in_time(tmp_path: Path) -> None:
    lost = threading.Event()
    (tmp_path / "runs").mkdir()
    lease = Lease(open_store(str(tmp_path / "runs")), KEY, "first", 6.0, on_lost=lost.set)
    assert lease.take()
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    (tmp_path / "runs").write_text("a file in its place")
    started = time.monotonic()
    assert lost.wait(60)
    assert time.monotonic() - started < 6.0


def test_a_refused_write_that_was_done_is_no_loss(store: Store) -> None:
    """The answer to a request can be lost, and the request be sent again: it is then refused."""
    lease = lease_of(store, "first", 60)
    assert lease.take()
    stored = store.read_versioned(KEY)
    assert stored
    content = {**json.loads(stored[0]), "beat": 1}
    assert store.replace(KEY, json.dumps(content).encode(), stored[1])
    assert lease.confirm()
    lease.release()
    assert store.read(KEY) is None


def test_alive_distinguishes_held_from_abandoned(store: Store) -> None:
    lease = lease_of(store, "first", 5)
    assert lease.take()
    store.create("dead/lease.json", store.read(KEY) or b"")
    assert alive(store, [KEY, "dead/lease.json", "none/lease.json"]) == {KEY}
    lease.release()


def test_a_store_that_refuses_writes_is_no_lost_lease(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy(s3_endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    lost = threading.Event()
    store = open_store(f"s3://lab/{uuid.uuid4().hex}")
    lease = Lease(store, KEY, "first", 4.0, on_lost=lost.set)
    assert lease.take()
    proxy.refused = {"PUT"}
    assert not lost.wait(6)
    assert proxy.refusals > 2
    proxy.refused = {"PUT", "GET"}
    assert lost.wait(15)
    proxy.close()
