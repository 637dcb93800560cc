"""Storage of results: a local folder or an S3 bucket behind one small interface.

Small objects support compare-and-swap: an object's version is a token that `replace` and `delete`
compare; no clock is trusted. Deliberately not a file system: no rename, no append, no locks for
callers. Any other address that fsspec supports can be read but not written.
"""

from __future__ import annotations

from pipeline.store.interface import (
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
    """The store at `runs`, `/data/runs`, `file:///data/runs` or `s3://bucket/prefix`; for reading,
    also at any address that fsspec supports. pipeline/store/places.py parses addresses.

    Nothing is read or written yet. Credentials, region, `AWS_ENDPOINT_URL` and `AWS_CA_BUNDLE` come
    from the environment, never from the address.

    Args:
        encryption: S3's encryption of written objects, `AES256` or `aws:kms`; empty uses the
            bucket's default.
        kms_key: the key for `aws:kms`; empty uses the account's default.
        tags: for every object written from a file.
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
