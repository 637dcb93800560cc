"""The grids: splits share neither things nor photographs, old configs make what they made, and the
answers of harder variants are true of the pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from pipeline.durable.identity import digest
from workflows.demo.fashion import CLASSES, load_things, places
from workflows.demo.fashion_grids import make_record, write_grids
from workflows.demo.fashion_variants import (
    Place,
    ask_free,
    draw_places,
    listed_right,
    load_grounds,
)
from workflows.demo.pictures import FashionConfig

QUIET = lambda *_: None  # noqa: E731


def instances(split: str) -> set[bytes]:
    things = load_things(split)
    assert things.shape[0] == len(CLASSES)
    return {thing.tobytes() for own in things for thing in own}


def test_splits_share_no_thing_and_no_photograph() -> None:
    splits = ("train", "validation", "test")
    for number, one in enumerate(splits):
        for other in splits[:number]:
            assert not instances(one) & instances(other)
            grounds = [{photo.tobytes() for photo in load_grounds(name)} for name in (one, other)]
            assert grounds[0] and not grounds[0] & grounds[1]


def test_a_config_of_before_is_the_same_data() -> None:
    assert digest(FashionConfig()).startswith("711e1c882d878ab3")
    assert FashionConfig().counts == {"train": 2000, "test": 200}
    record, picture = make_record(0, "test", FashionConfig())
    also, same = make_record(0, "test", FashionConfig(validation_pictures=9))
    assert record == also and picture.tobytes() == same.tobytes()


def test_validation_has_pictures_of_its_own(tmp_path: Path) -> None:
    config = FashionConfig(train_pictures=4, validation_pictures=3, test_pictures=2, listed=0.5)
    write_grids(tmp_path, config, QUIET)
    counts = {f.stem: len(json.loads(f.read_text())) for f in sorted(tmp_path.glob("*.json"))}
    assert counts == {"test": 2, "test_list": 2, "train": 4, "validation": 3, "validation_list": 3}
    files = [f.read_bytes() for f in tmp_path.rglob("*.png")]
    assert len(files) == len(set(files)) == 9


@pytest.mark.parametrize("ground", ["black", "photographs"])
def test_lists_say_what_the_other_questions_say(ground: str, tmp_path: Path) -> None:
    config = FashionConfig(
        train_pictures=40, validation_pictures=5, test_pictures=1, listed=0.5,
        ground=ground,
    )  # fmt: skip
    write_grids(tmp_path, config, QUIET)
    records = json.loads((tmp_path / "validation.json").read_text())
    lists = json.loads((tmp_path / "validation_list.json").read_text())
    compared = 0
    for record, listed in zip(records, lists, strict=True):
        assert record["image"] == listed["image"] and record["id"] != listed["id"]
        (_, answer) = (turn["value"] for turn in listed["conversations"])
        cells = dict(entry.split(": ") for entry in answer.split(", "))
        assert list(cells) == list(places(3))
        turns = [turn["value"].replace("<image>\n", "") for turn in record["conversations"]]
        for question, expected in zip(turns[::2], turns[1::2], strict=True):
            if question.startswith("what is at the "):
                assert cells[question.removeprefix("what is at the ").rstrip("?")] == expected
                compared += 1
            if question.startswith("where is the "):
                assert cells[expected] == question.removeprefix("where is the ").rstrip("?")
                compared += 1
    assert compared > 10
    trained = json.loads((tmp_path / "train.json").read_text())
    assert 8 < sum(record["kinds"] == ["list"] for record in trained) < 32


def test_right_entries_of_a_list_count_in_their_places() -> None:
    expected = "top left: boot, top center: bag, top right: nothing"
    assert listed_right(expected, expected) == 1.0
    assert listed_right("top left: boot, top center: boot, top right: nothing", expected) == 2 / 3
    assert listed_right("top center: bag", expected) == 0.0
    assert listed_right("", expected) == 0.0


def test_things_at_free_places_do_not_touch_and_answers_are_true() -> None:
    names, kinds = places(3), set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        things = draw_places(rng, 96)
        canvas = np.zeros((96, 96), dtype=int)
        for thing in things:
            assert 0 <= thing.top <= 96 - thing.side and 0 <= thing.left <= 96 - thing.side
            canvas[thing.top : thing.top + thing.side, thing.left : thing.left + thing.side] += 1
        assert canvas.max() == 1
        for kind, question, answer in ask_free(rng, things, 96, 2):
            kinds.add(kind)
            if kind == "where":
                (thing,) = (t for t in things if f"the {CLASSES[t.content]}?" in question)
                assert names[ninth_of(thing)] == answer
            if kind == "what":
                ninth = names.index(question.removeprefix("what is at the ").rstrip("?"))
                there = {CLASSES[t.content] for t in things if ninth_of(t) == ninth}
                assert there == ({answer} if answer != "nothing" else set())
            if kind == "count":
                assert answer in ("zero", "one", "two", "three", "four", "five")
    assert kinds == {"where", "what", "count", "any"}


def ninth_of(thing: Place) -> int:
    row, column = (int((at + thing.side / 2) // 32) for at in (thing.top, thing.left))
    return 3 * row + column


def test_ground_shows_and_things_stay_brighter() -> None:
    _, plain = make_record(3, "test", FashionConfig(validation_pictures=1))
    _, photo = make_record(3, "test", FashionConfig(ground="photographs"))
    dark, light = (np.asarray(picture) for picture in (plain, photo))
    assert (dark == 0).mean() > 0.3 > (light == 0).mean()
    assert light.max() > 150 > np.median(light)
    assert isinstance(photo, Image.Image) and photo.size == (96, 96)


def test_variants_that_have_no_meaning_are_refused() -> None:
    with pytest.raises(ValidationError, match="set grid to 3 and listed to 0"):
        FashionConfig(layout="free", listed=0.5)
