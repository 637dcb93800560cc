"""Decoded pixels to 8-bit RGB: for modes whose values have one meaning; the others are refused.

Pillow converts every mode somehow, and clips what is out of range: floating-point values from 0 to
1 would all become black. Which file opens in which mode is Pillow's; decoding is pictures.py's.
"""

import numpy as np
from PIL import Image

CONVERTED = frozenset(
    ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB")
)
"""Modes of 8 bits a channel and a known colour space, for which Pillow's conversion is right."""
GREY_16 = frozenset(("I;16", "I;16B", "I;16L", "I;16N"))
_WIDE = {"PNG", "PPM"}
"""Formats whose mode I is grey of 16 bits; elsewhere it is 32 bits, or signed."""
_NAMES = {
    "F": "floating-point numbers",
    "I": "32-bit or signed integers",
    "La": "grey multiplied with its alpha",
}
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_WHITE_IS_ZERO, _UNSIGNED = 0, 1


class UnknownPixels(ValueError):
    """The pixels' values have no known range or colour space."""


def to_rgb(picture: Image.Image) -> Image.Image:
    """The picture in RGB. Transparency is dropped, 16 bits and 12 bits are scaled to 8; a palette
    gives its colours; CMYK is converted without a colour profile.

    Raises:
        UnknownPixels: floating-point, 32-bit or signed values, and any mode that isn't known.
    """
    tags = getattr(picture, "tag_v2", {})  # of a TIFF
    mode = picture.mode
    wide = mode in GREY_16 or (mode == "I" and picture.format in _WIDE)
    signed = set(tags.get(_SAMPLE_FORMAT, ())) - {_UNSIGNED}
    if signed or not (wide or mode in CONVERTED):
        raise UnknownPixels(
            f"its pixels are {_NAMES.get(mode, mode)}{' (signed)' if signed else ''}, whose values "
            "have no fixed meaning as colours: convert it to 8 bits a channel, and prepare it again"
        )
    if not wide:
        return picture.convert("RGB")  # LAB since Pillow 13; older ones raise ValueError
    (bits,) = tags.get(_BITS, (16,))
    grey = (np.asarray(picture) >> (bits - 8)).clip(0, 255).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # which Pillow leaves to us, of 16 bits
        grey = 255 - grey
    return Image.fromarray(grey).convert("RGB")
