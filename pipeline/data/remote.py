"""Files at addresses: `s3://` through pyarrow, every other kind through fsspec.

Records are read from a copy on this machine, tar files in ranges, single pictures whole. Kinds
other than http(s) need fsspec's package of that kind (gcsfs, adlfs, huggingface_hub, ...).
Credentials come from the environment, never from an address.
"""

import hashlib
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.arrow import ArrowFSWrapper

from pipeline.cache import Use, fetch

CACHE = "~/.cache/adsc"
CACHE_BYTES = 100 << 30
_in_use: list[Use] = []  # copies that this process reads: nobody makes room by deleting them
GLOB = frozenset("*?[")


class RemoteError(ValueError):
    """An address can't be read: which, why, and the way out."""


def is_remote(place: str) -> bool:
    return "://" in place


def find(place: str) -> list[str]:
    """The files behind an address, which may be a glob, by name.

    Raises:
        RemoteError: there is none.
    """
    files, path = _open(place)
    kind = place.partition("://")[0]
    try:
        if not GLOB.intersection(path):
            found = [path] if files.isfile(path) else []
        else:
            found = sorted(path for path in files.glob(path) if files.isfile(path))
    except OSError as error:
        raise _failed(place, error) from None
    if not found:
        raise RemoteError(
            f"there is no file {place}; folders are read from disks only: name files, or a glob"
        )
    return [one if is_remote(one) else f"{kind}://{one}" for one in found]


def read(place: str, start: int | None = None, end: int | None = None) -> bytes:
    """The bytes of a file, or of a part of it.

    Raises:
        FileNotFoundError: there is no such file.
        RemoteError: anything else went wrong.
    """
    files, path = _open(place)
    try:
        return bytes(files.cat_file(path, start, end))
    except FileNotFoundError:
        raise
    except Exception as error:  # noqa: BLE001 - each kind of fsspec's raises its own client's
        raise _failed(place, error) from None


def open_file(place: str) -> IO[bytes]:
    """A file to be read from anywhere in it; little is read ahead."""
    files, path = _open(place)
    try:
        return files.open(path, "rb", block_size=1 << 18)  # type: ignore[no-any-return]
    except Exception as error:  # noqa: BLE001 - as above
        raise _failed(place, error) from None


def local_copy(place: str) -> Path:
    """A copy of a file on this machine, made once for each version of the file.

    It stays at least as long as this process.
    """
    files, path = _open(place)
    try:
        return _copy(place, _version(files.info(path)))
    except Exception as error:  # noqa: BLE001 - as above
        raise _failed(place, error) from None


@cache
def _copy(place: str, version: str) -> Path:
    files, path = _open(place)
    name = place.rpartition("/")[2]
    folder = hashlib.sha256(f"{place} {version}".encode()).hexdigest()[:24]
    use = fetch(
        Path(CACHE).expanduser(),
        f"records-{folder}",
        CACHE_BYTES,
        lambda made: files.get_file(path, str(made / name)),
    )
    _in_use.append(use)
    return use.folder / name


def _version(info: Mapping[str, Any]) -> str:
    names = ("size", "ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified")
    return " ".join(f"{name}={info[name]}" for name in names if info.get(name) is not None)


def _failed(place: str, error: Exception) -> RemoteError:
    why = str(error).strip().partition("\n")[0][:300] or type(error).__name__
    return RemoteError(f"can't read {place}: {why}; check the address, credentials and network")


def _open(place: str) -> tuple[Any, str]:
    kind, _, path = place.partition("://")
    if kind == "s3":
        return _s3(), path
    if "@" in path.partition("/")[0]:
        raise RemoteError(
            f"the address {kind}://{path.rpartition('@')[2]} carries credentials: put them into "
            "the environment"
        )
    try:
        return fsspec.core.url_to_fs(place)  # type: ignore[no-any-return]
    except (ImportError, ValueError) as error:  # the package of this kind, or the kind, is unknown
        raise RemoteError(f"can't read {kind}:// addresses: {error}") from None


@cache
def _s3() -> ArrowFSWrapper:
    from pyarrow.fs import S3FileSystem

    address = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    how: dict[str, Any] = {}
    if address:
        how["scheme"], _, how["endpoint_override"] = address.rstrip("/").partition("://")
        how["region"] = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
    if bundle := os.environ.get("AWS_CA_BUNDLE"):
        how["tls_ca_file_path"] = bundle
    return ArrowFSWrapper(S3FileSystem(**how))
