"""A store in an S3 bucket, or on any server that speaks S3. boto3 is imported in this file only.

botocore retries single requests; interrupted bodies are retried here and in boto3's transfers. What
still fails becomes a StoreError with the way out. Large files are uploaded in parts, each with a
SHA-256 that the server checks.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from pipeline.redact import HIDDEN, redact
from pipeline.retry import backoff, retried
from pipeline.store.interface import (
    PARALLEL,
    Entry,
    Progress,
    Store,
    StoreError,
    StoreUnavailable,
    checked,
    file_sha256,
)

ATTEMPTS = 5
"""Attempts at a request, by botocore; and at an interrupted body or a conflicting write."""
READ_SECONDS = 10
"""Read timeout: short enough that a heartbeat has time for a second attempt."""
PART = 8 << 20
"""Bytes of a part of a large transfer: boto3's default."""
_PAGE = 1000  # keys in one page of a listing
_CONFLICT = "ConditionalRequestConflict"  # two conditional writes at once: S3 asks for a retry
_INTERRUPTED = {
    "IncompleteReadError", "ResponseStreamingError", "ReadTimeoutError", "FlexibleChecksumError",
}  # fmt: skip
_UNAVAILABLE = _INTERRUPTED | {
    "SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "500", "502", "503", "504",
    "EndpointConnectionError", "ConnectTimeoutError", "ConnectionClosedError",
    "RetriesExceededError", _CONFLICT, "ProxyConnectionError",
    # The server received other data than was sent.
    "BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch",
}  # fmt: skip
_RENEW = "the credentials have expired; renew them and rerun the same command"
_DENIED = "access is denied; allow list, read, write and delete there"
_SILENT = "nothing answers; check the network and AWS_ENDPOINT_URL"


