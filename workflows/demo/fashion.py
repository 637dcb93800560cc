"""Real pictures, generated questions: Fashion-MNIST things composed into grids, 3 x 3 for the demo,
asked about in eight turns each.

The pictures of things are photographs (Fashion-MNIST, MIT licence); the grids and the questions
are generated. What is written is LLaVA's own format, conversation JSON beside a folder of picture
files, so that everything downstream reads what it would read from LLaVA-665K. Test grids are made
of official test instances only, validation grids of training instances that no training grid shows.
Harder variants of the task (free places, photographs as ground, lists) are fashion_variants.py's.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from workflows.demo.pictures import THING

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "sandal", "sneaker", "bag", "boot")
ROWS = {3: ("top", "middle", "bottom"), 4: ("top", "upper", "lower", "bottom")}
COLUMNS = {
    3: ("left", "center", "right"),
    4: ("left", "center-left", "center-right", "right"),
}
NUMBERS = ("zero", "one", "two", "three", "four", "five")
KINDS = ("what", "where", "count", "any")
ASSETS = Path(__file__).parent.parent / "assets" / "fashion"
TOP_COUNT = 4
STREAMS = {"train": 0, "test": 1, "validation": 2}
"""Each split's own stream of random numbers."""


@lru_cache(maxsize=3)
def load_things(split: str) -> np.ndarray:
    """Things of a split, uint8 of shape (class, instance, 28, 28)."""
    with Image.open(ASSETS / f"{split}.png") as sheet:
        pixels = np.asarray(sheet)
    rows, columns = pixels.shape[0] // THING, pixels.shape[1] // THING
    return pixels.reshape(rows, THING, columns, THING).transpose(0, 2, 1, 3)


@lru_cache(maxsize=2)
def places(grid: int) -> tuple[str, ...]:
    """Names of the cells of a grid, row by row."""
    return tuple(f"{row} {column}" for row in ROWS[grid] for column in COLUMNS[grid])


def plural(name: str) -> str:
    """
    >>> plural("boot"), plural("dress"), plural("brush"), plural("canary")
    ('boots', 'dresses', 'brushes', 'canaries')
    """
    if name.endswith("y") and name[-2:-1] not in "aeiou":
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def draw_contents(
    rng: np.random.Generator, cells: int = 9, number: int = len(CLASSES)
) -> np.ndarray:
    """What stands in each of the cells: an index of `number` classes, or -1 for an empty one.

    Two or three classes occur once (so that "where" has one answer), one to three occur several
    times (so that "how many" has answers above one), and the rest of the cells is empty.
    """
    classes = rng.permutation(number)
    singles = int(rng.integers(2, 4))
    contents = list(classes[:singles])
    for multiple in classes[singles : singles + int(rng.integers(1, 4))]:
        room = cells - len(contents)
        contents += [multiple] * min(room, int(rng.integers(2, TOP_COUNT + 1)))
    contents += [-1] * (cells - len(contents))
    return rng.permutation(np.array(contents, dtype=int))


def compose(
    rng: np.random.Generator, contents: np.ndarray, things: np.ndarray, cell: int = 32
) -> Image.Image:
    """Paint the grid, `cell` pixels a cell: every thing at its own size (22-28 pixels) and place
    within its cell, some mirrored."""
    grid = math.isqrt(len(contents))
    canvas = np.zeros((grid * cell, grid * cell), dtype=np.uint8)
    for number, content in enumerate(contents):
        if content < 0:
            continue
        thing = Image.fromarray(things[content, rng.integers(things.shape[1])])
        side = int(rng.integers(22, THING + 1))
        pixels = np.asarray(thing.resize((side, side), Image.Resampling.BILINEAR))
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        y, x = (
            cell * np.array(divmod(number, grid)) + rng.integers(0, cell - side + 1, size=2)
        ).tolist()
        canvas[y : y + side, x : x + side] = pixels
    return Image.fromarray(canvas)


