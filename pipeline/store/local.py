"""A store in a folder, possibly on a file system that several machines share."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.store.interface import (
    TEMPORARY,
    Entry,
    Progress,
    Store,
    StoreError,
    appearing,
    checked,
    explain_os,
    file_sha256,
    write,
)

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Errors of `link` on FAT, exFAT, and some FUSE and SMB mounts."""


class LocalStore(Store):
    """A folder; an object's version is the digest of its content."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = str(folder)

    def local(self, key: str) -> Path:
        return self.folder / checked(key) if key else self.folder

    def read_versioned(self, key: str) -> tuple[bytes, str] | None:
        path = self.folder / checked(key)
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise explain_os(error, path) from error
        return data, _version(data)

    def size(self, key: str) -> int | None:
        path = self.folder / checked(key)
        return path.stat().st_size if path.is_file() else None

    def _part(self, key: str, start: int, end: int) -> bytes:
        with (self.folder / checked(key)).open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def create(self, key: str, data: bytes) -> str | None:
        path = self.folder / checked(key)
        with appearing(path, publish=False) as temporary:
            write(temporary, data)
            try:
                # Atomic: no reader sees a partial object, and no writer replaces it.
                os.link(temporary, path)
            except FileExistsError:
                return None
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                raise StoreError(
                    f"the file system of {self.folder} has no hard links, which are needed to "
                    "publish results atomically; choose a folder on ext4, xfs or NFS, or S3"
                ) from error
        return _version(data)

    def replace(self, key: str, data: bytes, version: str) -> str | None:
        with self._locked():
            stored = self.read_versioned(key)
            if stored is None or stored[1] != version:
                return None
            with appearing(self.folder / checked(key)) as temporary:
                write(temporary, data)
        return _version(data)

    def delete(self, key: str, version: str | None = None) -> bool:
        path = self.folder / checked(key)
        with self._locked():
            if version is not None:
                stored = self.read_versioned(key)
                if stored is None or stored[1] != version:
                    return False
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError):
                return False
            except OSError as error:
                raise explain_os(error, path) from error
        return True

    def list(self, prefix: str) -> list[Entry]:
        return sorted(
            (
                _entry(path, self.folder)
                for path in self.local(prefix).rglob("*")
                if path.is_file() and not path.name.startswith((TEMPORARY, ".lock"))
            ),
            key=lambda entry: entry.key,
        )

    def _put(self, path: Path, key: str, progress: Progress | None = None) -> None:
        with appearing(self.folder / checked(key)) as temporary:
            shutil.copyfile(path, temporary)
        if progress:
            progress(path.stat().st_size)

    def holds(self, key: str, path: Path) -> bool:
        stored = self.folder / checked(key)
        return stored.is_file() and file_sha256(stored) == file_sha256(path)

    def _get(self, key: str, path: Path, progress: Progress | None = None) -> None:
        shutil.copyfile(self.folder / checked(key), path)
        if progress:
            progress(path.stat().st_size)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One compare-and-swap at a time in the whole store: they are small and rare."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / ".lock").open("w")
        except OSError as error:
            raise explain_os(error, self.folder) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _entry(path: Path, folder: Path) -> Entry:
    status = path.stat()
    key = path.relative_to(folder).as_posix()
    return Entry(key=key, size=status.st_size, version=str(status.st_mtime_ns))


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