class S3Store(Store):
    """A prefix in a bucket of S3 or of a server that speaks it, with conditional PUT and DELETE."""

    def __init__(
        self,
        bucket: str,
        prefix: str,
        encryption: str = "",
        kms_key: str = "",
        tags: tuple[tuple[str, str], ...] = (),
    ) -> None:
        """See `open_store`."""
        if encryption not in ("", "AES256", "aws:kms") or (kms_key and encryption != "aws:kms"):
            raise StoreError(
                f"encryption {encryption!r} with key {kms_key!r}: write AES256, or aws:kms with or "
                "without a key"
            )
        self.bucket, self.prefix = bucket, prefix
        self.root = f"s3://{bucket}/{prefix}".rstrip("/")
        self._encryption = encryption
        self._write_options = encryption, kms_key, tags
        self._client: Any = None
        self._transfers: Any = None

    def __reduce__(self) -> tuple[type[S3Store], tuple[Any, ...]]:
        return S3Store, (self.bucket, self.prefix, *self._write_options)

    def local(self, key: str) -> None:
        return None

    def read_versioned(self, key: str) -> tuple[bytes, str] | None:
        def take(answer: Any) -> tuple[bytes, str]:
            return answer["Body"].read(), answer["ETag"]

        stored: tuple[bytes, str] | None = self._call(
            "get_object", "NoSuchKey", "404", take=take, Key=self._name(key)
        )
        return stored

    def size(self, key: str) -> int | None:
        head = self._call("head_object", "NoSuchKey", "404", Key=self._name(key))
        return int(head["ContentLength"]) if head else None

    def _part(self, key: str, start: int, end: int) -> bytes:
        def take(answer: Any) -> bytes:
            return bytes(answer["Body"].read())

        wanted = {"Key": self._name(key), "Range": f"bytes={start}-{end - 1}"}
        return bytes(self._call("get_object", take=take, **wanted))

    def create(self, key: str, data: bytes) -> str | None:
        return self._conditional_put(key, data, IfNoneMatch="*")

    def replace(self, key: str, data: bytes, version: str) -> str | None:
        return self._conditional_put(key, data, IfMatch=version)

    def _conditional_put(self, key: str, data: bytes, **condition: str) -> str | None:
        lost = ("PreconditionFailed", "412", "NoSuchKey", "404")
        arguments: dict[str, Any] = {"Body": data, "ChecksumAlgorithm": "SHA256", **self._extra()}
        arguments |= condition
        answer = self._call("put_object", *lost, Key=self._name(key), **arguments)
        return answer["ETag"] if answer else None

    def delete(self, key: str, version: str | None = None) -> bool:
        name, gone = self._name(key), ("NoSuchKey", "404", "PreconditionFailed", "412")
        # A DELETE of a missing object succeeds: look first, to return the right answer.
        if self.size(key) is None:
            return False
        condition: dict[str, Any] = {"IfMatch": version} if version else {}
        return self._call("delete_object", *gone, Key=name, **condition) is not None

    def list(self, prefix: str) -> list[Entry]:
        below = "/".join(part for part in (self.prefix, prefix and checked(prefix)) if part)
        entries: list[Entry] = []
        token: dict[str, Any] = {}
        while True:
            page = self._call(
                "list_objects_v2", Prefix=f"{below}/" if below else "", MaxKeys=_PAGE, **token
            )
            start = len(self.prefix) + 1 if self.prefix else 0
            entries += [
                Entry(key=item["Key"][start:], size=item["Size"], version=item.get("ETag", ""))
                for item in page.get("Contents", ())
                if not item["Key"].endswith("/")  # "folders" created by consoles
            ]
            if not page.get("IsTruncated"):
                return entries
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def holds(self, key: str, path: Path) -> bool:
        """By the server's checksum; the object is read back if there is none or it differs, since
        the checksum of a multipart upload depends on the size of its parts.

        Raises:
            StoreError: it isn't encrypted as configured.
        """
        name = self._name(key)
        stored = self._call("head_object", "NoSuchKey", "404", Key=name, ChecksumMode="ENABLED")
        if not stored or stored["ContentLength"] != path.stat().st_size:
            return False
        if self._encryption not in ("", actual := stored.get("ServerSideEncryption", "none")):
            raise StoreError(
                f"{self.uri(key)} has encryption {actual}, not {self._encryption}: the server "
                "ignores the setting, or the file existed before; delete it, or leave encryption "
                "out"
            )
        computed = stored.get("ChecksumSHA256", "").partition("-")[0]
        if computed == _sha256_by_parts(path):
            return True

        def take(answer: Any) -> str:
            digest = hashlib.sha256()
            for block in answer["Body"].iter_chunks(1 << 20):
                digest.update(block)
            return digest.hexdigest()

        return bool(self._call("get_object", take=take, Key=name) == file_sha256(path))

    def _put(self, path: Path, key: str, progress: Progress | None = None) -> None:
        extra = {"ChecksumAlgorithm": "SHA256", **self._extra()}
        name = self._name(key)
        self._call("upload_file", filename=str(path), key=name, callback=progress, extra_args=extra)

    def _get(self, key: str, path: Path, progress: Progress | None = None) -> None:
        self._call("download_file", filename=str(path), key=self._name(key), callback=progress)

    def _extra(self) -> dict[str, str]:
        """Arguments of every write: encryption and tags."""
        encryption, key, tags = self._write_options
        extra = {"ServerSideEncryption": encryption, "SSEKMSKeyId": key, "Tagging": urlencode(tags)}
        return {name: value for name, value in extra.items() if value}

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{checked(key)}".lstrip("/")

    def _call(
        self,
        method: str,
        *absent: str,
        take: Callable[[Any], Any] = lambda answer: answer,
        **arguments: Any,
    ) -> Any:
        """One request, or one file's transfer; None if it fails with a code in `absent`.

        `take` reads the body: if that is interrupted, the request is repeated as well.
        """
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        whole_file = method.endswith("_file")  # boto3 repeats parts of it itself

        def once() -> Any:
            if whole_file:
                return getattr(self._transfer(), method)(bucket=self.bucket, **arguments)
            client = self._connected()
            return take(getattr(client, method)(Bucket=self.bucket, **arguments) or {})

        def transient(error: Exception) -> bool:
            code = _code(error)
            return code == _CONFLICT or (code in _INTERRUPTED and not whole_file)

        try:
            return retried(once, transient, backoff(ATTEMPTS - 1, first=0.5))
        except (ClientError, BotoCoreError, Boto3Error) as error:
            code = _code(error)
            if code in absent:
                return None
            raise self._explain(code, str(_cause(error)), method, arguments) from error

    def _connected(self) -> Any:
        if self._client is None:
            import boto3
            from botocore.config import Config as ClientConfig

            self._check_endpoint()
            # A separate session: the default one is shared and not thread-safe.
            self._client = boto3.Session().client(
                "s3",
                config=ClientConfig(
                    connect_timeout=5,
                    read_timeout=READ_SECONDS,
                    max_pool_connections=2 * PARALLEL,
                    retries={"mode": "standard", "max_attempts": ATTEMPTS},
                ),
            )
        return self._client

    def _transfer(self) -> Any:
        """One transfer manager for all files, so that connections and memory stay bounded."""
        if self._transfers is None:
            from boto3.s3.transfer import S3Transfer, TransferConfig, create_transfer_manager

            config = TransferConfig(
                multipart_threshold=PART,
                multipart_chunksize=PART,
                max_concurrency=PARALLEL,
                preferred_transfer_client="classic",
            )
            self._transfers = S3Transfer(manager=create_transfer_manager(self._connected(), config))
        return self._transfers

    def _check_endpoint(self) -> None:
        """Raise a StoreError if the environment variable for the server isn't a valid address."""
        name, endpoint = _endpoint()
        parts = urlsplit(endpoint)
        if endpoint and (parts.scheme not in ("http", "https") or not parts.hostname):
            # Without a scheme `redact` doesn't recognise user:password.
            bare = endpoint.rpartition("://")[2].rpartition("@")[2]
            shown = endpoint if "@" not in endpoint else f"{HIDDEN}@{bare}"
            raise StoreError(
                f"{name}={shown} is not the address of a server; write http://{bare}, or "
                f"https://{bare} if it has a certificate"
            )

    def _explain(self, code: str, text: str, method: str, arguments: dict[str, Any]) -> StoreError:
        name, endpoint = _endpoint()
        place = self.root + (f" at {endpoint}" if endpoint else "")
        other = endpoint.partition("://")[2]
        trust = "its certificate isn't trusted; set AWS_CA_BUNDLE to your authority's certificate"
        if re.search(r"wrong.version.number|record.layer.failure|http.request", text, re.I):
            trust = f"the server there doesn't speak HTTPS; set {name}=http://{other}"
        plain = endpoint.startswith("http:")
        hint = f", or, if the server speaks HTTPS, set {name}=https://{other}" if plain else ""
        lacking = f"the server doesn't support {_feature(method, arguments)}; choose another one"
        reasons = {
            "NoSuchBucket": f"there is no bucket {self.bucket}; create it, or choose another root",
            "NoCredentialsError": "there are no credentials; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or a profile",
            "PartialCredentialsError": "the credentials are incomplete; set AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY",
            "InvalidAccessKeyId": "the access key is unknown; check AWS_ACCESS_KEY_ID",
            "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
            "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
            "ExpiredToken": _RENEW,
            "400": f"the server refused the request without a reason; perhaps {_RENEW}{hint}",
            **dict.fromkeys(("NotImplemented", "501", "MethodNotAllowed", "405"), lacking),
            "AccessDenied": _DENIED,
            "403": _DENIED,
            "404": "there is no such object (or bucket)",
            "SSLError": trust,
            "ConnectionClosedError": "the server closed the connection without an answer; check "
            f"the network and the server{hint}",
            "EndpointConnectionError": _SILENT,
            "ConnectTimeoutError": _SILENT,
            "ReadTimeoutError": f"no byte in {READ_SECONDS:g} s; check the network and the server",
            "BadDigest": "the server received other data than was sent; check the network",
            "FlexibleChecksumError": "received data doesn't match its checksum; check the network",
            "RetriesExceededError": "a transfer was interrupted repeatedly; check network and "
            "server",
            **dict.fromkeys(("SlowDown", "ServiceUnavailable", "503"), "the server is overloaded"),
            **dict.fromkeys(("InternalError", "500"), "the server failed; ask its operator"),
            "NoRegionError": "no region is set; set AWS_DEFAULT_REGION",
            "ParamValidationError": "the bucket's name is not valid; check the root",
        }
        kind = StoreUnavailable if code in _UNAVAILABLE else StoreError
        return kind(redact(f"can't use {place}: {reasons.get(code, f'{code}: {text}')}"))


