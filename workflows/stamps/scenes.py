"""Drawn and photographed things with captions, composed into scenes that are asked about.

The things are Tux Paint's stamps (Debian's tuxpaint-stamps-default, GPL-2), read from where they
are installed: neither they nor what is composed of them belongs into this repository. Questions are
workflows/demo/fashion.py's four kinds; answers are captions, places, numbers, yes and no. Half of
the training scenes are listed cell by cell instead, by which a fresh projector learns words and
places sooner. Train and test scenes show the same stamps in other compositions: what is measured is
reading a scene, not naming things that were never seen. A third split, `shuffled`, asks the test
questions about other test scenes: what is answered right there is known without looking.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from pipeline.config import OPERATIONAL, Config
from pipeline.durable.stage import Kind, Stage, StageContext
from workflows.demo.fashion import ask, conversation, draw_contents, places, write_splits
from workflows.stamps.parts import STAMPS, require_stamps

SIDE = 224
"""Pixels along a side of a scene."""
SHUFFLED = "shuffled"
NO_THINGS = "symbols"
"""The folder of letters and signs."""
_CAPTION = re.compile(r"(?:an?|the) ([a-z]+(?: [a-z]+)?)[.!]?", re.IGNORECASE)


class ScenesConfig(Config):
    """How many scenes, of how many things."""

    stamps: str = Field(STAMPS, json_schema_extra=OPERATIONAL)
    """Folder of the installed stamps; what is in it is known by `digest`."""
    digest: str | None = "e3e0e3d0177f1c16449b72feb85ad3ac220137a4a1eec3df9a5fafa898498248"
    """`digest_of` the chosen stamps, so that another edition is another set of pictures; null
    skips the check."""
    things: int = Field(24, ge=8)
    """Different captions; drawn once, whatever the seed."""
    train_pictures: int = Field(6000, gt=0)
    """Scenes for training."""
    test_pictures: int = Field(60, gt=1)
    """Scenes for evaluation."""
    seed: int = Field(0, ge=0)
    """Seed of composition and questions; train and test draw from separate streams."""
    grid: Literal[3, 4] = 3
    """Cells along a side."""
    each: int = Field(2, gt=0)
    """Questions of each of four kinds about a scene, as far as it offers them."""
    listed: float = Field(0.5, ge=0, lt=1)
    """Share of the training scenes about which nothing is asked but what is where, in all cells."""


class StampsChanged(ValueError):
    """The installed stamps are not those that the config names."""


def name_of(caption: str) -> str | None:
    """The thing that a caption names in one or two words; None for sentences and names.

    >>> name_of("A green apple."), name_of("An owl."), name_of("Eat your broccoli!")
    ('green apple', 'owl', None)
    """
    found = _CAPTION.fullmatch(caption.strip())
    return found[1] if found and found[1].islower() else None


@lru_cache(maxsize=4)
def find_things(folder: Path, number: int) -> dict[str, tuple[Path, ...]]:
    """Captions and the pictures that have them, in alphabetical order.

    Raises:
        MissingParts: there are no stamps, or fewer captions than asked for.
    """
    found: dict[str, list[Path]] = {}
    for picture in sorted(folder.rglob("*.png")):
        text = picture.with_suffix(".txt")
        if picture.relative_to(folder).parts[0] != NO_THINGS and text.is_file():
            lines = text.read_text(encoding="utf-8").splitlines() or [""]
            if (name := name_of(lines[0])) is not None:
                found.setdefault(name, []).append(picture)
    require_stamps(folder, len(found), number)
    chosen = np.random.default_rng(0).permutation(sorted(found))[:number]
    return {str(name): tuple(found[name]) for name in sorted(chosen)}


def digest_of(folder: Path, number: int) -> str:
    """SHA-256 over captions, file names and contents of the chosen stamps."""
    whole = hashlib.sha256()
    for name, files in find_things(folder, number).items():
        for file in files:
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            whole.update(f"{name} {file.relative_to(folder).as_posix()} {content}\n".encode())
    return whole.hexdigest()


@lru_cache(maxsize=4)
def load_things(folder: Path, number: int) -> tuple[tuple[Image.Image, ...], ...]:
    """RGBA pictures by caption, cut to what is drawn and at most 128 pixels a side."""
    return tuple(
        tuple(_load(file) for file in files) for files in find_things(folder, number).values()
    )


def _load(file: Path) -> Image.Image:
    with Image.open(file) as opened:
        picture = opened.convert("RGBA")
    picture = picture.crop(picture.getchannel("A").getbbox())
    picture.thumbnail((128, 128), Image.Resampling.LANCZOS)
    return picture


def compose(
    rng: np.random.Generator, contents: np.ndarray, things: Sequence[Sequence[Image.Image]]
) -> Image.Image:
    """Paint a scene: every thing at its own size (60 to 95 % of a cell) and place within its cell,
    some mirrored, on a ground that runs from one light colour to another."""
    grid = math.isqrt(len(contents))
    cell = SIDE / grid
    top, bottom = rng.integers(110, 256, size=(2, 1, 1, 3))
    gradient = np.linspace(0, 1, SIDE).reshape(SIDE, 1, 1)
    ground = np.broadcast_to(top + (bottom - top) * gradient, (SIDE, SIDE, 3))
    scene = Image.fromarray(ground.astype(np.uint8)).convert("RGBA")
    for number, content in enumerate(contents):
        if content < 0:
            continue
        same = things[int(content)]
        thing = same[int(rng.integers(len(same)))]
        scale = rng.uniform(0.6, 0.95) * cell / max(thing.size)
        size = [max(1, round(side * scale)) for side in thing.size]
        thing = thing.resize((size[0], size[1]), Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        row, column = divmod(number, grid)
        spare = rng.uniform(0, 1, size=2) * (cell - np.array(size))
        at = int(column * cell + spare[0]), int(row * cell + spare[1])
        scene.alpha_composite(thing, at)
    return scene.convert("RGB")


def make_scene(index: int, split: str, config: ScenesConfig) -> tuple[dict, Image.Image]:
    """One LLaVA record and its picture."""
    folder = Path(config.stamps)
    rng = np.random.default_rng([config.seed, split == "test", index])
    names = tuple(find_things(folder, config.things))
    contents = draw_contents(rng, config.grid**2, len(names))
    picture = compose(rng, contents, load_things(folder, config.things))
    name = f"{split}/{index:06d}"
    listed = split == "train" and rng.random() < config.listed
    questions = [list_cells(contents, names)] if listed else ask(rng, contents, config.each, names)
    return conversation(name, f"{name}.png", questions), picture


def list_cells(contents: np.ndarray, names: Sequence[str]) -> tuple[str, str, str]:
    """(kind, question, answer): every cell and what stands there, row by row."""
    cells = places(math.isqrt(len(contents)))
    things = (names[content] if content >= 0 else "nothing" for content in contents)
    answer = ", ".join(f"{cell}: {thing}" for cell, thing in zip(cells, things, strict=True))
    return "list", "what is where?", answer


def scenes(config: ScenesConfig) -> Stage:
    """The stage that makes the data."""
    return COMPOSE_SCENES.stage(
        name="pictures",
        title="pictures: stamps in scenes",
        config=config,
    )


def compose_scenes(ctx: StageContext, config: ScenesConfig) -> dict[str, Any]:
    """Stage body: train.json, test.json, shuffled.json and images/ in LLaVA's layout."""
    write_scenes(ctx.out, config, ctx.progress)
    return {"train_pictures": config.train_pictures, "test_pictures": config.test_pictures}


