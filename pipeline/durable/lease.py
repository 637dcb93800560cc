"""A lease: one process at a time works on a stage, and others can tell whether it is alive.

The holder rewrites the lease with every heartbeat. A waiter watches, on its own clock, whether it
still changes: clocks of other machines aren't compared, and the time in the lease is for display.
This is deliberately not a lock: a suspended process may wake up and continue. So results are
published with a create-once write, and only after the lease was confirmed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline.store import Store, StoreError

LOST_LEASE_EXIT = 75  # exit status of a stage's process that lost its lease: "temporary failure"
_BEATS = 10  # heartbeats in the lifetime of a lease


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The holder of a lease, as a reader sees it."""

    attempt: str
    holder: str
    since: str
    seconds: float
    version: str

    @classmethod
    def read(cls, store: Store, key: str) -> Holder | None:
        stored = store.read_versioned(key)
        if stored is None:
            return None
        try:
            content: Any = json.loads(stored[0])
            known = {name: content[name] for name in ("attempt", "holder", "since", "seconds")}
        except (ValueError, KeyError, TypeError):
            # Not a lease of this format, but its changes can still be watched.
            known = {"attempt": "", "holder": "an unknown process", "since": "", "seconds": 60.0}
        return cls(**known, version=stored[1])


class Lease:
    """A lease with its heartbeat; `acquire` takes it."""

    def __init__(
        self,
        store: Store,
        key: str,
        attempt: str,
        seconds: float,
        on_lost: Callable[[], object] = lambda: os._exit(LOST_LEASE_EXIT),
    ) -> None:
        """Nothing is written yet.

        Args:
            seconds: lifetime of the lease. Waiters take it over if it hasn't changed for this long,
                and the holder gives up if it couldn't renew it for 0.8 of this.
            on_lost: called once, in the heartbeat's thread; the default ends the process at once.
        """
        self.store, self.key, self.attempt, self.seconds = store, key, attempt, seconds
        self._on_lost = on_lost
        self._beat = 0
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        self._version = ""
        self._renewed = 0.0
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def take(self, stale: Holder | None = None) -> bool:
        """Try once to take the lease: create it, or replace a stale holder's."""
        started = time.monotonic()
        data = self._content()
        if stale is None:
            version = self.store.create(self.key, data)
        else:
            version = self.store.replace(self.key, data, stale.version)
        version = version or self._mine()
        if version is None:
            return False
        self._version, self._renewed = version, started
        for target in (self._keep_beating, self._watch):
            threading.Thread(target=target, name=f"lease-{target.__name__}", daemon=True).start()
        return True

    def confirm(self) -> bool:
        """Renew it now; returns whether it is still ours.

        Raises:
            StoreError: the store is unavailable.
        """
        with self._lock:
            started = time.monotonic()
            self._beat += 1
            version = self.store.replace(self.key, self._content(), self._version)
            if version is None and (stored := self._mine()):
                version = self.store.replace(self.key, self._content(), stored)
            if version is None:
                return False
            self._version, self._renewed = version, started
            return True

    def release(self) -> None:
        """Stop the heartbeat and delete the lease if it is still ours."""
        self._stop.set()
        with self._lock, contextlib.suppress(StoreError):  # it becomes stale anyway
            self.store.delete(self.key, self._version)

    def lost(self) -> None:
        """Another process holds it, or may: stop, which by default ends the process."""
        self._stop.set()
        self._on_lost()

    def _content(self) -> bytes:
        holder = f"{socket.gethostname()} (process {os.getpid()})"
        content = {"attempt": self.attempt, "holder": holder, "since": self._since}
        return json.dumps({**content, "seconds": self.seconds, "beat": self._beat}).encode()

    def _mine(self) -> str | None:
        """The stored version, if the lease is ours: a write may be refused because an earlier one
        succeeded but its answer was lost."""
        holder = Holder.read(self.store, self.key)
        return holder.version if holder and holder.attempt == self.attempt else None

    def _keep_beating(self) -> None:
        while not self._stop.wait(self.seconds / _BEATS):
            try:
                mine = self.confirm()
            except StoreError:
                # A store that refuses writes costs nothing while the stored lease is still ours: a
                # new holder would have written. If it can't be read, `_watch` counts the time.
                with contextlib.suppress(StoreError):
                    started = time.monotonic()
                    mine = self._mine() is not None
                    self._renewed = started if mine else self._renewed
                    if not mine and not self._stop.is_set():
                        self.lost()
                continue
            if not mine and not self._stop.is_set():
                self.lost()

    def _watch(self) -> None:
        """Give up in time, even if a request hangs."""
        while not self._stop.wait(self.seconds / _BEATS):
            if time.monotonic() - self._renewed > 0.8 * self.seconds and not self._stop.is_set():
                self.lost()


def acquire(
    lease: Lease,
    finished: Callable[[], bool],
    waiting: Callable[[Holder, float], object] = lambda holder, seconds: None,
) -> bool:
    """Take the lease, waiting for it if need be; returns False, without it, once `finished()`.

    `waiting(holder, seconds waited)` is called about once a second.
    """
    started = time.monotonic()
    seen: tuple[str, float] = ("", started)
    while True:
        holder = Holder.read(lease.store, lease.key)
        now = time.monotonic()
        if holder is None:
            if lease.take():
                return True
        elif holder.version != seen[0]:
            seen = (holder.version, now)
        elif now - seen[1] > holder.seconds and lease.take(stale=holder):
            return True
        if finished():
            return False
        if holder is not None:
            waiting(holder, now - started)
            time.sleep(min(1.0, lease.seconds / _BEATS))


def alive(store: Store, keys: Sequence[str]) -> set[str]:
    """The leases that change within about two of their heartbeats."""
    first = {key: holder for key in keys if (holder := Holder.read(store, key))}
    fresh: set[str] = set()
    started, longest = time.monotonic(), max((h.seconds for h in first.values()), default=0.0)
    while first.keys() - fresh and time.monotonic() - started < 2.5 * longest / _BEATS:
        time.sleep(longest / _BEATS / 4)
        for key in first.keys() - fresh:
            holder = Holder.read(store, key)
            if holder is not None and holder.version != first[key].version:
                fresh.add(key)
    return fresh
