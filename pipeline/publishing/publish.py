"""Copy a checkpoint to a store and back: `publish` and `pull`.

A reader never sees a partial checkpoint: the manifest is created last, and conditionally, after the
checkpoint has been loaded back from the store. Files can't be mixed: the first uploader writes its
manifest to a claim, and only uploads of the same content may continue beside it. Uploaded files are
not sent again, and a published checkpoint is never replaced.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
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
    unlisted,
    verify_folder,
)
from pipeline.retry import backoff, retried
from pipeline.store import Altered, DiskFull, Entry, Store, StoreError, StoreUnavailable
from pipeline.store.interface import PARALLEL, TEMPORARY, appearing, explain_os, write

CLAIM = "unfinished.json"
"""The manifest of a checkpoint during its upload; deleted at the end."""
TRIES = 5
"""Attempts at each file, on top of the retries of single requests."""

Report = Callable[[float, float, str], object]
"""Bytes transferred, bytes in total, and the current step: `StageContext.progress`."""
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Published:
    """The result of `publish` or `pull`."""

    address: str
    digest: str
    """SHA-256 of the manifest, which identifies the checkpoint."""
    files: int
    bytes: int
    moved: int
    """Files copied; the others existed already."""
    probe: dict[str, float] = field(default_factory=dict)
    """Result of the check of the checkpoint in the store."""


def publish(
    folder: Path,
    store: Store,
    check: Callable[[Path], dict[str, float]],
    report: Report = lambda done, total, note: None,
) -> Published:
    """Copy an exported folder to a store, where it becomes visible once complete and checked.

    Args:
        check: loads a copy fetched back from the store, and raises if it isn't the same model.

    Raises:
        ExportError: the folder doesn't match its manifest; the store holds something else.
        StoreError: the store refuses, or is unavailable in all attempts.
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
    stored = _patiently(lambda: {it.key: it.size for it in store.list("")})
    known = {file.path for file in files} | {MANIFEST, CLAIM}
    if others := sorted(stored.keys() - known):
        raise ExportError(
            f"{store.root} holds {', '.join(others[:5])}{' ...' if others[5:] else ''}, which this "
            "checkpoint does not: choose an empty address"
        )
    # Comparing sizes is enough: an upload under this claim has compared checksums.
    if _is_published(store, text) and all(stored.get(file.path) == file.size for file in files):
        return entry
    with _claimed(store, text):
        bar = _Bar(report, entry.bytes, "uploading")

        def send(file: File) -> bool:
            path = folder / file.path
            if stored.get(file.path) == file.size and store.holds(file.path, path):
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
            raise StoreError(f"{store.uri(MANIFEST)} was deleted meanwhile: export again")
    return Published(**(vars(entry) | {"moved": moved, "probe": probe}))


def pull(
    store: Store,
    folder: Path,
    expect: str = "",
    report: Report = lambda done, total, note: None,
) -> Published:
    """Copy a published checkpoint to a folder, which is complete once it has a manifest.json.

    Existing files are compared, not fetched; those that differ are kept and reported.

    Args:
        expect: the manifest's SHA-256, for addresses that others can write to.

    Raises:
        ExportError: nothing is published there, it was altered or truncated, or the folder holds
            something else.
        StoreError: the store refuses, or is unavailable in all attempts; DiskFull.
    """
    text = _patiently(lambda: store.read(MANIFEST))
    if text is None:
        unfinished = _patiently(lambda: store.read(CLAIM)) is not None
        reason = "its export has not finished" if unfinished else f"there is no {MANIFEST}"
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
        if others := unlisted(folder, files):
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
    """Whether this checkpoint is published.

    Raises:
        ExportError: another one is.
    """
    published = _patiently(lambda: store.read(MANIFEST))
    if published is not None and published != text:
        raise ExportError(
            f"another checkpoint is published at {store.root} (manifest {digest(published)[:12]}, "
            f"this one has {digest(text)[:12]}): choose another name; a published checkpoint is "
            "never replaced"
        )
    return published is not None


