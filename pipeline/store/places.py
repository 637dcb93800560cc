"""Addresses of stores and files; the only module that parses them.

A path is taken literally, after expanding `~`. `file://` is a URL: an absolute path with
percent-encoding. The part after `s3://bucket/` is a key, taken literally as AWS's own tools do.
Other schemes are left to fsspec. Nothing is opened here.
"""

from __future__ import annotations

import re
import string
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes

from pipeline.store.interface import StoreError

URI_SAFE = frozenset(string.ascii_letters + string.digits + "-._~!$&'()*+,;=:@/")
"""Characters that are literal in a URI's path. Ray Train (pyarrow) and MLflow read a run's store as
a URI, where any other character is an error or names another place."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]*)://")
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")
_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A parsed address: a path on this machine, a prefix in a bucket, or an address for fsspec."""

    scheme: str
    """Lower case; empty for a path."""
    path: Path | None = None
    """Absolute; None for an address that is not on this machine."""
    bucket: str = ""
    prefix: str = ""
    """In the bucket, without slashes at its ends."""


def parse(text: str) -> Place:
    """Parse the address of a store or a file.

    Raises:
        StoreError: the address is invalid or ambiguous, or a part of it would be ignored.
    """
    if not text.strip():
        raise StoreError("the address is empty; write a folder or s3://bucket/prefix")
    if _has_invisible(text):
        raise StoreError(f"the address {text!r} has an invisible character; remove it")
    match = _SCHEME.match(text)
    if match is None:
        return _without_scheme(text)
    scheme, rest = match[1].lower(), text[match.end() :]
    authority, _, query = rest.partition("?")
    host = re.split("[/#]", authority, maxsplit=1)[0]
    if "@" in host or (scheme == "s3" and query):
        raise StoreError(
            f"the address {scheme}://{authority[len(host.rpartition('@')[0]) :].lstrip('@')} "
            "has credentials or options: put them into the environment (AWS_ACCESS_KEY_ID, "
            "AWS_ENDPOINT_URL)"
        )
    if scheme == "s3":
        return _s3(text, rest)
    if scheme in ("s3a", "s3n"):
        raise StoreError(f"{text} is Hadoop's name for S3; write s3://{rest}")
    if scheme == "file":
        return _file_url(text, rest)
    return Place(scheme=scheme)


def split(text: str) -> tuple[str, str]:
    """A file's address as the address of a store, for `open_store`, and the key in it.

    Raises:
        StoreError: it names no file.
    """
    place = parse(text)
    if place.path is not None:
        root, name = str(place.path.parent), place.path.name
    else:
        root, _, name = text.rpartition("/")
    if not name or (place.scheme == "s3" and not place.prefix):
        raise StoreError(f"{text} names no file")
    return root, name


def expanded(text: str) -> Path:
    """The path with a `~` at its start replaced by the home folder; `./~` stays.

    Raises:
        StoreError: the home folder of that user is unknown.
    """
    if not text.startswith("~"):  # Path drops a leading ./
        return Path(text)
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise StoreError(
            f"{text}: the home folder is unknown, as in a container with a user id without an "
            "account; set HOME, or write the path without ~"
        ) from None


def check_for_runs(root: str) -> None:
    """Check that Ray Train and MLflow can use this store, before anything runs.

    Args:
        root: a store's address, `Store.root`.

    Raises:
        StoreError: Ray Train or MLflow would fail there, or write elsewhere.
    """
    place = parse(root)
    if place.scheme != "s3":
        return
    if strange := sorted(set(place.prefix) - URI_SAFE):
        shown = " ".join("a space" if it == " " else it for it in strange)
        raise StoreError(
            f"{root} can't hold runs: Ray Train and MLflow read it as a URI, where {shown} is not "
            "literal, and would fail or write elsewhere; choose a prefix of letters, digits and "
            "- _ . / ="
        )
    if {"", ".", ".."} & set(place.prefix.split("/") if place.prefix else ()):
        raise StoreError(
            f"{root} can't hold runs: Ray Train resolves empty, . and .. parts of a prefix to "
            "another place; leave them out"
        )


def _has_invisible(text: str) -> bool:
    """Whether a text has control characters, line breaks or undecodable bytes."""
    return any(unicodedata.category(it) in ("Cc", "Cs", "Zl", "Zp") for it in text)


def _without_scheme(text: str) -> Place:
    kind, colon, rest = text.partition(":")
    if colon and kind.lower() == "s3":
        raise StoreError(
            f"{text} names no bucket; write s3://bucket/prefix (or ./{text} for a folder)"
        )
    if colon and kind.lower() == "file":
        if rest.startswith("/"):  # RFC 8089's short form
            return _file_url(text, rest)
        raise StoreError(
            f"{text} is a relative file: URL, which does not exist; write {rest}, "
            f"file:///PATH, or ./{text} for a folder of that name"
        )
    return Place(scheme="", path=expanded(text).absolute())


def _s3(text: str, rest: str) -> Place:
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise StoreError(f"{text} names no bucket; write s3://bucket/prefix")
    if rest.endswith("?"):
        raise StoreError(f"{text} ends in an empty query; leave the ? out")
    if not _BUCKET.fullmatch(bucket):
        raise StoreError(
            f"{text}: {bucket!r} is not a bucket's name (letters, digits, - . _); put a server's "
            "address into AWS_ENDPOINT_URL"
        )
    return Place(scheme="s3", bucket=bucket, prefix=prefix.strip("/"))


def _file_url(text: str, rest: str) -> Place:
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise StoreError(
            f"{text} has {host!r} as its host; write file:///{rest} for the absolute path, or "
            f"{rest} for one relative to this folder"
        )
    if strange := [it for it in "?#" if it in path]:
        raise StoreError(
            f"{text}: in a URL, {strange[0]} ends the path; write %{ord(strange[0]):02X} instead, "
            "or the path without file://"
        )
    if _BROKEN_ESCAPE.search(path) or re.search("%2f", path, re.I):
        raise StoreError(f"{text}: write a % of a name as %25, or the path without file://")
    try:
        decoded = unquote_to_bytes(path).decode()
    except UnicodeDecodeError:
        raise StoreError(f"{text}: its percent-encoding is not UTF-8; write the path") from None
    if _has_invisible(decoded):
        raise StoreError(f"{text} has an invisible character; remove it")
    decoded_path = Path("/") / decoded
    # Versions before 0.1.0 did not decode: point out a store that they wrote.
    literal = Path("/") / path
    if literal != decoded_path and literal.exists() and not decoded_path.exists():
        raise StoreError(
            f"{text} names {decoded_path}, which does not exist, but {literal} does; write the "
            "path that you mean, without file://"
        )
    return Place(scheme="file", path=decoded_path)