COMPOSE_SCENES = Kind(
    id="workflows.stamps_scenes.compose_scenes", version=2, body=compose_scenes, config=ScenesConfig
)


def write_scenes(
    out: Path,
    config: ScenesConfig,
    progress: Callable[[float, float, str], None],
    each: Callable[..., Iterable[dict]] = map,
) -> None:
    """The files below `out`; `each` is `map`, or a pool's.

    Raises:
        MissingParts: the stamps are not installed.
        StampsChanged: they are another edition's.
    """
    found = digest_of(Path(config.stamps), config.things)
    if config.digest is not None and found != config.digest:
        raise StampsChanged(
            f"the stamps in {config.stamps} have digest {found[:12]}, the config says "
            f"{config.digest[:12]}: another edition, or another number of things; set data.digest "
            f"to {found}, or to null"
        )
    counts = {"train": config.train_pictures, "test": config.test_pictures}
    written = write_splits(out, counts, partial(make_scene, config=config), progress, each)
    (out / f"{SHUFFLED}.json").write_text(json.dumps(shuffled(written["test"])))


def shuffled(records: Sequence[dict]) -> list[dict]:
    """Each record with the picture of the next."""
    others = [*records[1:], records[0]]
    return [
        record | {"id": f"{SHUFFLED}/{record['id']}", "image": other["image"]}
        for record, other in zip(records, others, strict=True)
    ]
