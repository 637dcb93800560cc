"""A checkpoint to a store and back: `publish` and `pull`.

A reader sees a whole checkpoint or none: the manifest is created last, and conditionally, after the
checkpoint has been loaded back from the store. Files can't be mixed: whoever uploads first writes
its manifest to a claim, and only uploads of the same content go on beside it. What has arrived is
not sent again, and what is published is never replaced.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pipeline.durable.record import File
from pipeline.publishing.manifest import (
    MANIFEST,
    ExportError,
    difference,
    digest,
    parse,
    strangers,
    verify_folder,
)
from pipeline.store import Altered, DiskFull, Entry, Store, StoreError, StoreUnavailable
from pipeline.store.base import PARALLEL, TEMPORARY, appearing, explain_os, write

CLAIM = "unfinished.json"
"""The manifest of a checkpoint that is on its way; gone when it has arrived."""
TRIES = 5
"""Of each file, beyond those of single requests."""

Report = Callable[[float, float, str], object]
"""Bytes that have arrived, bytes in all, and what is done: `StageContext.progress`."""
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Published:
    """What `publish` or `pull` found and did."""

    address: str
    digest: str
    """SHA-256 of the manifest, which names the checkpoint."""
    files: int
    bytes: int
    moved: int
    """Files that were copied; the others were there already."""
    probe: dict[str, float] = field(default_factory=dict)
    """What the check said of the checkpoint as it lies in the store."""


def publish(
    folder: Path,
    store: Store,
    check: Callable[[Path], dict[str, float]],
    report: Report = lambda done, total, note: None,
) -> Published:
    """Copy an exported folder to a store, where readers see it when it is whole and checked.

    Args:
        check: loads a copy that was fetched back, and raises if it isn't the model that it was.

    Raises:
        ExportError: the folder isn't what its manifest says; something else is there.
        StoreError: the store refuses, or stays away for all tries.
    """
    report(0, 1, "checksums")
    files, text = verify_folder(folder), (folder / MANIFEST).read_bytes()
    entry = Published(
        address=store.root,
        digest=digest(text),
        files=len(files) + 1,
        bytes=sum(file.size for file in files) + len(text),
        moved=0,
    )
    there = _patiently(lambda: {it.key: it.size for it in store.list("")})
    known = {file.path for file in files} | {MANIFEST, CLAIM}
    if others := sorted(there.keys() - known):
        raise ExportError(
            f"{store.root} holds {', '.join(others[:5])}{' ...' if others[5:] else ''}, which this "
            "checkpoint does not: choose an empty place"
        )
    # An object's size is enough: whoever put it there under our claim compared its checksum.
    if _is_published(store, text) and all(there.get(file.path) == file.size for file in files):
        return entry
    with _claimed(store, text):
        bar = _Bar(report, entry.bytes, "uploading")

        def send(file: File) -> bool:
            path = folder / file.path
            if there.get(file.path) == file.size and store.holds(file.path, path):
                bar(file.size)
                return False
            store.put(path, file.path, bar)
            return True

        moved = sum(_in_parallel(lambda file: _patiently(lambda: send(file)), files))
        with tempfile.TemporaryDirectory(prefix="adsc-export-") as scratch:
            copy = Path(scratch)
            _fetch(store, copy, files, _Bar(report, entry.bytes, "reading it back"))
            write(copy / MANIFEST, text)
            report(entry.bytes, entry.bytes, "loading it in a fresh process")
            probe = check(copy)
        _patiently(lambda: store.create(MANIFEST, text))
        if not _is_published(store, text):
            raise StoreError(f"{store.uri(MANIFEST)} was deleted while in use: export again")
    return Published(**(vars(entry) | {"moved": moved, "probe": probe}))


def pull(
    store: Store,
    folder: Path,
    expect: str = "",
    report: Report = lambda done, total, note: None,
) -> Published:
    """Copy a published checkpoint to a folder, which is whole when its manifest.json is there.

    Files that are there are compared, not fetched; ones that differ are left alone and named.

    Args:
        expect: the manifest's SHA-256, for copies from places that others may write to.

    Raises:
        ExportError: nothing is published there, it was altered or cut short, or the folder holds
            something else.
        StoreError: the store refuses, or stays away for all tries; DiskFull.
    """
    text = _patiently(lambda: store.read(MANIFEST))
    if text is None:
        unfinished = _patiently(lambda: store.read(CLAIM)) is not None
        reason = "its export has not ended" if unfinished else f"there is no {MANIFEST}"
        raise ExportError(f"no checkpoint is published at {store.root}: {reason}")
    if expect and digest(text) != expect:
        raise ExportError(
            f"{store.uri(MANIFEST)} has SHA-256 {digest(text)}, not {expect}: another checkpoint, "
            "or one that was tampered with; nothing was copied"
        )
    files = parse(text, store.root)
    _check_listing(store, files)
    with _alone(folder):
        if (folder / MANIFEST).is_file() and (folder / MANIFEST).read_bytes() != text:
            raise ExportError(f"{folder} holds another checkpoint: choose another folder")
        if others := strangers(folder, files):
            raise ExportError(
                f"{folder} holds {', '.join(others[:5])}, which the checkpoint does not: choose an "
                "empty folder"
            )
        bar = _Bar(report, sum(file.size for file in files), "comparing")
        wanted = _missing(folder, files, bar)
        _check_room(folder, wanted)
        bar.note = "downloading"
        _fetch(store, folder, wanted, bar)
        if not (folder / MANIFEST).is_file():
            with appearing(folder / MANIFEST) as temporary:
                write(temporary, text)
    return Published(
        address=store.root,
        digest=digest(text),
        files=len(files) + 1,
        bytes=sum(file.size for file in files) + len(text),
        moved=len(wanted),
    )


def _is_published(store: Store, text: bytes) -> bool:
    """Whether this very checkpoint is published.

    Raises:
        ExportError: another one is.
    """
    found = _patiently(lambda: store.read(MANIFEST))
    if found is not None and found != text:
        raise ExportError(
            f"another checkpoint is published at {store.root} (manifest {digest(found)[:12]}, this "
            f"one has {digest(text)[:12]}): choose another name; what is published is not replaced"
        )
    return found is not None


@contextlib.contextmanager
def _claimed(store: Store, text: bytes) -> Iterator[None]:
    """Nobody uploads other content there; after a failure the claim stays, and the same goes on."""
    found: bytes | None = text
    if _patiently(lambda: store.create(CLAIM, text)) is None:
        found = _patiently(lambda: store.read(CLAIM))
        if found is not None and found != text:
            raise ExportError(
                f"{store.root} holds an unfinished export of another checkpoint (manifest "
                f"{digest(found)[:12]}, this one has {digest(text)[:12]}): finish that one, delete "
                "what is there, or choose another name"
            )
    if found is not None:  # else somebody has just finished
        _patiently(lambda: store.check_conditions(CLAIM, text))
    try:
        _is_published(store, text)  # by somebody who was faster than our claim
    except ExportError:
        store.delete(CLAIM)
        raise
    yield
    _patiently(lambda: store.delete(CLAIM))


def _check_listing(store: Store, files: Sequence[File]) -> None:
    """Every missing or truncated file of a published checkpoint, before anything is fetched."""
    there = {it.key: it.size for it in _patiently(lambda: store.list(""))}
    problems = [
        f"{file.path} is missing"
        if file.path not in there
        else f"{file.path} has {there[file.path]} bytes instead of {file.size}"
        for file in files
        if there.get(file.path) != file.size
    ]
    if problems:
        raise ExportError(
            f"{store.root} isn't what was exported: {'; '.join(problems)}. Export it again"
        )


def _missing(folder: Path, files: Sequence[File], bar: _Bar) -> list[File]:
    """What is to be fetched.

    Raises:
        ExportError: files that are there, and differ.
    """
    wanted = [file for file in files if not os.path.lexists(folder / file.path)]
    problems = []
    for file in files:
        if file not in wanted:
            problems += [found] if (found := difference(folder, file)) else []
            bar(file.size)
    if problems:
        raise ExportError(
            f"{folder} holds other files than the checkpoint: {'; '.join(problems)}. Move them "
            "away, or choose another folder"
        )
    return wanted


def _check_room(folder: Path, files: Sequence[File]) -> None:
    needed, free = sum(file.size for file in files), shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFull(
            f"{folder} has room for {free >> 20} MiB, {needed >> 20} MiB are missing: free some "
            "space or choose another folder"
        )


def _fetch(store: Store, folder: Path, files: Sequence[File], bar: _Bar) -> None:
    def get(file: File) -> None:
        entry = Entry(key=file.path, size=file.size)
        _patiently(lambda: store.get(entry, folder / file.path, bar, file.sha256))

    _in_parallel(get, files)


def _in_parallel(call: Callable[[File], Result], files: Sequence[File]) -> list[Result]:
    """Large files first, so that the last ones to arrive are small. The first error ends it."""
    order = sorted(files, key=lambda file: -file.size)
    with ThreadPoolExecutor(PARALLEL) as pool:
        waiting = [pool.submit(call, file) for file in order]
        try:
            return [it.result() for it in waiting]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _patiently(call: Callable[[], Result]) -> Result:
    """What `call` returns, tried again while the store is away or bytes arrive altered."""
    for tried in range(1, TRIES + 1):
        try:
            return call()
        except DiskFull:
            raise
        except (StoreUnavailable, Altered) as error:
            if tried == TRIES:
                kind = type(error)
                more = f"(tried {TRIES} times; files that arrived whole stay)"
                raise kind(f"{error} {more}") from error
            time.sleep(min(30.0, random.random() * 2**tried))
    raise AssertionError("unreachable")


def check_target(folder: Path) -> None:
    """Whether a folder can be written there, before anything is computed or fetched for it.

    Raises:
        ExportError: it, or a part of its path, is a file, or this user may not write there.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ExportError(f"{there} is a file: name a folder, or one that is not there yet")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ExportError(f"{there} may not be written to by this user: name another folder")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The folder, made if need be, without what killed pulls left, and no second pull into it."""
    check_target(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise explain_os(error, folder) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ExportError(f"another process copies into {folder}: wait for it") from None
        for left in folder.rglob(f"{TEMPORARY}*"):
            left.unlink()
        yield
    finally:
        os.close(descriptor)


class _Bar:
    """Adds up what several threads have moved."""

    def __init__(self, report: Report, total: int, note: str) -> None:
        self.note = note
        self._report, self._total, self._done = report, total, 0
        self._lock = threading.Lock()

    def __call__(self, moved: int) -> None:
        with self._lock:
            self._done += moved
            self._report(min(self._done, self._total), self._total, self.note)