def ask(
    rng: np.random.Generator,
    contents: np.ndarray,
    each: int = 2,
    classes: Sequence[str] = CLASSES,
) -> list[tuple[str, str, str]]:
    """(kind, question, answer), `each` of each kind as far as the grid offers them. Of two, none
    gives away another's answer."""
    names = places(math.isqrt(len(contents)))
    counts = Counter(int(content) for content in contents if content >= 0)
    single = rng.permutation([content for content, count in counts.items() if count == 1])[:each]
    where = [int(np.flatnonzero(contents == content)[0]) for content in single]
    questions = [
        ("where", f"where is the {classes[content]}?", names[cell])
        for content, cell in zip(single, where, strict=True)
    ]
    for cell in rng.permutation([cell for cell in range(len(names)) if cell not in where])[:each]:
        answer = classes[contents[cell]] if contents[cell] >= 0 else "nothing"
        questions.append(("what", f"what is at the {names[cell]}?", answer))
    return shuffle(rng, questions + ask_numbers(rng, counts, single, each, classes), each)


def ask_numbers(
    rng: np.random.Generator,
    counts: Mapping[int, int],
    single: Iterable[int],
    each: int,
    classes: Sequence[str] = CLASSES,
) -> list[tuple[str, str, str]]:
    """Questions of the kinds `count` and `any` about classes other than those in `single`."""
    others = [content for content in range(len(classes)) if content not in set(single)]
    # Counts from zero up are asked equally often, as far as a picture offers them.
    by_count: dict[int, list[int]] = {}
    for content in others:
        by_count.setdefault(counts[content], []).append(content)
    offered = rng.permutation(sorted(by_count))
    counted = [int(rng.choice(by_count[int(offered[i % len(offered)])])) for i in range(each)]
    questions = [
        ("count", f"how many {plural(classes[content])} are there?", NUMBERS[counts[content]])
        for content in counted
    ]
    for wanted in rng.permutation([True, False] * (each // 2)):
        pool = [c for c in others if (counts[c] > 0) == wanted and c not in counted]
        content = int(rng.choice(pool or others))
        questions.append(
            (
                "any",
                f"is there {article(classes[content])} {classes[content]}?",
                "yes" if counts[content] else "no",
            )
        )
    return questions


def shuffle(
    rng: np.random.Generator, questions: Sequence[tuple[str, str, str]], each: int
) -> list[tuple[str, str, str]]:
    """In random order, and none twice."""
    questions = list(dict.fromkeys(questions)) if each > 2 else questions
    return [questions[i] for i in rng.permutation(len(questions))]


def conversation(name: str, image: str, questions: Iterable[tuple[str, str, str]]) -> dict:
    """LLaVA's record of (kind, question, answer) about a picture."""
    turns, kinds = [], []
    for turn, (kind, question, answer) in enumerate(questions):
        marker = "<image>\n" if turn == 0 else ""
        turns += [{"from": "human", "value": marker + question}, {"from": "gpt", "value": answer}]
        kinds.append(kind)
    return {"id": name, "image": image, "conversations": turns, "kinds": kinds}


def write_splits(
    out: Path,
    counts: Mapping[str, int],
    make: Callable[[int, str], tuple[dict, Image.Image]],
    progress: Callable[[float, float, str], None],
    each: Callable[..., Iterable[dict]] = map,
) -> dict[str, list[dict]]:
    """SPLIT.json and images/SPLIT/ below `out`; returns the records by split.

    Args:
        counts: pictures of each split.
        make: the record and the picture of an index and a split; it can be pickled.
        each: `map`, or a pool's.
    """
    folder = out / "images"
    written: dict[str, list[dict]] = {}
    total, done = sum(counts.values()), 0
    for split, count in counts.items():
        (folder / split).mkdir(parents=True)
        records = written[split] = []
        for record in each(partial(_write, folder=folder, split=split, make=make), range(count)):
            records.append(record)
            done += 1
            if done % 50 == 0:
                progress(done, total, "pictures")
        (out / f"{split}.json").write_text(json.dumps(records))
    return written


def _write(
    index: int, folder: Path, split: str, make: Callable[[int, str], tuple[dict, Image.Image]]
) -> dict:
    record, picture = make(index, split)
    picture.save(folder / record["image"])
    return record
