"""Every pixel mode of the pinned Pillow, and every kind of TIFF that it opens: right, or refused.

What is right is computed here from the samples, without Pillow.
"""

from __future__ import annotations

import io
import struct
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.TiffImagePlugin import OPEN_INFO

from pipeline.data.conversations import BadRecord
from pipeline.data.pictures import PictureLimits, check_picture, decode_picture
from pipeline.data.pixels import CONVERTED, GREY_16, UnknownPixels, to_rgb

HEIGHT, WIDTH = 14, 24
LIMITS = PictureLimits(min_side=14, max_pixels=10_000, max_bytes=500_000, max_aspect=20)
RNG = np.random.default_rng(0)


def decoded(encoded: bytes) -> np.ndarray:
    return np.asarray(decode_picture(encoded))


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def pbm(kind: str, most: int, samples: np.ndarray) -> bytes:
    """A file of the PNM family with one sample a pixel, or three."""
    head = f"{kind}\n{samples.shape[1]} {samples.shape[0]}\n{most}\n".encode()
    return head + samples.astype(">u2" if most > 255 else "u1").tobytes()


def tiff(key: tuple[Any, ...], samples: np.ndarray, palette: np.ndarray | None = None) -> bytes:
    """An uncompressed TIFF of (height, width, channels) samples, as the key of OPEN_INFO says."""
    order, photometric, formats, fill, bits, extra = key
    end = "<" if order == b"II" else ">"
    each = bits[0]
    if each in (8, 16, 32):
        kind = {1: "u", 2: "i", 3: "f"}[formats[0]]
        data = samples.astype(f"{end}{kind}{each // 8}").tobytes()
    else:  # rows begin at a byte
        grid = (samples[..., None] >> np.arange(each)[::-1]) & 1
        data = np.packbits(grid.reshape(len(samples), -1).astype(np.uint8), axis=1).tobytes()
    if fill == 2:
        data = bytes(int(f"{byte:08b}"[::-1], 2) for byte in data)
    tags: list[tuple[int, int, tuple[int, ...]]] = [
        (256, 3, (samples.shape[1],)), (257, 3, (samples.shape[0],)), (258, 3, bits),
        (259, 3, (1,)), (262, 3, (photometric,)), (266, 3, (fill,)), (273, 4, (0,)),
        (277, 3, (len(bits),)), (278, 3, (samples.shape[0],)), (279, 4, (len(data),)),
    ]  # fmt: skip
    if palette is not None:
        tags.append((320, 3, tuple(map(int, palette.T.reshape(-1)))))
    if extra:
        tags.append((338, 3, extra))
    if formats != (1,):
        tags.append((339, 3, formats * len(bits)))
    start = 8 + len(data)
    start += start % 2
    beyond = start + 2 + 12 * len(tags) + 4
    directory, rest = struct.pack(end + "H", len(tags)), b""
    for tag, kind, values in tags:
        values = (8,) if tag == 273 else values
        packed = struct.pack(end + str(len(values)) + "_HI"[1 if kind == 3 else 2], *values)
        if len(packed) > 4:
            place, rest = beyond + len(rest), rest + packed
            packed = struct.pack(end + "I", place)
        directory += struct.pack(end + "HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    head = order + struct.pack(end + "HI", 42, start)
    return (head + data).ljust(start, b"\0") + directory + bytes(4) + rest


def expected(key: tuple[Any, ...], samples: np.ndarray, palette: np.ndarray | None) -> np.ndarray:
    """The samples in 8-bit RGB, by TIFF's specification."""
    _, photometric, _, _, bits, extra = key
    if photometric == 3:
        assert palette is not None
        return palette[samples[..., 0]] >> 8
    each = bits[0]
    most = 2**each - 1
    wide = samples.astype(np.int64)
    eight = wide * 255 // most if each < 8 else wide >> (each - 8)
    if photometric in (0, 1):
        grey = 255 - eight if photometric == 0 else eight
        colour, alpha = np.repeat(grey[..., :1], 3, -1), eight[..., 1:2]
    elif photometric == 2:
        colour, alpha = eight[..., :3], eight[..., 3:4]
    elif photometric == 5:
        ink, black = eight[..., :3], eight[..., 3:4]
        return (255 - ink) * (255 - black) // 255
    elif photometric == 8:
        return lab(eight.astype(np.uint8))
    elif len(bits) == 1:  # the luma of YCbCr
        return np.repeat(eight, 3, -1)
    else:
        y, b, r = (eight[..., i].astype(float) - (0, 128, 128)[i] for i in range(3))
        return np.stack([y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b], -1)
    if extra[:1] == (1,):  # the colour was multiplied with it
        return np.where(alpha == 0, colour, colour * 255 // np.maximum(alpha, 1)).clip(0, 255)
    return colour


def lab(samples: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (white of D50) in sRGB, by Bradford's adaptation to D65."""
    y = (samples[..., 0] / 255 * 100 + 16) / 116
    a, b = (samples[..., i].astype(np.int8).astype(float) for i in (1, 2))
    near = np.stack([y + a / 500, y, y - b / 200], -1)
    white = np.array([0.96422, 1, 0.82521])
    xyz = white * np.where(near > 6 / 29, near**3, 3 * (6 / 29) ** 2 * (near - 4 / 29))
    matrix = np.array([
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ])  # fmt: skip
    linear = (xyz @ matrix.T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


UNREAD = {(0, (8,)), (3, (1,)), (3, (2,)), (3, (4,))}
"""Photometric interpretation and bits whose reversed order Pillow lists, and then can't unpack."""


@pytest.mark.parametrize("key", OPEN_INFO, ids=str)
def test_every_tiff_is_right_or_refused(key: tuple[Any, ...]) -> None:
    _, photometric, formats, fill, bits, extra = key
    palette = None
    if formats == (1,):
        samples = RNG.integers(0, 2 ** bits[0], (HEIGHT, WIDTH, len(bits)))
        if photometric == 8:  # colours that RGB has
            samples[..., 0] = 20 + samples[..., 0] * 3 // 4
            samples[..., 1:] = (samples[..., 1:] % 40 - 20) % 256
        if extra[:1] == (1,) and photometric == 2:  # no channel exceeds its alpha
            samples[..., 3:4] |= 1
            samples[..., :3] = samples[..., :3] * samples[..., 3:4] // 2 ** bits[0]
    else:
        samples = RNG.random((HEIGHT, WIDTH, 1)) * 100
    if photometric == 3:
        palette = RNG.integers(0, 2**16, (2 ** bits[0], 3))
    encoded = tiff(key, samples, palette)
    if fill == 2 and (key[1], bits) in UNREAD:
        with pytest.raises(BadRecord, match="broken_picture"):
            check_picture(encoded, "a.tif", LIMITS)
        return
    if formats != (1,) or bits[0] == 32 or OPEN_INFO[key][0] == "La":
        with pytest.raises(BadRecord, match="no fixed meaning as colours") as caught:
            check_picture(encoded, "a.tif", LIMITS)
        assert caught.value.reason == "picture_mode"
        return
    found = decoded(encoded)
    wanted = expected(key, samples, palette)
    # A step of L or b is several of a dark colour's.
    near = 12 if photometric == 8 else 2 if extra[:1] == (1,) or photometric in (5, 6) else 0
    assert found.shape == (HEIGHT, WIDTH, 3)
    difference = np.abs(found.astype(int) - np.clip(wanted, 0, 255)).max()
    assert difference <= near, difference
    assert np.abs(found - np.clip(wanted, 0, 255)).mean() <= 1
    assert check_picture(encoded, "a.tif", LIMITS) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("mode", sorted(Image.MODES))
def test_every_mode_of_pillow_is_known(mode: str) -> None:
    """A mode that a new Pillow brings is refused until somebody has looked at it."""
    picture = Image.new(mode, (WIDTH, HEIGHT))
    if mode in CONVERTED | GREY_16:
        assert to_rgb(picture).mode == "RGB"
    else:
        assert mode in {"F", "I", "HSV", "La"}
        with pytest.raises(UnknownPixels):
            to_rgb(picture)


@pytest.mark.parametrize("most", [1, 100, 255, 256, 1023, 4095, 65535])
@pytest.mark.parametrize("kind", ["P5", "P6"])
def test_pnm_is_scaled_by_its_largest_value(kind: str, most: int) -> None:
    samples = RNG.integers(0, most + 1, (HEIGHT, WIDTH, 3 if kind == "P6" else 1))
    found = decoded(pbm(kind, most, samples)).astype(float)
    assert np.abs(found - 255 * samples / most).max() <= 1


@pytest.mark.parametrize("scale", [b"-1.0", b"1.0"])
def test_portable_float_maps_are_refused(scale: bytes) -> None:
    values = RNG.random((HEIGHT, WIDTH)).astype("<f4")
    encoded = b"Pf\n%d %d\n%s\n" % (WIDTH, HEIGHT, scale) + values.tobytes()
    with pytest.raises(BadRecord, match="floating-point") as caught:
        check_picture(encoded, "a.pfm", LIMITS)
    assert caught.value.reason == "picture_mode"


@pytest.mark.parametrize("transparent", [None, 0, b"\x00\x80\xff"])
def test_palettes_give_their_colours_whatever_is_transparent(transparent: Any) -> None:
    colours = RNG.integers(0, 256, (256, 3))
    numbers = RNG.integers(0, 256, (HEIGHT, WIDTH)).astype(np.uint8)
    picture = Image.fromarray(numbers, "P")
    picture.putpalette(colours.astype(np.uint8).tobytes())
    options = {} if transparent is None else {"transparency": transparent}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in ("PNG", "GIF") if not isinstance(transparent, bytes) else ("PNG",):
            assert np.array_equal(decoded(saved(picture, kind, **options)), colours[numbers])


def test_grey_and_colour_with_alpha_keep_their_values() -> None:
    values = RNG.integers(0, 256, (HEIGHT, WIDTH, 4)).astype(np.uint8)
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        picture = saved(Image.fromarray(values, "RGBA"), kind, **options)
        assert np.array_equal(decoded(picture), values[..., :3]), kind
    grey = saved(Image.fromarray(values[..., :2].copy(), "LA"), "PNG")
    assert np.array_equal(decoded(grey), np.repeat(values[..., :1], 3, -1))


def test_inks_are_subtracted() -> None:
    values = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    values[...] = RNG.integers(0, 256, 4)
    c, m, y, k = (values[0, 0] / 255).tolist()
    wanted = [255 * (1 - ink) * (1 - k) for ink in (c, m, y)]
    for kind in ("TIFF", "JPEG"):
        found = decoded(saved(Image.fromarray(values, "CMYK"), kind))[5, 5]
        assert np.abs(found - wanted).max() <= 3, kind


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)  # fmt: skip
def test_of_several_frames_the_first_counts(kind: str, options: dict[str, Any]) -> None:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("#c02040", "#20c040")]
    encoded = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(decoded(encoded), np.asarray(frames[0]))


TURNS = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a),
}  # fmt: skip


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16", "P", "1", "CMYK", "LA"])
def test_pictures_stand_upright(mode: str, orientation: int) -> None:
    values = RNG.integers(0, 256, (HEIGHT, WIDTH)).astype(np.uint8)
    if mode == "I;16":
        picture = Image.fromarray(values.astype(np.uint16) << 8)
    else:
        picture = Image.fromarray(values).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    kinds = {"CMYK": ("TIFF",), "RGB": ("PNG", "TIFF", "WEBP")}.get(mode, ("PNG", "TIFF"))
    for kind in kinds:
        options = {"lossless": True} if kind == "WEBP" else {}
        plain = decoded(saved(picture, kind, **options))
        found = decoded(saved(picture, kind, exif=exif, **options))
        assert np.array_equal(found, TURNS[orientation](plain)), kind


@given(st.binary(max_size=64), st.sampled_from([b"", b"Pf\n", b"P5\n", b"II*\0", b"\x89PNG\r\n"]))
def test_whatever_it_is_it_is_a_bad_record(data: bytes, head: bytes) -> None:
    with pytest.raises(BadRecord):
        check_picture(head + data, "a", LIMITS)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"", "is empty"),
        (b"\n<!DOCTYPE HTML><html>login</html>", "is a web page"),
    ],
)
def test_what_stands_in_for_a_picture_is_named(content: bytes, says: str) -> None:
    with pytest.raises(BadRecord, match=says) as caught:
        check_picture(content, "a.png", LIMITS)
    assert caught.value.reason == "broken_picture" and "'a.png'" in str(caught.value)
