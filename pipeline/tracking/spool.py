"""Journal of tracking data: a file of JSON lines, and the thread that sends it to the server.

A process first writes all tracking data into its own journal, so an unavailable or hanging server
blocks nothing, and a killed process loses nothing: the next one sends the rest. A process locks its
journal while it lives; one that can be locked belongs to a dead process. Items never hold
credentials. The caller defines how an item is sent, and its order against other processes' items.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from pipeline.store.cache import folder as cache_folder

Item = dict[str, Any]

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds between attempts without an answer
_BATCH = 1000  # items read at a time
_OTHER_HOST = 24 * 3600.0  # seconds after which another machine's journal counts as abandoned


class Unavailable(Exception):
    """The server does not answer now: the same again later."""


class Journal:
    """Items in the order in which they were tracked, and how far they are sent."""

    def __init__(self, path: Path, file: IO[bytes], header: Item, end: int) -> None:
        self.path, self.header = path, header
        self._file = file
        self._sent = len(json.dumps(header)) + 1
        self._end = end
        self._lock = threading.Lock()

    @classmethod
    def create(cls, folder: Path, header: Item) -> Journal:
        """A new journal of this process, locked until it is closed or the process dies."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{socket.gethostname()}.{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        file = path.open("xb+")
        fcntl.flock(file, fcntl.LOCK_EX)
        line = json.dumps(header).encode() + b"\n"
        file.write(line)
        file.flush()
        return cls(path, file, header, len(line))

    @classmethod
    def adopt(cls, path: Path) -> Journal | None:
        """A dead process's journal, now ours; None where its process lives, or it is gone."""
        try:
            file = path.open("rb+")
        except OSError:  # gone, or in a store that may only be read: its owner sends it
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise FileNotFoundError(path)
            # Not every shared file system hands locks to other machines.
            elsewhere = not path.name.startswith(f"{socket.gethostname()}.")
            if elsewhere and time.time() - path.stat().st_mtime < _OTHER_HOST:
                raise BlockingIOError(path)
            header = json.loads(file.readline())
            journal = cls(path, file, header, path.stat().st_size)
            with contextlib.suppress(FileNotFoundError, ValueError):
                journal._sent = max(journal._sent, int(path.with_suffix(".sent").read_text()))
        except (BlockingIOError, FileNotFoundError, ValueError):
            file.close()
            return None
        return journal

    def append(self, item: Item) -> None:
        """Raises OSError where the disk is full or gone."""
        line = json.dumps(item).encode() + b"\n"
        with self._lock:
            self._file.seek(self._end)
            try:
                self._file.write(line)
                self._file.flush()
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._end)
                raise
            self._end += len(line)

    def unsent(self) -> list[tuple[Item, int]]:
        """The next items, each with the position behind it, for `mark`."""
        found: list[tuple[Item, int]] = []
        with self._lock:
            self._file.seek(self._sent)
            position = self._sent
            while len(found) < _BATCH and position < self._end:
                line = self._file.readline()
                position += len(line)
                if not line.endswith(b"\n"):
                    break  # the process was killed while it wrote
                found.append((json.loads(line), position))
        return found

    def mark(self, position: int) -> None:
        """Everything before `position` is sent."""
        self._sent = position
        with contextlib.suppress(OSError):  # else some of it is sent twice, which changes nothing
            self.path.with_suffix(".sent").write_text(str(position))

    def keep(self, path: Path) -> Path:
        """A copy of a file or folder beside the journal: the original is about to go."""
        target = self.kept(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # gone, or the disk is full
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, target)
        return target

    def kept(self, path: Path) -> Path:
        """Where `keep` puts the copy of a path."""
        name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
        return self.path.with_suffix(".files") / name / path.name

    def mentions(self, text: str) -> bool:
        """Whether any item, sent or not, contains this text."""
        return text in self.path.read_text()

    def age(self) -> float:
        """Seconds since something was tracked."""
        return time.time() - self.path.stat().st_mtime

    def close(self, delete: bool) -> None:
        if delete:
            for suffix in (".jsonl", ".sent"):
                self.path.with_suffix(suffix).unlink(missing_ok=True)
            shutil.rmtree(self.path.with_suffix(".files"), ignore_errors=True)
        self._file.close()


