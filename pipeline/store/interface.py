"""The interface of every store: objects by key, folders up and down, errors with a way out."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

TEMPORARY = ".tmp-"
"""Prefix of a file's name while it is being written; `list` leaves these out."""
PARALLEL = 8
"""Files, and parts of files, transferred at once."""

Progress = Callable[[int], object]
"""Called with the bytes transferred since the last call; negative if a transfer is restarted."""


class StoreError(ValueError):
    """The store can't serve the request: one sentence with the reason and the way out."""


class StoreUnavailable(StoreError):
    """The same may succeed later: no answer, an overloaded server, or a full disk."""


class Altered(StoreError):
    """Received data differs from what was sent or expected: the object is discarded."""


class DiskFull(StoreUnavailable):
    """A file system is full; waiting only helps if space is freed."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One object: its key relative to the store's root, and its size in bytes."""

    key: str
    size: int
    version: str = field(default="", compare=False)
    """Changes when the object is overwritten; empty if a listing doesn't tell."""


class Store(ABC):
    """Objects by key. A key is a relative path with `/`; a prefix is a folder's key, "" for all."""

    root: str

    def uri(self, key: str) -> str:
        """The address of an object or folder, which `open_store` also takes."""
        return f"{self.root}/{checked(key)}" if key else self.root

    @abstractmethod
    def local(self, key: str) -> Path | None:
        """The path of a key if the store is on this machine's file system, else None."""

    @abstractmethod
    def read_versioned(self, key: str) -> tuple[bytes, str] | None:
        """The object and its version; None if it doesn't exist."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """The object's size in bytes; None if it doesn't exist."""

    @abstractmethod
    def _part(self, key: str, start: int, end: int) -> bytes: ...

    @abstractmethod
    def create(self, key: str, data: bytes) -> str | None:
        """Create the object; returns its version, or None if it exists. One of many racers wins."""

    @abstractmethod
    def replace(self, key: str, data: bytes, version: str) -> str | None:
        """Replace the object if it still has this version; returns the new version, or None."""

    @abstractmethod
    def delete(self, key: str, version: str | None = None) -> bool:
        """Delete the object (if it still has this version); returns whether it was deleted."""

    @abstractmethod
    def list(self, prefix: str) -> list[Entry]:
        """Every object below a folder, by key."""

    @abstractmethod
    def holds(self, key: str, path: Path) -> bool:
        """Whether the stored object has the content of the file."""

    @abstractmethod
    def _put(self, path: Path, key: str, progress: Progress | None = None) -> None: ...

    @abstractmethod
    def _get(self, key: str, path: Path, progress: Progress | None = None) -> None: ...

    def read(self, key: str) -> bytes | None:
        """The object's bytes; None if it doesn't exist."""
        stored = self.read_versioned(key)
        return stored[0] if stored else None

    def read_part(self, key: str, start: int, end: int) -> bytes:
        """Bytes from `start` up to `end` of an object.

        Raises:
            Altered: there are fewer, or the server doesn't send the requested range.
        """
        data = self._part(key, start, end) if end > start else b""
        if len(data) != end - start:
            raise Altered(
                f"{self.uri(key)} returned {len(data)} instead of {end - start} bytes from offset "
                f"{start}: it was changed, or its server doesn't support range requests"
            )
        return data

    def check_writable(self) -> None:
        """Raise a StoreError now rather than an hour into a run if the store can't be written, or
        if it ignores conditions on writes, which would mix the results of two runs."""
        key = f".writable-{uuid.uuid4().hex}"
        self.create(key, b"1")
        try:
            self.check_conditions(key, b"1")
        finally:
            self.delete(key)

    def check_conditions(self, key: str, data: bytes) -> None:
        """Raise a StoreError if the existing object can be created again, or replaced by a writer
        with another version.

        Args:
            data: its content, which it keeps in any case.
        """
        ignored = []
        if self.create(key, data) is not None:
            ignored.append("If-None-Match")
        if self.replace(key, data, '"0123456789abcdef0123456789abcdef"') is not None:
            ignored.append("If-Match")
        if ignored:
            raise StoreError(
                f"{self.root} overwrites objects although the request forbids it "
                f"({' and '.join(ignored)} ignored by the server, or removed by a proxy in "
                "between): two runs could mix their results; choose a server with conditional "
                "writes, such as AWS S3 or a current MinIO or Ceph, or a folder"
            )

    def upload(self, folder: Path, prefix: str) -> None:
        """Copy a folder's files to keys below `prefix`, in parallel, and verify them there.

        Raises:
            StoreError: a link that leads out of the folder; content that differs afterwards.
        """
        names: list[str] = []
        inside = folder.resolve()
        for path in sorted(folder.rglob("*")):
            if not path.resolve().is_relative_to(inside):
                raise StoreError(f"{path} leads out of {folder}: write files, not links, there")
            if path.is_file():
                names.append(path.relative_to(folder).as_posix())
        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(lambda name: self.put(folder / name, f"{prefix}/{name}"), names))

    def put(self, path: Path, key: str, progress: Progress | None = None) -> None:
        """Copy a file to a key, overwriting it, and verify it there.

        Raises:
            Altered: its content differs afterwards.
        """
        self._put(path, key, progress)
        if not self.holds(key, path):
            raise Altered(
                f"{self.uri(key)} is not what was sent (its checksum differs): rerun; if that "
                "repeats, check network and storage"
            )

    def download(self, prefix: str, folder: Path) -> None:
        """Copy all objects below `prefix` into a folder: no partial file is ever visible.

        Raises:
            StoreError: no objects; a key that leads out of the folder; a size that differs.
        """
        entries = self.list(prefix)
        if not entries:
            raise StoreError(f"there is nothing at {self.uri(prefix)}; it may have been deleted")
        start = len(prefix) + 1 if prefix else 0
        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(lambda e: self.get(e, folder / checked(e.key[start:])), entries))

    def get(
        self, entry: Entry, path: Path, progress: Progress | None = None, sha256: str = ""
    ) -> None:
        """Copy an object to a file; no partial file is ever visible.

        Raises:
            Altered: it has another size or SHA-256; StoreError if it doesn't exist.
        """
        with appearing(path) as temporary:
            self._get(entry.key, temporary, progress)
            size = temporary.stat().st_size
            if size != entry.size:
                raise Altered(
                    f"{self.uri(entry.key)} has {size} bytes instead of {entry.size}; it was "
                    "truncated: rerun"
                )
            if sha256 and file_sha256(temporary) != sha256:
                raise Altered(
                    f"{self.uri(entry.key)} was altered (its checksum differs): the file was "
                    "discarded"
                )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits; read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked(key: str) -> str:
    """The key, if it stays inside the store.

    Raises:
        StoreError: it doesn't.
    """
    if not key or key.startswith("/") or "\\" in key or {"", ".", ".."} & set(key.split("/")):
        raise StoreError(
            f"{key!r} is not a key: keys are relative paths that stay inside the folder"
        )
    return str(PurePosixPath(key))


@contextlib.contextmanager
def appearing(path: Path, publish: bool = True) -> Iterator[Path]:
    """A temporary file beside `path`, which becomes `path` when the block succeeds."""
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if publish:
            temporary.replace(path)
    except OSError as error:
        raise explain_os(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write(path: Path, data: bytes) -> None:
    """Write a new file; it is on disk when this returns."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def explain_os(error: OSError, path: Path) -> StoreError:
    """The error for a file system that refuses, with the way out."""
    reasons = {
        errno.ENOSPC: "the disk is full; free some space or choose another root",
        errno.EDQUOT: "the quota is used up; free some space or choose another root",
        errno.EACCES: "permission denied; grant write access or choose another root",
        errno.EPERM: "permission denied; grant write access or choose another root",
        errno.EROFS: "the file system is read-only; choose another root",
        errno.ENOTDIR: "a part of that path is a file; choose another root",
        errno.EEXIST: "a part of that path is a file; choose another root",
    }
    kinds = {errno.ENOSPC: DiskFull, errno.EDQUOT: DiskFull, errno.EIO: StoreUnavailable}
    kind = kinds.get(error.errno or 0, StoreError)
    return kind(f"can't use {path}: {reasons.get(error.errno or 0, str(error))}")
