"""Cut the small Fashion-MNIST subset that ships here out of Debian's `dataset-fashion-mnist` (MIT
licence).

    apt-get install dataset-fashion-mnist
    python workflows/assets/fashion/make_subset.py /usr/share/datasets/fashion-mnist

Writes train.png, validation.png and test.png beside this file: contact sheets of 28 x 28 pixel
pictures, one row of cells for each class in the order of workflows/demo/fashion.py's `CLASSES`.
test.png holds instances of the official test split only, validation.png such of the official
training split as train.png does not.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

# Fashion-MNIST's label of each class that is used; shirt (6) and coat (4) are left out, since at
# this size people confuse them with T-shirt and pullover as well (the data set's own human
# benchmark is 83.5 %).
LABELS = {
    "t-shirt": 0,
    "trouser": 1,
    "pullover": 2,
    "dress": 3,
    "sandal": 5,
    "sneaker": 7,
    "bag": 8,
    "boot": 9,
}
SHEETS = {
    "train": ("train", slice(0, 750)),
    "validation": ("train", slice(750, 900)),
    "test": ("t10k", slice(0, 150)),
}
"""Official split and instances of each class."""


def read_idx(path: Path) -> np.ndarray:
    """An IDX file (LeCun's format) of bytes as an array; the header holds magic, then one size a
    dimension."""
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, dtype=">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="folder with Debian's idx3-ubyte.gz files")
    source = parser.parse_args().source
    for split, (prefix, chosen) in SHEETS.items():
        pictures = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
        rows = np.stack([pictures[labels == label][chosen] for label in LABELS.values()])
        classes, instances = rows.shape[:2]
        sheet = rows.transpose(0, 2, 1, 3).reshape(classes * 28, instances * 28)
        Image.fromarray(sheet).save(Path(__file__).with_name(f"{split}.png"), optimize=True)


if __name__ == "__main__":
    main()
