"""Pictures by name: from a folder, tar files or an address; and how a picture is decoded.

`decode_picture` is how preparation, training and evaluation all read a picture. A
name never leads out of its root: `..`, absolute paths and links to elsewhere are refused, in tar
files too. Tar files are indexed once and read by offset; the index holds 36 bytes a member.
"""

import contextlib
import hashlib
import io
import struct
import tarfile
import warnings
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.data.config import PictureLimits
from pipeline.data.conversations import BadRecord
from pipeline.data.files import GLOB, describe, find, is_remote, open_file, read_part
from pipeline.data.pixels import UnknownPixels, to_rgb
from pipeline.store import Store, StoreError, open_store

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
"""What is decoded. Others (EPS, PDF) would start other programs."""
# What decoders raise on damaged files, by Pillow's documentation and by experience.
_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError,
    ArithmeticError, NotImplementedError, MemoryError, struct.error, zlib.error,
)  # fmt: skip
_GONE = -1  # size of a tar member that is no plain file inside the root


class Pictures(Protocol):
    """A root of pictures."""

    @property
    def waits(self) -> bool:
        """Whether reading waits for a network: then several are read at a time."""

    def read(self, name: str, limits: PictureLimits) -> bytes:
        """The encoded picture. Raises BadRecord: path, missing_picture, picture_size."""


def open_pictures(place: str, folder: Path) -> Pictures:
    """The pictures at a folder, a tar file, a glob of tar files, or such an address.

    Relative places count from `folder`. An address that ends with `.tar` names tar files.

    Raises:
        ValueError: there is nothing there, or it can't be used.
    """
    if is_remote(place):
        if place.endswith(".tar"):
            return TarPictures.index(find(place))
        return StorePictures(open_store(place))
    path = folder / place
    if path.is_file():
        return TarPictures.index([str(path)])
    if GLOB.intersection(path.name):
        return TarPictures.index(sorted(map(str, path.parent.glob(path.name))))
    if path.is_dir():
        entries = sorted(path.iterdir())
        if entries and all(entry.suffix == ".tar" for entry in entries):
            return TarPictures.index(list(map(str, entries)))
    return FolderPictures(path)


class FetchedPictures:
    """Pictures that several threads fetch ahead, for roots whose answers take long."""

    waits = False

    def __init__(
        self, pictures: Pictures, names: Iterable[str], limits: PictureLimits, pool: Executor
    ) -> None:
        self._fetched = {name: pool.submit(pictures.read, name, limits) for name in set(names)}

    def read(self, name: str, limits: PictureLimits) -> bytes:
        return self._fetched[name].result()


@dataclass(frozen=True)
class FolderPictures:
    """Picture files below a folder; one that does not exist is a folder without pictures."""

    root: Path
    waits: ClassVar[bool] = False

    def read(self, name: str, limits: PictureLimits) -> bytes:
        try:
            path = (self.root / name).resolve()
            inside = path.is_relative_to(self.root.resolve())
        except (ValueError, OSError, RuntimeError) as error:  # a NUL, a loop of links
            raise BadRecord("path", f"{name!r}: {error}") from None
        if not inside:
            raise BadRecord("path", f"{name!r} {self._how_out(name)}")
        try:
            if not path.is_file():
                what = "is not a file" if path.exists() else "does not exist"
                raise BadRecord("missing_picture", f"{name!r} {what}")
            _check_bytes(name, path.stat().st_size, limits)
            return path.read_bytes()
        except OSError as error:
            raise BadRecord("missing_picture", f"{name!r}: {error.strerror}") from None

    def _how_out(self, name: str) -> str:
        """How a name leads out of the root, and what to do where a link does."""
        parts = PurePosixPath(name).parts
        places = [self.root.joinpath(*parts[: end + 1]) for end in range(len(parts))]
        link = next((it for it in places if it.is_symlink()), None)
        if PurePosixPath(name).is_absolute() or ".." in parts or link is None:
            return "leads out of the image root"
        return (
            f"leads out of the image root by the symbolic link {link}, which is not followed: name "
            f"{link.resolve()} as the root of a source of its own, or bind-mount or copy it here"
        )


@dataclass(frozen=True)
class StorePictures:
    """Pictures at an address. One that does not answer is an error, never a bad record."""

    store: Store
    waits: ClassVar[bool] = True

    def read(self, name: str, limits: PictureLimits) -> bytes:
        _check_name(name)
        try:
            self.store.uri(key := _normal(name))
        except StoreError as error:
            raise BadRecord("path", f"{name!r}: {error}") from None
        encoded = self.store.read(key)
        if encoded is None:
            raise BadRecord("missing_picture", f"{name!r} does not exist")
        _check_bytes(name, len(encoded), limits)
        return encoded