def _cause(error: Exception) -> BaseException:
    """S3's own error: boto3 wraps that of an upload as text."""
    from boto3.exceptions import Boto3Error

    return error.__context__ or error if isinstance(error, Boto3Error) else error


def _code(error: Exception) -> str:
    """S3's code of an error, or else the name of its class."""
    from botocore.exceptions import ClientError

    cause = _cause(error)
    if isinstance(cause, ClientError):
        return str(cause.response.get("Error", {}).get("Code", ""))
    return type(cause).__name__


def _endpoint() -> tuple[str, str]:
    """The environment variable for the server, and its value; empty for AWS itself."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if value := os.environ.get(name, "").strip():
            return name, value
    return "AWS_ENDPOINT_URL", ""


def _feature(method: str, arguments: dict[str, Any]) -> str:
    """The feature that a request needs beyond plain reads and writes."""
    extra = arguments.get("extra_args") or arguments
    known = {
        "IfNoneMatch": "conditional writes (If-None-Match)",
        "IfMatch": "conditional deletes (If-Match)"
        if method == "delete_object"
        else "conditional writes (If-Match)",
        "Tagging": "tags (x-amz-tagging)",
        "ServerSideEncryption": "encryption (x-amz-server-side-encryption)",
        "Range": "parts of objects (Range)",
        "ChecksumAlgorithm": "checksums (x-amz-checksum-sha256) or uploads in parts",
    }
    return next((text for key, text in known.items() if key in extra), f"{method} requests")


def _sha256_by_parts(path: Path) -> str:
    """S3's SHA-256 of a file: of its content, or for a multipart upload, of the parts' digests."""
    with path.open("rb") as file:
        if path.stat().st_size < PART:
            return base64.b64encode(hashlib.file_digest(file, "sha256").digest()).decode()
        parts = b"".join(
            hashlib.sha256(part).digest() for part in iter(lambda: file.read(PART), b"")
        )
    return base64.b64encode(hashlib.sha256(parts).digest()).decode()
