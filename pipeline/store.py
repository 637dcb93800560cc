"""Where results live: a local folder or an S3 bucket behind one small interface.

Small objects have compare-and-swap: an object's version is a token that `replace` and `delete`
compare, and nothing here trusts a clock. Deliberately not a file system: no rename, no append, no
locks for callers. boto3 is imported in this file only.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

_TEMPORARY = ".tmp-"  # prefix of a file's name while it is being written; `list` doesn't see these
_PARALLEL = 8
_PAGE = 1000  # keys in one answer to a listing
_S3_ATTEMPTS = 8
_S3_AWAY = {
    "SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "500", "502", "503", "504",
    "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError",
    "S3UploadFailedError", "RetriesExceededError", "ConditionalRequestConflict",
    "IncompleteReadError", "ResponseStreamingError", "ProxyConnectionError",
}  # fmt: skip
_S3_PART = 8 << 20  # bytes of a part of a large upload: boto3's own default


class StoreError(ValueError):
    """The store can't do what was asked: one sentence with the reason and the way out."""


class StoreAway(StoreError):
    """The same may succeed later: nobody answers, the server is overloaded, or the disk is full."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One object: its key relative to the store's root, and its size in bytes."""

    key: str
    size: int


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits; read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_store(root: str) -> Store:
    """The store at `runs`, `/data/runs`, `file:///data/runs` or `s3://bucket/prefix`.

    Nothing is read or written yet. Credentials, region and `AWS_ENDPOINT_URL` come from the
    environment, never from the address.
    """
    parts = urlsplit(root)
    if parts.scheme == "s3":
        if "@" in parts.netloc or parts.query:
            raise StoreError(
                f"the address s3://{parts.netloc.rpartition('@')[2]}{parts.path} carries "
                "credentials or options: put them into the environment (AWS_ACCESS_KEY_ID, "
                "AWS_ENDPOINT_URL)"
            )
        if not parts.netloc:
            raise StoreError(f"{root} names no bucket; write s3://bucket/prefix")
        return S3Store(parts.netloc, parts.path.strip("/"))
    if parts.scheme == "file":
        return LocalStore(Path(parts.path))
    if parts.scheme and "://" in root:
        raise StoreError(
            f"{parts.scheme}:// is not a kind of store; use a folder or s3://bucket/prefix"
        )
    return LocalStore(Path(root).expanduser().absolute())


