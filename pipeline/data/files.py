"""Files at addresses (s3://, gs://, https://, ...): found by name, and read in parts; and what
stands in for a file where a copy went wrong: a git-LFS pointer, a web page, nothing.

What can be read, and with which credentials, is the store's matter (`pipeline.store.open_store`).
"""

import io
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, unquote

from pipeline.store import Store, StoreError, open_store

GLOB = frozenset("*?[")
LFS = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype html", b"<html")
_AHEAD = 1 << 20  # bytes that one request fetches at least


def is_remote(place: str) -> bool:
    return "://" in place


def find(place: str) -> list[str]:
    """The files behind an address, whose last part may be a glob, by name.

    Raises:
        StoreError: there is none.
    """
    root, name = _split(place)
    store = _store(root)
    if GLOB.intersection(name):
        inside = [entry.key for entry in store.list("") if "/" not in entry.key]
        found = [_joined(root, key) for key in inside if fnmatchcase(key, name)]
    else:
        found = [place] if store.size(name) is not None else []
    if not found:
        raise StoreError(
            f"there is no file {place}; name files, or a glob of files in one folder: folders are "
            "read from disks only"
        )
    return found


def open_file(place: str, ahead: int = _AHEAD) -> BinaryIO:
    """A file at a path or an address, to be read from anywhere in it.

    Args:
        ahead: bytes that one request fetches at least.

    Raises:
        StoreError: there is none at the address.
        OSError: there is none at the path.
    """
    if not is_remote(place):
        return Path(place).open("rb")
    root, name = _split(place)
    size = _store(root).size(name)
    if size is None:
        raise StoreError(f"there is no file {place}")
    return io.BufferedReader(_Parts(_store(root), name, size), ahead)


def read_part(place: str, start: int, end: int) -> bytes:
    """Bytes from `start` up to `end` of a file at a path or an address."""
    if not is_remote(place):
        with Path(place).open("rb") as file:
            file.seek(start)
            return file.read(end - start)
    root, name = _split(place)
    return _store(root).read_part(name, start, end)


class _Parts(io.RawIOBase):
    """An object of a store as a file; each `readinto` is one request."""

    def __init__(self, store: Store, key: str, size: int) -> None:
        self._store, self._key, self._size, self._at = store, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = self._store.read_part(self._key, self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _joined(root: str, name: str) -> str:
    """The address of a file in a folder: what `_split` takes apart."""
    return f"{root}{quote(name)}" if root.lower().startswith("file:") else f"{root}/{name}"


def _split(place: str) -> tuple[str, str]:
    """A folder's address and a file's name in it, which may be a glob."""
    root, _, name = place.rpartition("/")
    if place.lower().startswith("file:"):
        return f"{root}/", unquote(name)
    return root, name


@cache
def _store(root: str) -> Store:
    return open_store(root)


def describe(head: bytes) -> str | None:
    """What a file's first bytes show that it is instead, and what to do; None where it may be what
    its name says.

    >>> describe(b"")
    'is empty: fetch it again'
    """
    if head.startswith(LFS):
        return "is a git-LFS pointer, not the file itself: run `git lfs pull` there"
    if not head:
        return "is empty: fetch it again"
    if head[:200].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGES):
        return "is a web page, perhaps an error's or a login's: fetch the file again"
    return None