@dataclass(frozen=True)
class TarPictures:
    """Members of uncompressed tar files, found by a hash of their names."""

    files: tuple[str, ...]
    top: str
    """The folder that all members lie in, if there is one: names may leave it out."""
    keys: np.ndarray
    """Sorted halves of the names' hashes, shape (members, 2)."""
    places: np.ndarray
    """File number, offset and size of each member, shape (members, 3)."""

    @property
    def waits(self) -> bool:
        return is_remote(self.files[0])

    @classmethod
    def index(cls, files: Sequence[str]) -> "TarPictures":
        """Read the members' headers of all files; of two with one name the later counts."""
        if not files:
            raise ValueError("no tar file matches the glob of the pictures")
        keys, places, tops = bytearray(), bytearray(), set()
        for number, path in enumerate(files):
            for name, offset, size in _members(path):
                keys += _name_key(name)
                places += struct.pack("<qqq", number, offset, size)
                tops.add(name.partition("/")[0] if "/" in name else "")
        # Big-endian, so that numbers sort as the hashes' bytes do.
        found = np.frombuffer(bytes(keys), ">u8").astype("u8").reshape(-1, 2)
        table = np.frombuffer(bytes(places), "<i8").reshape(-1, 3)
        order = np.lexsort((np.arange(len(found)), found[:, 1], found[:, 0]))
        top = tops.pop() if len(tops) == 1 else ""
        return cls(tuple(files), top, found[order], table[order])

    def read(self, name: str, limits: PictureLimits) -> bytes:
        _check_name(name)
        normal = _normal(name)
        place = self._find(normal)
        if place is None and self.top:
            place = self._find(f"{self.top}/{normal}")
        if place is None:
            raise BadRecord("missing_picture", f"{name!r} is in none of the tar files")
        number, offset, size = place
        if size == _GONE:
            raise BadRecord("path", f"{name!r} is a link or special file in the tar file")
        _check_bytes(name, size, limits)
        return read_part(self.files[number], offset, offset + size)

    def _find(self, name: str) -> tuple[int, int, int] | None:
        first, second = np.frombuffer(_name_key(name), ">u8").astype("u8")
        start, end = np.searchsorted(self.keys[:, 0], first, "left"), len(self.keys)
        found = None
        while start < end and self.keys[start, 0] == first:
            if self.keys[start, 1] == second:
                number, offset, size = map(int, self.places[start])
                found = (number, offset, size)
            start += 1
        return found


def _members(path: str) -> list[tuple[str, int, int]]:
    """(name, offset, size) of the members; those that lead elsewhere have the size _GONE, those
    with `..` or an absolute path are left out."""
    found = []
    try:
        with (
            open_file(path, ahead=1 << 16) as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every header
                name = _normal(member.name)
                if member.isdir() or member.name.startswith("/") or ".." in name.split("/"):
                    continue
                plain = member.isreg() and not member.issparse()
                found.append((name, member.offset_data, member.size if plain else _GONE))
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"can't read the tar file {PurePosixPath(path).name}: {error}; compressed ones can't "
            "be read by offset: decompress them"
        ) from None
    return found


def _name_key(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _normal(name: str) -> str:
    return str(PurePosixPath(name))


def _check_name(name: str) -> None:
    if not name.isprintable() and any(ord(c) < 32 or "\ud800" <= c <= "\udfff" for c in name):
        raise BadRecord("path", f"{name!r} holds a character that no file's name has")
    if name.startswith("/") or ".." in name.split("/"):
        raise BadRecord("path", f"{name!r} leads out of the image root")


def _check_bytes(name: str, size: int, limits: PictureLimits) -> None:
    if size > limits.max_bytes:
        raise BadRecord(
            "picture_size", f"{name!r} has {size} bytes; up to {limits.max_bytes} are allowed"
        )


def _open(encoded: bytes) -> Image.Image:
    Image.init()  # registers all formats, once
    return Image.open(io.BytesIO(encoded), formats=FORMATS)


def decode_picture(encoded: bytes) -> Image.Image:
    """The picture in RGB as people see it: turned by its EXIF orientation, 16 bits scaled to 8, of
    an animation the first frame. Transparency is dropped, as LLaVA does.

    Raises:
        UnknownPixels: values without a known range, which no 8 bits stand for.
    """
    with _open(encoded) as picture:
        picture.load()
        with contextlib.suppress(*_BROKEN):  # damaged metadata of a sound picture
            ImageOps.exif_transpose(picture, in_place=True)
        return to_rgb(picture)


def check_picture(encoded: bytes, name: str, limits: PictureLimits) -> tuple[int, int]:
    """Decode a picture as training will; its (height, width).

    Raises BadRecord: broken_picture, picture_mode, picture_size.
    """
    if not_a_picture := describe(encoded):
        raise BadRecord("broken_picture", f"{name!r} {not_a_picture}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bombs are refused below, odd metadata is no matter
            with _open(encoded) as picture:
                width, height = picture.size
            short, long = sorted((width, height))
            if (
                short < limits.min_side
                or width * height > limits.max_pixels
                or long > limits.max_aspect * short
            ):
                raise BadRecord(
                    "picture_size",
                    f"{name!r} is {width} x {height}; sides from {limits.min_side}, area up to "
                    f"{limits.max_pixels} pixels, one side up to {limits.max_aspect:g} times the "
                    "other",
                )
            decoded = decode_picture(encoded)
    except BadRecord:
        raise
    except Image.DecompressionBombError as error:
        raise BadRecord("picture_size", f"{name!r}: {error}") from None
    except UnknownPixels as error:
        raise BadRecord("picture_mode", f"{name!r}: {error}") from None
    except UnidentifiedImageError:
        raise BadRecord("broken_picture", f"{name!r} is none of {', '.join(FORMATS)}") from None
    except _BROKEN as error:
        raise BadRecord("broken_picture", f"{name!r}: {error}") from None
    return decoded.height, decoded.width
