"""Real pictures, generated questions: Fashion-MNIST things composed into 3 x 3 grids, asked about
in eight turns each.

The pictures of things are photographs (Fashion-MNIST, MIT licence); the grids and the questions
are generated. What is written is LLaVA's own format, conversation JSON beside a folder of picture
files, so that everything downstream reads what it would read from LLaVA-665K. Test grids are made
of official test instances only.
"""

import json
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import Field

from pipeline.config import Config
from pipeline.stage import StageContext

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "sandal", "sneaker", "bag", "boot")
PLACES = tuple(
    f"{row} {column}"
    for row in ("top", "middle", "bottom")
    for column in ("left", "center", "right")
)
NUMBERS = ("zero", "one", "two", "three", "four", "five")
KINDS = ("what", "where", "count", "any")
ASSETS = Path(__file__).parent / "assets" / "fashion"
SIDE, CELL, THING = 96, 32, 28  # pixels: a grid's side, a cell's side, a thing's side as shipped
TOP_COUNT = 4


class FashionConfig(Config):
    """How many grids to compose, and from which seed."""

    train_pictures: int = Field(2000, gt=0)
    """Grids for training, eight questions each."""
    test_pictures: int = Field(200, gt=0)
    """Grids for evaluation, eight questions each, from official test instances."""
    seed: int = 0
    """Seed of composition and questions; train and test draw from separate streams."""


@lru_cache(maxsize=2)
def load_things(split: str) -> np.ndarray:
    """Things of a split, uint8 of shape (class, instance, 28, 28)."""
    with Image.open(ASSETS / f"{split}.png") as sheet:
        pixels = np.asarray(sheet)
    rows, columns = pixels.shape[0] // THING, pixels.shape[1] // THING
    return pixels.reshape(rows, THING, columns, THING).transpose(0, 2, 1, 3)


def plural(name: str) -> str:
    return name + ("es" if name.endswith("s") else "s")


def draw_contents(rng: np.random.Generator) -> np.ndarray:
    """What stands in each of the nine cells: a class index, or -1 for an empty one.

    Two or three classes occur once (so that "where" has one answer), one to three occur several
    times (so that "how many" has answers above one), and the rest of the cells is empty.
    """
    classes = rng.permutation(len(CLASSES))
    singles = int(rng.integers(2, 4))
    contents = list(classes[:singles])
    for multiple in classes[singles : singles + int(rng.integers(1, 4))]:
        room = len(PLACES) - len(contents)
        contents += [multiple] * min(room, int(rng.integers(2, TOP_COUNT + 1)))
    contents += [-1] * (len(PLACES) - len(contents))
    return rng.permutation(np.array(contents, dtype=int))


def compose(rng: np.random.Generator, contents: np.ndarray, things: np.ndarray) -> Image.Image:
    """Paint the grid: every thing at its own size (22-28 pixels) and place within its cell, some
    mirrored."""
    canvas = np.zeros((SIDE, SIDE), dtype=np.uint8)
    for cell, content in enumerate(contents):
        if content < 0:
            continue
        thing = Image.fromarray(things[content, rng.integers(things.shape[1])])
        side = int(rng.integers(22, THING + 1))
        pixels = np.asarray(thing.resize((side, side), Image.Resampling.BILINEAR))
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        y, x = (
            CELL * np.array(divmod(cell, 3)) + rng.integers(0, CELL - side + 1, size=2)
        ).tolist()
        canvas[y : y + side, x : x + side] = pixels
    return Image.fromarray(canvas)


def ask(rng: np.random.Generator, contents: np.ndarray) -> list[tuple[str, str, str]]:
    """Eight (kind, question, answer), two of each kind, none of which gives away another's
    answer."""
    counts = Counter(int(content) for content in contents if content >= 0)
    single = rng.permutation([content for content, count in counts.items() if count == 1])[:2]
    where = [int(np.flatnonzero(contents == content)[0]) for content in single]
    questions = [
        ("where", f"where is the {CLASSES[content]}?", PLACES[cell])
        for content, cell in zip(single, where, strict=True)
    ]
    for cell in rng.permutation([cell for cell in range(len(PLACES)) if cell not in where])[:2]:
        answer = CLASSES[contents[cell]] if contents[cell] >= 0 else "nothing"
        questions.append(("what", f"what is at the {PLACES[cell]}?", answer))
    others = [content for content in range(len(CLASSES)) if content not in single]
    # Counts from zero up are asked equally often, as far as a picture offers them.
    by_count: dict[int, list[int]] = {}
    for content in others:
        by_count.setdefault(counts[content], []).append(content)
    offered = rng.permutation(sorted(by_count))
    asked = [int(rng.choice(by_count[int(offered[i % len(offered)])])) for i in range(2)]
    questions += [
        ("count", f"how many {plural(CLASSES[content])} are there?", NUMBERS[counts[content]])
        for content in asked
    ]
    for wanted in rng.permutation([True, False]):
        pool = [c for c in others if (counts[c] > 0) == wanted and c not in asked]
        content = int(rng.choice(pool or others))
        questions.append(
            ("any", f"is there a {CLASSES[content]}?", "yes" if counts[content] else "no")
        )
    return [questions[i] for i in rng.permutation(len(questions))]


def make_record(index: int, split: str, seed: int) -> tuple[dict, Image.Image, np.ndarray]:
    """One LLaVA record, its picture, and the true contents of its nine cells."""
    rng = np.random.default_rng([seed, split == "test", index])
    contents = draw_contents(rng)
    picture = compose(rng, contents, load_things(split))
    turns, kinds = [], []
    for turn, (kind, question, answer) in enumerate(ask(rng, contents)):
        marker = "<image>\n" if turn == 0 else ""
        turns += [{"from": "human", "value": marker + question}, {"from": "gpt", "value": answer}]
        kinds.append(kind)
    name = f"{split}/{index:06d}"
    return (
        {"id": name, "image": f"{name}.png", "conversations": turns, "kinds": kinds},
        picture,
        contents,
    )


def compose_fashion(ctx: StageContext, config: FashionConfig) -> dict:
    """Stage: write train.json, test.json and images/ in LLaVA's layout."""
    total = config.train_pictures + config.test_pictures
    done = 0
    for split, count in (("train", config.train_pictures), ("test", config.test_pictures)):
        folder = ctx.out / "images" / split
        folder.mkdir(parents=True)
        records = []
        for index in range(count):
            record, picture, _ = make_record(index, split, config.seed)
            picture.save(ctx.out / "images" / record["image"])
            records.append(record)
            done += 1
            if done % 50 == 0:
                ctx.progress(done, total, "pictures")
        (ctx.out / f"{split}.json").write_text(json.dumps(records))
    return {"train_pictures": config.train_pictures, "test_pictures": config.test_pictures}
