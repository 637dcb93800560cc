"""Harder variants of the grids: things at free places, photographs as ground, lists of all cells.

What they are for: showing whether a method leads only because things stand in rows and columns on
blank ground, and are asked about in one or two words. Photographs are other ones in each split
(assets/grounds, licences there). The base that ships was trained on plain grids: it names things at
free places, has never seen ground, and has never listed a grid.

The random numbers of a picture come from its own stream, so every variant of an index differs.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from workflows.demo.fashion import (
    CLASSES,
    STREAMS,
    ask,
    ask_numbers,
    conversation,
    draw_contents,
    load_things,
    places,
    shuffle,
)
from workflows.demo.pictures import FashionConfig

GROUNDS = Path(__file__).parent.parent / "assets" / "grounds"
SIDES = (18, 27)
"""A thing's side in pixels at a free place: from, and below."""
ROOM = 7
"""Most things at free places: more find no room."""
TRIES = 60
"""Places that are tried for a thing before the picture is begun anew."""
MARGIN = 4
"""Pixels from the border of a ninth within which the position of a thing is ambiguous."""
BRIGHTEST = 110
"""A ground's brightest pixel: things are brighter on average."""
OPAQUE = 48
"""From this brightness on a thing hides the ground."""
LIST = "what is where?"


class Place(NamedTuple):
    """A thing at a free place."""

    content: int
    """Index of its class."""
    top: int
    left: int
    side: int


def make_variant(
    rng: np.random.Generator, index: int, split: str, config: FashionConfig
) -> tuple[dict, Image.Image]:
    """One LLaVA record and its picture."""
    name, length = f"{split}/{index:06d}", config.grid * config.cell
    ground = None
    if config.ground == "photographs":
        ground = draw_ground(rng, split, length)
    if config.layout == "free":
        things = draw_places(rng, length)
        questions = ask_free(rng, things, length, config.each)
    else:
        contents = draw_contents(rng, config.grid**2)
        things = in_cells(rng, contents, config)
        questions = ask(rng, contents, config.each)
        if split == "train" and rng.random() < config.listed:
            questions = [listing(contents)]
    picture = paint(rng, things, load_things(split), length, ground)
    return conversation(name, f"{name}.png", questions), picture


def listing(contents: np.ndarray) -> tuple[str, str, str]:
    """The question about all cells, and its answer in reading order.

    >>> listing(np.array([7, -1, 6, -1, 7, -1, -1, -1, 0]))[2][:52]
    'top left: boot, top center: nothing, top right: bag,'
    """
    cells = places(int(len(contents) ** 0.5))
    words = (CLASSES[content] if content >= 0 else "nothing" for content in contents)
    return "list", LIST, ", ".join(f"{c}: {w}" for c, w in zip(cells, words, strict=True))


def write_lists(out: Path, config: FashionConfig, splits: Iterable[str]) -> None:
    """SPLIT_list.json: the list question about each picture of a split."""
    for split in splits:
        records = []
        for index in range(config.counts[split]):
            rng = np.random.default_rng([config.seed, STREAMS[split], index])
            if config.ground == "photographs":
                draw_ground(rng, split, config.grid * config.cell)
            name = f"{split}/{index:06d}"
            record = conversation(
                name, f"{name}.png", [listing(draw_contents(rng, config.grid**2))]
            )
            records.append(record | {"id": f"{split}_list/{index:06d}"})
        (out / f"{split}_list.json").write_text(json.dumps(records))


def listed_right(answer: str, expected: str) -> float:
    """Share of the entries of a list that are there, in their places and order.

    >>> listed_right("top left: bag, top center: boot", "top left: bag, top center: nothing")
    0.5
    """
    own, wanted = (
        [entry.strip() for entry in text.strip().split(",")] for text in (answer, expected)
    )
    return sum(a == b for a, b in zip(own, wanted, strict=False)) / len(wanted)


def in_cells(rng: np.random.Generator, contents: np.ndarray, config: FashionConfig) -> list[Place]:
    """Each thing at its own size and place within its cell, as in plain grids."""
    things = []
    for number, content in enumerate(contents.tolist()):
        if content >= 0:
            side = int(rng.integers(22, 29))
            row, column = divmod(number, config.grid)
            down, right = rng.integers(0, config.cell - side + 1, size=2).tolist()
            top, left = row * config.cell + down, column * config.cell + right
            things.append(Place(content, top, left, side))
    return things


def draw_places(rng: np.random.Generator, length: int) -> list[Place]:
    """Things anywhere in the picture, none of which touches another."""
    while True:
        contents = draw_contents(rng, ROOM)
        things = _place(rng, [c for c in contents.tolist() if c >= 0], length)
        if things is not None:
            return things