@contextlib.contextmanager
def _claimed(store: Store, text: bytes) -> Iterator[None]:
    """Exclude uploads of other content; after a failure the claim stays, to resume the same one."""
    claim: bytes | None = text
    if _patiently(lambda: store.create(CLAIM, text)) is None:
        claim = _patiently(lambda: store.read(CLAIM))
        if claim is not None and claim != text:
            raise ExportError(
                f"{store.root} holds an unfinished export of another checkpoint (manifest "
                f"{digest(claim)[:12]}, this one has {digest(text)[:12]}): finish that one, delete "
                "its files, or choose another name"
            )
    if claim is not None:  # else another export has just finished
        _patiently(lambda: store.check_conditions(CLAIM, text))
    try:
        _is_published(store, text)  # another export may have finished before the claim
    except ExportError:
        store.delete(CLAIM)
        raise
    yield
    _patiently(lambda: store.delete(CLAIM))


def _check_listing(store: Store, files: Sequence[File]) -> None:
    """Raise an ExportError with every missing or truncated file, before anything is fetched."""
    sizes = {it.key: it.size for it in _patiently(lambda: store.list(""))}
    problems = [
        f"{file.path} is missing"
        if file.path not in sizes
        else f"{file.path} has {sizes[file.path]} bytes instead of {file.size}"
        for file in files
        if sizes.get(file.path) != file.size
    ]
    if problems:
        raise ExportError(
            f"{store.root} isn't what was exported: {'; '.join(problems)}. Export it again"
        )


def _missing(folder: Path, files: Sequence[File], bar: _Bar) -> list[File]:
    """The files to fetch.

    Raises:
        ExportError: existing files differ.
    """
    wanted = [file for file in files if not os.path.lexists(folder / file.path)]
    problems = []
    for file in files:
        if file not in wanted:
            problems += [problem] if (problem := difference(folder, file)) else []
            bar(file.size)
    if problems:
        raise ExportError(
            f"{folder} holds other files than the checkpoint: {'; '.join(problems)}. Move them "
            "elsewhere, or choose another folder"
        )
    return wanted


def _check_room(folder: Path, files: Sequence[File]) -> None:
    needed, free = sum(file.size for file in files), shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFull(
            f"{folder} has {free >> 20} MiB free, but {needed >> 20} MiB are to be fetched: free "
            "some space or choose another folder"
        )


def _fetch(store: Store, folder: Path, files: Sequence[File], bar: _Bar) -> None:
    def get(file: File) -> None:
        entry = Entry(key=file.path, size=file.size)
        _patiently(lambda: store.get(entry, folder / file.path, bar, file.sha256))

    _in_parallel(get, files)


def _in_parallel(call: Callable[[File], Result], files: Sequence[File]) -> list[Result]:
    """Call for all files, largest first, so that no large one is left to the end. The first error
    cancels the rest."""
    order = sorted(files, key=lambda file: -file.size)
    with ThreadPoolExecutor(PARALLEL) as pool:
        waiting = [pool.submit(call, file) for file in order]
        try:
            return [it.result() for it in waiting]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _patiently(call: Callable[[], Result]) -> Result:
    """The result of `call`, retried if the store is unavailable or data arrives altered."""
    try:
        return retried(call, _transient, backoff(TRIES - 1, first=2.0))
    except (StoreUnavailable, Altered) as error:
        if not _transient(error):
            raise
        more = f"(tried {TRIES} times; completed files are kept)"
        raise type(error)(f"{error} {more}") from error


def _transient(error: Exception) -> bool:
    return isinstance(error, StoreUnavailable | Altered) and not isinstance(error, DiskFull)


def check_target(folder: Path) -> None:
    """Check that a folder can be written, before anything is computed or fetched for it.

    Raises:
        ExportError: it, or a part of its path, is a file, or this user may not write there.
    """
    parents = (folder.absolute(), *folder.absolute().parents)
    existing = next(path for path in parents if path.exists())
    if not existing.is_dir():
        raise ExportError(f"{existing} is a file: name a folder, or one that does not exist yet")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ExportError(f"no permission to write to {existing}: name another folder")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Create the folder if missing, exclude a second pull, and delete leftovers of killed ones."""
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
            raise ExportError(f"another process is copying into {folder}: wait for it") from None
        for left in folder.rglob(f"{TEMPORARY}*"):
            left.unlink()
        yield
    finally:
        os.close(descriptor)


class _Bar:
    """Sums up the bytes transferred by several threads."""

    def __init__(self, report: Report, total: int, note: str) -> None:
        self.note = note
        self._report, self._total, self._done = report, total, 0
        self._lock = threading.Lock()

    def __call__(self, moved: int) -> None:
        with self._lock:
            self._done += moved
            self._report(min(self._done, self._total), self._total, self.note)
