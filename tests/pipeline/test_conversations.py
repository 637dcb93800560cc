"""Records: rendering with label masks (frozen snapshots), and each reason to set one aside."""

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoProcessor

from pipeline.conversations import (
    IGNORED,
    BadRecord,
    Limits,
    iter_records,
    parse_turns,
    picture_names,
    question_kinds,
    read_picture,
    render_tokens,
)
from pipeline.templates import TEMPLATES
from tests.small import Small

TURNS = [
    ("human", "<image>\nwhat is at the top left?"),
    ("gpt", "bag"),
    ("human", "is there a boot?"),
    ("gpt", "no"),
]
LIMITS = Limits(context=512, min_side=14, max_pixels=10_000)

SNAPSHOTS = {
    "vicuna_v1": [
        (
            "A chat between a curious human and an artificial intelligence assistant. The assistant"
            " gives helpful, detailed, and polite answers to the human's questions. USER: <image>\n"
            "what is at the top left? ASSISTANT:",
            False,
        ),
        (" bag</s>", True),
        ("USER: is there a boot? ASSISTANT:", False),
        (" no</s>", True),
    ],
    "vicuna_short": [
        ("USER: <image>\nwhat is at the top left? ASSISTANT:", False),
        (" bag</s>", True),
        ("USER: is there a boot? ASSISTANT:", False),
        (" no</s>", True),
    ],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_segments_are_those_on_record(name: str) -> None:
    assert TEMPLATES[name].render(TURNS) == SNAPSHOTS[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_jinja_form_renders_the_same_text(name: str, small: Small) -> None:
    processor = AutoProcessor.from_pretrained(small.base)
    messages = [
        {
            "role": "user" if role == "human" else "assistant",
            "content": [{"type": "text", "text": t}],
        }
        for role, t in TURNS
    ]
    messages[0]["content"] = [
        {"type": "image"},
        {"type": "text", "text": TURNS[0][1].removeprefix("<image>\n")},
    ]
    text = processor.apply_chat_template(messages, chat_template=TEMPLATES[name].jinja())
    assert text == "".join(piece for piece, _ in SNAPSHOTS[name])


def test_labels_cover_answers_and_their_end_token_only(small: Small) -> None:
    tokenizer = AutoProcessor.from_pretrained(small.base).tokenizer
    ids, labels = render_tokens(TURNS, TEMPLATES["vicuna_short"], tokenizer, [64])
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert ids.count(image) == 64 and len(ids) == len(labels)
    supervised = [i for i, label in zip(ids, labels, strict=True) if label != IGNORED]
    assert tokenizer.decode(supervised) == " bag</s> no</s>"
    assert all(label in (IGNORED, i) for i, label in zip(ids, labels, strict=True))
    # The whole is what the processor makes of the whole text.
    text = "".join(piece for piece, _ in TEMPLATES["vicuna_short"].render(TURNS))
    assert ids == tokenizer(text.replace("<image>", "<image>" * 64)).input_ids


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{broken", "malformed"),
        ({"id": "a"}, "malformed"),
        ({"conversations": []}, "malformed"),
        ({"id": "a", "conversations": []}, "roles"),
        ({"id": "a", "conversations": [{"from": "human", "value": "q"}]}, "roles"),
        ({"id": "a", "conversations": [{"from": "gpt", "value": "q"}]}, "roles"),
        ({"id": "a", "conversations": [{"from": "human", "value": ""}]}, "malformed"),
        ({"id": "a", "conversations": ["q"]}, "malformed"),
    ],
)
def test_malformed_records_are_named(record: object, reason: str) -> None:
    with pytest.raises(BadRecord) as caught:
        parse_turns(record)
    assert caught.value.reason == reason


def test_marker_count_must_fit(small: Small) -> None:
    tokenizer = AutoProcessor.from_pretrained(small.base).tokenizer
    for turns, sizes in (
        (TURNS, []),
        (TURNS, [64, 64]),
        ([("human", "q"), ("gpt", "<image>")], [64]),
    ):
        with pytest.raises(BadRecord, match="markers"):
            render_tokens(turns, TEMPLATES["vicuna_short"], tokenizer, sizes)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../secret.png", "path"),
        ("/etc/hostname", "path"),
        ("link.png", "path"),
        ("none.png", "missing_picture"),
        ("nul\0.png", "path"),
        ("text.png", "broken_picture"),
        ("cut.png", "broken_picture"),
        ("thin.png", "picture_size"),
        ("large.png", "picture_size"),
    ],
)
def test_pictures_that_cannot_be_used(tmp_path: Path, name: str, reason: str) -> None:
    root = tmp_path / "images"
    root.mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "text.png").write_text("not a picture")
    Image.effect_noise((90, 90), 50).save(root / "whole.png")
    (root / "cut.png").write_bytes((root / "whole.png").read_bytes()[:3000])
    Image.new("RGB", (40, 3)).save(root / "thin.png")
    Image.new("RGB", (400, 400)).save(root / "large.png")
    assert read_picture(root, "whole.png", LIMITS) == (root / "whole.png").read_bytes()
    with pytest.raises(BadRecord) as caught:
        read_picture(root, name, LIMITS)
    assert caught.value.reason == reason and repr(name) in str(caught.value)


def test_records_of_a_list_and_of_lines(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([{"id": 1}, {"id": 2}]))
    (tmp_path / "lines.jsonl").write_text('{"id": 1}\n\n{"id": 2\n')
    (tmp_path / "broken.json").write_text('[{"id": 1},')
    assert list(iter_records(tmp_path / "list.json")) == [(0, {"id": 1}), (1, {"id": 2})]
    assert list(iter_records(tmp_path / "lines.jsonl")) == [(1, {"id": 1}), (3, '{"id": 2')]
    with pytest.raises(ValueError, match=r"broken.json is not valid JSON"):
        list(iter_records(tmp_path / "broken.json"))


def test_odd_characters_do_not_cut_records(tmp_path: Path) -> None:
    record = {"id": "a", "text": "one\u2028two\u0085three"}
    (tmp_path / "lines.jsonl").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "bom.json").write_text(json.dumps([record]), encoding="utf-8-sig")
    (tmp_path / "latin.json").write_bytes('[{"id": "caf\u00e9"}]'.encode("latin-1"))
    assert [found for _, found in iter_records(tmp_path / "lines.jsonl")] == [record]
    assert [found for _, found in iter_records(tmp_path / "bom.json")] == [record]
    with pytest.raises(ValueError, match=r"latin.json is not UTF-8 text \(byte 12\)"):
        list(iter_records(tmp_path / "latin.json"))


@pytest.mark.parametrize("kinds", ["what", ["what"], [1, 2], {"a": 1}])
def test_kinds_must_be_one_text_an_exchange(kinds: object) -> None:
    assert question_kinds({}, 2) == question_kinds({"kinds": None}, 2) == []
    assert question_kinds({"kinds": ["a", "b"]}, 2) == ["a", "b"]
    with pytest.raises(BadRecord, match="malformed"):
        question_kinds({"kinds": kinds}, 2)


def test_a_record_has_no_picture_one_or_several() -> None:
    assert picture_names({}) == []
    assert picture_names({"image": "a.png"}) == ["a.png"]
    assert picture_names({"image": ["a.png", "b.png"]}) == ["a.png", "b.png"]
    with pytest.raises(BadRecord, match="not a path"):
        picture_names({"image": 3})
