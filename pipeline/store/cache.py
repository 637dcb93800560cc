"""Copies of remote inputs on this machine; the least recently used are deleted first.

A reader holds a shared lock on the file beside a copy until it closes it or dies, so no copy is
deleted while in use. This is deliberately not a store: everything in it can be fetched again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

VARIABLE = "ADSC_CACHE"
DEFAULT = "~/.cache/adsc"
_ABANDONED = 24 * 3600.0  # seconds after which a partial copy is taken to be of a dead process


def folder(given: str = "") -> Path:
    """The folder for copies on this machine: as given, else $ADSC_CACHE, else ~/.cache/adsc.

    Raises:
        StoreError: it is below a home folder that is unknown.
    """
    from pipeline.store.places import expanded

    try:
        return expanded(given or os.environ.get(VARIABLE, "").strip() or DEFAULT).absolute()
    except ValueError as error:
        raise type(error)(f"{error}; {VARIABLE} names another folder for copies") from None


class Use:
    """A copy in use: `folder` exists until `close`, or the end of this object or the process."""

    def __init__(self, folder: Path, lock: IO[str]) -> None:
        self.folder, self._lock = folder, lock

    def close(self) -> None:
        self._lock.close()


def fetch(cache: Path, name: str, limit: int, make: Callable[[Path], object]) -> Use:
    """The copy called `name`, created by `make(folder)` if it doesn't exist.

    Args:
        limit: size limit of all copies together, in bytes. Unused copies are deleted to keep it;
            the new one is created in any case.
    """
    cache.mkdir(parents=True, exist_ok=True)
    lock = _lock(cache / f"{name}.lock", fcntl.LOCK_SH)
    assert lock is not None
    kept = cache / name
    try:
        if not kept.is_dir():
            with tempfile.TemporaryDirectory(dir=cache, prefix=".tmp-") as scratch:
                copy = Path(scratch) / name
                copy.mkdir()
                make(copy)
                # Another process of this machine may have created the same copy meanwhile.
                with contextlib.suppress(OSError):
                    copy.rename(kept)
            make_room(cache, limit)
        os.utime(cache / f"{name}.lock")
    except BaseException:
        lock.close()
        raise
    return Use(kept, lock)


def make_room(cache: Path, limit: int) -> None:
    """Delete unused copies, least recently used first, until the rest fit in `limit`."""
    for left in cache.glob(".tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                shutil.rmtree(left)
    sizes = {copy: _size(copy) for copy in _copies(cache)}
    total = sum(sizes.values())
    for copy in sorted(sizes, key=_used):
        if total <= limit:
            return
        lock = _lock(copy.with_name(f"{copy.name}.lock"), fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is None:
            continue  # in use
        with lock:
            # Renamed first, so that no partial copy is ever visible.
            trash = Path(tempfile.mkdtemp(dir=cache, prefix=".tmp-"))
            with contextlib.suppress(OSError):
                copy.rename(trash / copy.name)
            copy.with_name(f"{copy.name}.lock").unlink(missing_ok=True)
        shutil.rmtree(trash, ignore_errors=True)
        total -= sizes[copy]


def _copies(cache: Path) -> Iterator[Path]:
    return (path for path in cache.iterdir() if path.is_dir() and not path.name.startswith("."))


def _size(copy: Path) -> int:
    with contextlib.suppress(OSError):  # another process deletes it
        return sum(path.stat().st_size for path in copy.rglob("*") if path.is_file())
    return 0


def _used(copy: Path) -> float:
    for path in (copy.with_name(f"{copy.name}.lock"), copy):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return 0.0


def _lock(path: Path, kind: int) -> IO[str] | None:
    """The locked file; None if `kind` has LOCK_NB and another process holds it."""
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, kind)
            # The lock file may have been deleted with its copy: then it guards nothing.
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError:
            file.close()
            return None
        except FileNotFoundError:
            pass
        file.close()