class Store(ABC):
    """Objects by key. A key is a relative path with `/`; a prefix is a folder's key, "" for all."""

    root: str

    def uri(self, key: str) -> str:
        """The address of an object or folder, which `open_store` also takes."""
        return f"{self.root}/{_checked(key)}" if key else self.root

    @abstractmethod
    def local(self, key: str) -> Path | None:
        """The path of a key where it lies on this machine's file system, else None."""

    @abstractmethod
    def read_versioned(self, key: str) -> tuple[bytes, str] | None:
        """The object and its version, None where there is none."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> str | None:
        """Create the object: its version, or None where there is one. Of many racers one wins."""

    @abstractmethod
    def replace(self, key: str, data: bytes, version: str) -> str | None:
        """Replace the object if it still has this version: the new version, or None."""

    @abstractmethod
    def delete(self, key: str, version: str | None = None) -> bool:
        """Delete the object (if it still has this version): whether it was deleted."""

    @abstractmethod
    def list(self, prefix: str) -> list[Entry]:
        """Every object below a folder, by key."""

    @abstractmethod
    def _put(self, path: Path, key: str) -> None: ...

    @abstractmethod
    def _holds(self, key: str, path: Path) -> bool:
        """Whether the stored object has the content of the file."""

    @abstractmethod
    def _get(self, key: str, path: Path) -> None: ...

    def read(self, key: str) -> bytes | None:
        """The object's bytes, None where there is none."""
        found = self.read_versioned(key)
        return found[0] if found else None

    def check_writable(self) -> None:
        """Raise a StoreError now rather than an hour into a run."""
        key = f".writable-{uuid.uuid4().hex}"
        self.create(key, b"")
        self.delete(key)

    def upload(self, folder: Path, prefix: str) -> None:
        """Copy a folder's files to keys below `prefix`, in parallel, and check what arrived.

        Raises:
            StoreError: a link that leads out of the folder; a content that differs afterwards.
        """
        names: list[str] = []
        inside = folder.resolve()
        for path in sorted(folder.rglob("*")):
            if not path.resolve().is_relative_to(inside):
                raise StoreError(f"{path} leads out of {folder}: write files, not links, there")
            if path.is_file():
                names.append(path.relative_to(folder).as_posix())
        with ThreadPoolExecutor(_PARALLEL) as pool:
            list(pool.map(lambda name: self._copy(folder / name, f"{prefix}/{name}"), names))

    def _copy(self, path: Path, key: str) -> None:
        self._put(path, key)
        if not self._holds(key, path):
            raise StoreError(
                f"{self.uri(key)} is not what was sent (its checksum differs): run again; if it "
                "stays so, check network and storage"
            )

    def download(self, prefix: str, folder: Path) -> None:
        """Copy all objects below `prefix` into a folder: each file appears whole or not at all.

        Raises:
            StoreError: nothing there; a key that leads out of the folder; a size that differs.
        """
        entries = self.list(prefix)
        if not entries:
            raise StoreError(f"there is nothing at {self.uri(prefix)}; it may have been deleted")
        start = len(prefix) + 1 if prefix else 0
        with ThreadPoolExecutor(_PARALLEL) as pool:
            list(pool.map(lambda e: self._fetch(e, folder / _checked(e.key[start:])), entries))

    def _fetch(self, entry: Entry, path: Path) -> None:
        with _appearing(path) as temporary:
            self._get(entry.key, temporary)
            _check_size(self.uri(entry.key), temporary.stat().st_size, entry.size)


