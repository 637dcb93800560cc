"""Pictures: what is decoded and how, what is refused, and that no name leads out of a root."""

import io
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.conversations import BadRecord
from pipeline.data.pictures import PictureLimits, check_picture, decode_picture, open_pictures

LIMITS = PictureLimits(min_side=14, max_pixels=10_000, max_bytes=50_000, max_aspect=20)


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def noise(mode: str = "RGB") -> Image.Image:
    return Image.effect_noise((60, 40), 50).convert(mode)


def bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99)))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGBA", "PNG"), ("LA", "PNG"), ("P", "GIF"), ("1", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG"),
     ("I;16", "PNG"), ("RGB", "WEBP"), ("RGB", "BMP"), ("CMYK", "TIFF")],
)  # fmt: skip
def test_every_usual_kind_becomes_rgb(mode: str, kind: str) -> None:
    data = encoded(noise(mode), kind)
    assert check_picture(data, "a", LIMITS) == (40, 60)
    picture = decode_picture(data)
    assert picture.mode == "RGB" and picture.size == (60, 40)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = (np.arange(60 * 40).reshape(40, 60) * 27).astype(np.uint16)
    picture = np.asarray(decode_picture(encoded(Image.fromarray(values))))
    assert np.array_equal(picture[..., 0], values >> 8)


def test_orientation_and_the_size_that_follows_from_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(noise(), "JPEG", exif=exif)
    assert decode_picture(data).size == (40, 60)
    assert check_picture(data, "a", LIMITS) == (60, 40)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "broken_picture"),
        (b"not a picture", "broken_picture"),
        (encoded(noise())[:3000], "broken_picture"),
        (encoded(noise(), "JPEG")[:700], "broken_picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n", "broken_picture"),
        (encoded(Image.new("RGB", (1, 1))), "picture_size"),
        (encoded(Image.new("RGB", (40, 3))), "picture_size"),
        (encoded(Image.new("RGB", (14, 281))), "picture_size"),  # resizing would make it a bomb
        (encoded(Image.new("RGB", (400, 400))), "picture_size"),
        (bomb(), "picture_size"),
    ],
)
def test_pictures_that_cannot_be_used(data: bytes, reason: str) -> None:
    with pytest.raises(BadRecord) as caught:
        check_picture(data, "name.png", LIMITS)
    assert caught.value.reason == reason and "'name.png'" in str(caught.value)


def test_damage_anywhere_is_a_bad_record_not_an_error() -> None:
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        whole = np.frombuffer(encoded(noise(), kind), np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            places = rng.integers(0, len(whole), 8)
            damaged[places] = rng.integers(0, 256, 8)
            try:
                check_picture(damaged.tobytes(), "a", LIMITS)
            except BadRecord as bad:
                assert bad.reason in ("broken_picture", "picture_size")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    (root / "deep" / "er").mkdir(parents=True)
    for name in ("a.png", "deep/er/ünï 图.png", "p%20q.png"):
        (root / name).write_bytes(encoded(noise()) + name.encode())
    (tmp_path / "secret.png").write_bytes(b"secret")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "in.png").symlink_to("a.png")
    (root / "loop.png").symlink_to("loop.png")
    (root / "heavy.png").write_bytes(bytes(60_000))
    os.mkfifo(root / "pipe.png")
    return root


def expect(pictures: object, name: str, reason: str) -> None:
    with pytest.raises(BadRecord) as caught:
        pictures.read(name, LIMITS)  # type: ignore[attr-defined]
    assert caught.value.reason == reason, name
    assert repr(name) in str(caught.value)


OUTSIDE = [
    "../secret.png",
    "deep/../../secret.png",
    "/etc/hostname",
    "out.png",
    "nul\0.png",
    "\ud800",
]


def test_a_folder(root: Path) -> None:
    pictures = open_pictures("images", root.parent)
    for name in ("a.png", "deep/er/ünï 图.png", "p%20q.png", "./deep/er/../../a.png"):
        assert pictures.read(name, LIMITS) == (root / name).read_bytes()
    assert pictures.read("in.png", LIMITS) == (root / "a.png").read_bytes()
    for name in (*OUTSIDE, "loop.png"):
        expect(pictures, name, "path")
    for name in ("none.png", "deep", "pipe.png", "p q.png", "%2e%2e/secret.png", "x" * 300):
        expect(pictures, name, "missing_picture")
    expect(pictures, "heavy.png", "picture_size")


def test_tar_files(root: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.png", "deep", "out.png", "heavy.png"):
            tar.add(root / name, f"./images/{name}")
        tar.add(root / "a.png", "../climbs.png")
        entry = tarfile.TarInfo("/absolute.png")
        tar.addfile(entry, io.BytesIO())
        hard = tarfile.TarInfo("images/hard.png")
        hard.type, hard.linkname = tarfile.LNKTYPE, "images/a.png"
        tar.addfile(hard)
    with tarfile.open(tmp_path / "1.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        long = "images/" + "d" * 90 + "/" + "n" * 90 + ".png"
        tar.add(root / "a.png", long)
    for place in ("*.tar", "0.tar"):
        pictures = open_pictures(place, tmp_path)
        for name in ("a.png", "images/a.png", "./a.png", "deep/er/ünï 图.png"):
            file = root / name.removeprefix("images/")
            assert pictures.read(name, LIMITS) == file.read_bytes()
        for name in (*OUTSIDE, "hard.png"):
            expect(pictures, name, "path")
        for name in ("none.png", "deep", "climbs.png", "absolute.png"):
            expect(pictures, name, "missing_picture")
        expect(pictures, "heavy.png", "picture_size")
    assert open_pictures("*.tar", tmp_path).read(long, LIMITS) == (root / "a.png").read_bytes()


def test_many_members_are_found(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "many.tar", "w") as tar:
        for number in range(2000):
            entry = tarfile.TarInfo(f"{number:06d}.jpg")
            entry.size = len(data := str(number).encode())
            tar.addfile(entry, io.BytesIO(data))
    pictures = open_pictures("many.tar", tmp_path)
    for number in range(0, 2000, 7):
        assert pictures.read(f"{number:06d}.jpg", LIMITS) == str(number).encode()
    expect(pictures, "002000.jpg", "missing_picture")


def test_tar_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"can't read the tar file a\.tar"):
        open_pictures("a.tar", tmp_path)
    with tarfile.open(tmp_path / "b.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match="decompress"):
        open_pictures("b.tar", tmp_path)
    with pytest.raises(ValueError, match="no tar file"):
        open_pictures("none-*.tar", tmp_path)


def test_a_bucket(s3_endpoint: str, tmp_path: Path) -> None:
    from pipeline.store import StoreError, open_store

    store = open_store("s3://lab/pictures")
    store.create("deep/ünï.png", b"picture")
    store.create("heavy.png", bytes(60_000))
    open_store("s3://lab/other").create("secret.png", b"secret")
    pictures = open_pictures("s3://lab/pictures", tmp_path)
    assert pictures.read("deep/ünï.png", LIMITS) == b"picture"
    for name in ("../other/secret.png", "/other/secret.png", "nul\0.png", "a\\b.png"):
        expect(pictures, name, "path")
    expect(pictures, "none.png", "missing_picture")
    expect(pictures, "heavy.png", "picture_size")
    with pytest.raises(StoreError, match="no bucket"):  # never a bad record
        open_pictures("s3://nowhere-at-all/x", tmp_path).read("a.png", LIMITS)
