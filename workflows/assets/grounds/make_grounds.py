"""Cut the photographs that ship here as ground out of scikit-image's wheel (licences: LICENSE).

    pip download --no-deps scikit-image==0.26.0 && unzip scikit_image-*.whl 'skimage/data/*'
    python workflows/assets/grounds/make_grounds.py skimage/data

Writes train.png, validation.png and test.png beside this file: grey squares of SIDE pixels side by
side. No photograph is in two of them.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 192
PHOTOGRAPHS = {
    "train": ("brick.png", "camera.png", "chelsea.png", "rocket.jpg", "astronaut.png"),
    "validation": ("gravel.png",),
    "test": ("grass.png", "coffee.png"),
}


def square(path: Path) -> np.ndarray:
    """The middle of a photograph, grey."""
    with Image.open(path) as opened:
        grey = opened.convert("L")
    side = min(grey.size)
    left, top = (grey.width - side) // 2, (grey.height - side) // 2
    cut = grey.crop((left, top, left + side, top + side))
    return np.asarray(cut.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="folder skimage/data of the wheel")
    source = parser.parse_args().source
    for split, names in PHOTOGRAPHS.items():
        sheet = np.concatenate([square(source / name) for name in names], axis=1)
        Image.fromarray(sheet).save(Path(__file__).with_name(f"{split}.png"), optimize=True)


if __name__ == "__main__":
    main()
