"""Read-only data at any address that fsspec supports (gs://, az://, hf://, https://, ...).

The user installs the package that fsspec needs, and puts credentials into the environment. Results
can't be stored there: most of these systems have no conditional writes.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from pipeline.redact import redact
from pipeline.store.interface import Entry, Progress, Store, StoreError, checked


class ReadOnlyStore(Store):
    """Objects below an address that fsspec supports."""

    def __init__(self, root: str) -> None:
        """Raises a StoreError if fsspec doesn't support the address, or lacks a package for it."""
        import fsspec

        self.root = root.rstrip("/")
        try:
            self._system: Any
            self._system, self._path = fsspec.core.url_to_fs(self.root)
        except ValueError:
            raise StoreError(
                f"{urlsplit(root).scheme}:// is not a kind of store; use a folder or "
                "s3://bucket/prefix (to read data, any address that fsspec supports)"
            ) from None
        except ImportError as error:
            raise StoreError(f"can't read {redact(root)}: {error}") from None

    def local(self, key: str) -> None:
        return None

    def read_versioned(self, key: str) -> tuple[bytes, str] | None:
        with self._explained():
            try:
                data = self._system.cat_file(self._at(key))
            except FileNotFoundError:
                return None
        return data, hashlib.sha256(data).hexdigest()

    def size(self, key: str) -> int | None:
        with self._explained():
            try:
                size = self._system.info(self._at(key))["size"]
            except FileNotFoundError:
                return None
            if size is None:
                raise StoreError(
                    f"the server gives no size for {redact(self.uri(key))}: copy it first"
                )
            return int(size)

    def _part(self, key: str, start: int, end: int) -> bytes:
        with self._explained():
            return bytes(self._system.cat_file(self._at(key), start, end))

    def list(self, prefix: str) -> list[Entry]:
        with self._explained():
            files = self._system.find(self._at(prefix) if prefix else self._path, detail=True)
        start = len(self._path.rstrip("/")) + 1
        return [
            Entry(key=name[start:], size=it["size"], version=_version(it))
            for name, it in sorted(files.items())
        ]

    def _get(self, key: str, path: Path, progress: Progress | None = None) -> None:
        with self._explained():
            self._system.get_file(self._at(key), str(path))
        if progress:
            progress(path.stat().st_size)

    def holds(self, key: str, path: Path) -> NoReturn:
        self._refuse()

    def create(self, key: str, data: bytes) -> NoReturn:
        self._refuse()

    def replace(self, key: str, data: bytes, version: str) -> NoReturn:
        self._refuse()

    def delete(self, key: str, version: str | None = None) -> NoReturn:
        self._refuse()

    def _put(self, path: Path, key: str, progress: Progress | None = None) -> NoReturn:
        self._refuse()

    def _at(self, key: str) -> str:
        return f"{self._path.rstrip('/')}/{checked(key)}"

    def _refuse(self) -> NoReturn:
        raise StoreError(
            f"{redact(self.root)} is read-only; store results in a folder or at s3://bucket/prefix"
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, StoreError):
            raise
        except Exception as error:  # every file system of fsspec has its own errors
            raise StoreError(
                f"can't read {redact(self.root)}: {type(error).__name__}: {redact(str(error))}"
            ) from error


def _version(info: dict[str, Any]) -> str:
    """A value that changes with the content, by the names that file systems use for it."""
    names = ("ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified")
    return next((str(info[name]) for name in names if info.get(name)), "")