def folder(store_root: str, local: Path | None, cache: str) -> Path:
    """Where the journals of a store's runs are: in it, or, where it is remote, on this machine."""
    if local is not None:
        return local
    name = hashlib.sha256(store_root.encode()).hexdigest()[:12]
    return cache_folder(cache) / ".tracking" / name


def abandoned(folder: Path) -> Iterator[Journal]:
    """The journals that dead processes left in a folder, oldest first, each locked for us."""
    times: list[tuple[float, Path]] = []
    for path in folder.glob("*.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            times.append((path.stat().st_mtime, path))
    for _, path in sorted(times):
        journal = Journal.adopt(path)
        if journal is not None:
            yield journal


class Sender:
    """The thread that sends a journal in order, retrying until the server answers."""

    def __init__(self, journal: Journal, deliver: Callable[[Sequence[Item]], int]) -> None:
        """`deliver` sends the first of the given items and returns how many; or it raises."""
        self.journal, self._deliver = journal, deliver
        self._changed = threading.Condition()
        self._appended = self._delivered = self._failures = 0
        self._hurry = self._closed = False
        self._unavailable_since: float | None = None
        self._first_unavailable = self._last_unavailable = 0
        self.unavailable_seconds = 0.0
        """Seconds without an answer, of outages that are over."""
        self.spooled = self.sent_later = 0
        threading.Thread(target=self._run, name="tracking", daemon=True).start()

    def append(self, item: Item) -> None:
        with self._changed:
            self.journal.append(item)
            self._appended += 1
            self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Wait until all is sent, or a try has failed, or for so long: whether all is sent."""
        with self._changed:
            failures, self._hurry = self._failures, True
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self.drained or self._failures > failures, timeout=seconds
            )
            return self.drained

    def close(self) -> None:
        """Delete the journal if all is sent; else the thread continues while the process lives."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def drained(self) -> bool:
        return self._delivered == self._appended

    @property
    def unavailable(self) -> bool:
        return self._unavailable_since is not None

    def summary(self) -> str | None:
        """What people should know of the server's absence; None where there was none."""
        with self._changed:
            seconds, spooled = self.unavailable_seconds, self.spooled
            if self._unavailable_since is not None:
                seconds += time.monotonic() - self._unavailable_since
                spooled += self._appended - self._first_unavailable
            if not seconds:
                return None
            text = (
                f"MLflow was unavailable for {seconds:.0f} s; {spooled} items spooled, "
                f"{self.sent_later} sent later"
            )
            if self._unavailable_since is not None:
                text += f"; the next run sends the rest, from {self.journal.path}"
            return text

    def _put_off(self, items: list[tuple[Item, int]]) -> bool:
        """The artifact store alone may be unavailable: later items do not wait for it."""
        item, position = items[0]
        if item["kind"] != "artifact" or all(it["kind"] == "artifact" for it, _ in items):
            return False
        with self._changed:
            self.journal.append(item)
            self.journal.mark(position)
            self._appended += 1
            self._delivered += 1
        return True

    def _run(self) -> None:
        pause = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or not self.drained)
                if self.drained:
                    self.journal.close(delete=True)
                    return
                if pause and not self._hurry:
                    self._changed.wait_for(lambda: self._hurry, timeout=pause)
                self._hurry = False
            items = self.journal.unsent()
            try:
                count = self._deliver([item for item, _ in items])
            except Unavailable:
                if self._put_off(items):
                    continue
                pause = min(_LONGEST_PAUSE, 2 * pause or _FIRST_PAUSE)
                with self._changed:
                    self._failures += 1
                    if self._unavailable_since is None:
                        self._unavailable_since = time.monotonic()
                        self._first_unavailable = self._delivered
                    self._changed.notify_all()
                continue
            pause = 0.0
            self.journal.mark(items[count - 1][1])
            with self._changed:
                if self._unavailable_since is not None:
                    self.unavailable_seconds += time.monotonic() - self._unavailable_since
                    self._unavailable_since = None
                    self._last_unavailable = self._appended
                    self.spooled += self._appended - self._first_unavailable
                late = min(self._delivered + count, self._last_unavailable) - self._delivered
                self.sent_later += max(0, late)
                self._delivered += count
                self._changed.notify_all()