class LocalStore(Store):
    """A folder, possibly a shared file system that several machines see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = str(folder)

    def local(self, key: str) -> Path:
        return self.folder / _checked(key) if key else self.folder

    def read_versioned(self, key: str) -> tuple[bytes, str] | None:
        path = self.folder / _checked(key)
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _explain_os(error, path) from error
        return data, _version(data)

    def create(self, key: str, data: bytes) -> str | None:
        path = self.folder / _checked(key)
        with _appearing(path, publish=False) as temporary:
            _write(temporary, data)
            try:
                # It appears whole or is refused: nobody reads half of it, or overwrites it.
                os.link(temporary, path)
            except FileExistsError:
                return None
        return _version(data)

    def replace(self, key: str, data: bytes, version: str) -> str | None:
        with self._locked():
            found = self.read_versioned(key)
            if found is None or found[1] != version:
                return None
            with _appearing(self.folder / _checked(key)) as temporary:
                _write(temporary, data)
        return _version(data)

    def delete(self, key: str, version: str | None = None) -> bool:
        path = self.folder / _checked(key)
        with self._locked():
            if version is not None:
                found = self.read_versioned(key)
                if found is None or found[1] != version:
                    return False
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError):
                return False
            except OSError as error:
                raise _explain_os(error, path) from error
        return True

    def list(self, prefix: str) -> list[Entry]:
        return sorted(
            (
                Entry(key=path.relative_to(self.folder).as_posix(), size=path.stat().st_size)
                for path in self.local(prefix).rglob("*")
                if path.is_file() and not path.name.startswith((_TEMPORARY, ".lock"))
            ),
            key=lambda entry: entry.key,
        )

    def _put(self, path: Path, key: str) -> None:
        with _appearing(self.folder / _checked(key)) as temporary:
            shutil.copyfile(path, temporary)

    def _holds(self, key: str, path: Path) -> bool:
        return file_sha256(self.folder / _checked(key)) == file_sha256(path)

    def _get(self, key: str, path: Path) -> None:
        shutil.copyfile(self.folder / _checked(key), path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One compare-and-swap at a time in the whole store: they are small and rare."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / ".lock").open("w")
        except OSError as error:
            raise _explain_os(error, self.folder) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class S3Store(Store):
    """A prefix in a bucket of S3 or of a server that speaks it, with conditional PUT and DELETE."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.root = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client: Any = None

    def __reduce__(self) -> tuple[Callable[[str], Store], tuple[str]]:
        return open_store, (self.root,)

    def local(self, key: str) -> None:
        return None

    def read_versioned(self, key: str) -> tuple[bytes, str] | None:
        answer = self._call("get_object", "NoSuchKey", "404", Key=self._name(key))
        return (answer["Body"].read(), answer["ETag"]) if answer else None

    def create(self, key: str, data: bytes) -> str | None:
        return self._conditional_put(key, data, IfNoneMatch="*")

    def replace(self, key: str, data: bytes, version: str) -> str | None:
        return self._conditional_put(key, data, IfMatch=version)

    def _conditional_put(self, key: str, data: bytes, **condition: str) -> str | None:
        lost = ("PreconditionFailed", "412", "NoSuchKey", "404")
        answer = self._call("put_object", *lost, Key=self._name(key), Body=data, **condition)
        return answer["ETag"] if answer else None

    def delete(self, key: str, version: str | None = None) -> bool:
        name, gone = self._name(key), ("NoSuchKey", "404", "PreconditionFailed", "412")
        # A DELETE of what isn't there succeeds: look first, to be able to tell.
        if self._call("head_object", *gone, Key=name) is None:
            return False
        condition = {"IfMatch": version} if version else {}
        return self._call("delete_object", *gone, Key=name, **condition) is not None

    def list(self, prefix: str) -> list[Entry]:
        below = "/".join(part for part in (self.prefix, prefix and _checked(prefix)) if part)
        entries: list[Entry] = []
        token: dict[str, str] = {}
        while True:
            page = self._call(
                "list_objects_v2", Prefix=f"{below}/" if below else "", MaxKeys=_PAGE, **token
            )
            start = len(self.prefix) + 1 if self.prefix else 0
            entries += [
                Entry(key=item["Key"][start:], size=item["Size"])
                for item in page.get("Contents", ())
                if not item["Key"].endswith("/")  # "folders" that consoles make
            ]
            if not page.get("IsTruncated"):
                return entries
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _put(self, path: Path, key: str) -> None:
        checksum = {"ChecksumAlgorithm": "SHA256"}
        name = self._name(key)
        self._call("upload_file", Filename=str(path), Key=name, ExtraArgs=checksum)

    def _holds(self, key: str, path: Path) -> bool:
        """By the checksum that the server computed; read back where it has none, or another one:
        of an upload in parts it depends on their size."""
        name = self._name(key)
        stored = self._call("head_object", "NoSuchKey", "404", Key=name, ChecksumMode="ENABLED")
        if not stored or stored["ContentLength"] != path.stat().st_size:
            return False
        computed = stored.get("ChecksumSHA256", "").partition("-")[0]
        if computed == _s3_sha256(path):
            return True
        found = hashlib.sha256()
        for block in self._call("get_object", Key=name)["Body"].iter_chunks(1 << 20):
            found.update(block)
        return found.hexdigest() == file_sha256(path)

    def _get(self, key: str, path: Path) -> None:
        self._call("download_file", Key=self._name(key), Filename=str(path))

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{_checked(key)}".lstrip("/")

    def _call(self, method: str, *absent: str, **arguments: Any) -> Any:
        """One request; None where its refusal has one of the codes in `absent`."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        for attempt in range(_S3_ATTEMPTS):
            try:
                return getattr(self._connected(), method)(Bucket=self.bucket, **arguments) or {}
            except ClientError as error:
                code = error.response.get("Error", {}).get("Code", "")
                if code in absent:
                    return None
                # Two conditional writes at once: S3 asks to try again.
                if code == "ConditionalRequestConflict" and attempt + 1 < _S3_ATTEMPTS:
                    continue
                raise self._explain(code, str(error)) from error
            except (BotoCoreError, Boto3Error) as error:
                raise self._explain(type(error).__name__, str(error)) from error
        raise AssertionError("unreachable")

    def _connected(self) -> Any:
        if self._client is None:
            import boto3
            from botocore.config import Config as ClientConfig

            # A session of its own: the default one is shared, and not made for threads.
            self._client = boto3.Session().client(
                "s3",
                config=ClientConfig(
                    connect_timeout=5,
                    read_timeout=10,  # a heartbeat must have time for a second try
                    max_pool_connections=2 * _PARALLEL,
                    retries={"mode": "standard", "max_attempts": 5},
                ),
            )
        return self._client

    def _explain(self, code: str, text: str) -> StoreError:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        place = self.root + (f" at {endpoint}" if endpoint else "")
        reasons = {
            "NoSuchBucket": f"there is no bucket {self.bucket}; make it, or choose another root",
            "NoCredentialsError": "there are no credentials; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or a profile",
            "PartialCredentialsError": "the credentials are incomplete; set AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY",
            "InvalidAccessKeyId": "the access key is unknown; check AWS_ACCESS_KEY_ID",
            "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
            "ExpiredToken": "the credentials have expired; renew them",
            "AccessDenied": "access is denied; allow list, read, write and delete there",
            "403": "access is denied; allow list, read, write and delete there",
            "EndpointConnectionError": "nothing answers; check the network and AWS_ENDPOINT_URL",
            "ConnectTimeoutError": "nothing answers; check the network and AWS_ENDPOINT_URL",
            "NoRegionError": "no region is set; set AWS_DEFAULT_REGION",
            "ParamValidationError": "the bucket's name is not valid; check the root",
        }
        kind = StoreAway if code in _S3_AWAY else StoreError
        return kind(f"can't use {place}: {reasons.get(code, f'{code}: {text}')}")


@contextlib.contextmanager
def _appearing(path: Path, publish: bool = True) -> Iterator[Path]:
    """A temporary file beside `path`, which becomes `path` when the block succeeds."""
    temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if publish:
            temporary.replace(path)
    except OSError as error:
        raise _explain_os(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _checked(key: str) -> str:
    """The key, if it stays inside."""
    if not key or key.startswith("/") or "\\" in key or {"", ".", ".."} & set(key.split("/")):
        raise StoreError(
            f"{key!r} is not a key: keys are relative paths that stay inside the folder"
        )
    return str(PurePosixPath(key))


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _s3_sha256(path: Path) -> str:
    """S3's SHA-256 of a file: its own, or of an upload in parts that of the parts' digests."""
    size = _S3_PART
    with path.open("rb") as file:
        if path.stat().st_size < size:
            return base64.b64encode(hashlib.file_digest(file, "sha256").digest()).decode()
        parts = b"".join(
            hashlib.sha256(part).digest() for part in iter(lambda: file.read(size), b"")
        )
    return base64.b64encode(hashlib.sha256(parts).digest()).decode()


def _check_size(uri: str, found: int | None, wanted: int) -> None:
    if found != wanted:
        raise StoreError(
            f"{uri} has {found} bytes instead of {wanted}; it was cut short: run again"
        )


def _explain_os(error: OSError, path: Path) -> StoreError:
    reasons = {
        errno.ENOSPC: "the disk is full; free some space or choose another root",
        errno.EDQUOT: "the quota is used up; free some space or choose another root",
        errno.EACCES: "this user may not write there; allow it or choose another root",
        errno.EPERM: "this user may not write there; allow it or choose another root",
        errno.EROFS: "the file system is read-only; choose another root",
        errno.ENOTDIR: "a part of that path is a file; choose another root",
        errno.EEXIST: "a part of that path is a file; choose another root",
    }
    kind = StoreAway if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else StoreError
    return kind(f"can't use {path}: {reasons.get(error.errno or 0, str(error))}")
