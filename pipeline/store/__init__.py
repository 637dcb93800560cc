"""Where results live: a local folder or an S3 bucket behind one small interface.

Small objects have compare-and-swap: an object's version is a token that `replace` and `delete`
compare, and nothing here trusts a clock. Deliberately not a file system: no rename, no append, no
locks for callers. Whatever else fsspec reaches can be read, not written.
"""

from __future__ import annotations

from pipeline.store.base import (
    Altered,
    DiskFull,
    Entry,
    Progress,
    Store,
    StoreError,
    StoreUnavailable,
    file_sha256,
)
from pipeline.store.local import LocalStore
from pipeline.store.places import check_for_runs, parse, split

__all__ = [
    "Altered",
    "DiskFull",
    "Entry",
    "LocalStore",
    "Progress",
    "Store",
    "StoreError",
    "StoreUnavailable",
    "check_for_runs",
    "file_sha256",
    "open_store",
    "split",
]


def open_store(
    root: str, encryption: str = "", kms_key: str = "", tags: tuple[tuple[str, str], ...] = ()
) -> Store:
    """The store at `runs`, `/data/runs`, `file:///data/runs` or `s3://bucket/prefix`; to read from,
    any address that fsspec knows. pipeline/store/places.py says how each is read.

    Nothing is read or written yet. Credentials, region, `AWS_ENDPOINT_URL` and `AWS_CA_BUNDLE` come
    from the environment, never from the address.

    Args:
        encryption: how S3 is to encrypt what is written, `AES256` or `aws:kms`; empty leaves that
            to the bucket.
        kms_key: the key for `aws:kms`; empty takes the account's own.
        tags: of every object that is written from a file.
    """
    place = parse(root)
    if place.scheme == "s3":
        from pipeline.store.s3 import S3Store

        return S3Store(place.bucket, place.prefix, encryption, kms_key, tags)
    if encryption or kms_key or tags:
        raise StoreError(f"{root} is not on S3: it takes neither encryption nor tags")
    if place.path is not None:
        return LocalStore(place.path)
    from pipeline.store.readonly import ReadOnlyStore

    return ReadOnlyStore(root)