def _place(rng: np.random.Generator, contents: Sequence[int], length: int) -> list[Place] | None:
    things: list[Place] = []
    for content in contents:
        for _ in range(TRIES):
            side = int(rng.integers(*SIDES))
            top, left = rng.integers(0, length - side + 1, size=2).tolist()
            new = Place(content, top, left, side)
            if not any(_touch(new, other) for other in things):
                things.append(new)
                break
        else:
            return None
    return things


def _touch(one: Place, other: Place) -> bool:
    return (
        one.top < other.top + other.side
        and other.top < one.top + one.side
        and one.left < other.left + other.side
        and other.left < one.left + one.side
    )


def ask_free(
    rng: np.random.Generator, things: Sequence[Place], length: int, each: int
) -> list[tuple[str, str, str]]:
    """The four kinds of questions; places are ninths of the picture, asked about only where a
    thing's middle is well inside one, or nothing reaches into it."""
    names, counts = places(3), Counter(thing.content for thing in things)
    inside = {thing: _ninth(thing, length) for thing in things}
    clear = [t for t in things if counts[t.content] == 1 and inside[t] is not None]
    chosen = [clear[i] for i in rng.permutation(len(clear))[:each]]
    questions = [
        ("where", f"where is the {CLASSES[t.content]}?", names[inside[t] or 0]) for t in chosen
    ]
    answers = _answers(things, inside, length)
    left = [ninth for ninth in answers if ninth not in {inside[t] for t in chosen}]
    questions += [
        ("what", f"what is at the {names[ninth]}?", answers[ninth])
        for ninth in rng.permutation(left)[:each].tolist()
    ]
    single = [thing.content for thing in chosen]
    return shuffle(rng, questions + ask_numbers(rng, counts, single, each), each)


def _ninth(thing: Place, length: int) -> int | None:
    """The ninth that a thing's middle is in; None if it is near a border."""
    third = length / 3
    middle = (thing.top + thing.side / 2, thing.left + thing.side / 2)
    if any(place % third < MARGIN or place % third > third - MARGIN for place in middle):
        return None
    row, column = (int(place // third) for place in middle)
    return 3 * row + column


def _answers(
    things: Sequence[Place], inside: dict[Place, int | None], length: int
) -> dict[int, str]:
    """What is at each ninth that can be asked about: one thing, or nothing."""
    third, answers = length // 3, {}
    for ninth in range(9):
        row, column = divmod(ninth, 3)
        area = Place(-1, row * third, column * third, third)
        there = [thing for thing in things if _touch(area, thing)]
        middles = [thing for thing in there if inside[thing] == ninth]
        others = [thing for thing in there if inside[thing] is None]
        if not there:
            answers[ninth] = "nothing"
        elif len(middles) == 1 and not others:
            answers[ninth] = CLASSES[middles[0].content]
    return answers


@lru_cache(maxsize=3)
def load_grounds(split: str) -> np.ndarray:
    """The photographs of a split, uint8 of shape (photographs, side, side)."""
    with Image.open(GROUNDS / f"{split}.png") as sheet:
        pixels = np.asarray(sheet)
    return np.stack(np.split(pixels, pixels.shape[1] // pixels.shape[0], axis=1))


def draw_ground(rng: np.random.Generator, split: str, length: int) -> np.ndarray:
    """(length, length) a darkened part of a photograph, some turned and mirrored."""
    photographs = load_grounds(split)
    whole = photographs[rng.integers(len(photographs))]
    side = int(rng.integers(length // 2, min(whole.shape[0], 2 * length) + 1))
    top, left = rng.integers(0, whole.shape[0] - side + 1, size=2).tolist()
    cut = Image.fromarray(whole[top : top + side, left : left + side])
    pixels = np.asarray(cut.resize((length, length), Image.Resampling.BILINEAR)).astype(float)
    pixels = np.rot90(pixels, int(rng.integers(4)))
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return pixels * (BRIGHTEST * rng.uniform(0.6, 1.0) / max(pixels.max(), 1.0))


def paint(
    rng: np.random.Generator,
    things: Sequence[Place],
    pictures: np.ndarray,
    length: int,
    ground: np.ndarray | None,
) -> Image.Image:
    """Things on their ground, some mirrored; dark parts of a thing let the ground through."""
    canvas = np.zeros((length, length)) if ground is None else ground.copy()
    for content, top, left, side in things:
        thing = Image.fromarray(pictures[content, rng.integers(pictures.shape[1])])
        pixels = np.asarray(thing.resize((side, side), Image.Resampling.BILINEAR)).astype(float)
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        cut = canvas[top : top + side, left : left + side]
        opacity = np.minimum(pixels / OPAQUE, 1.0)
        cut[:] = opacity * pixels + (1 - opacity) * cut
    return Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8))
