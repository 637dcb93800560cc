"""Records: what they must be, and each reason to set one aside."""

import pytest

from pipeline.data.conversations import (
    BadRecord,
    check_markers,
    parse_turns,
    picture_sources,
    question_kinds,
    record_id,
)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{broken", "malformed"),
        (None, "malformed"),
        ({"id": "a"}, "malformed"),
        ({"conversations": "text"}, "malformed"),
        ({"conversations": []}, "roles"),
        ({"id": "a", "conversations": [{"from": "human", "value": "q"}]}, "roles"),
        ({"id": "a", "conversations": [{"from": "gpt", "value": "q"}]}, "roles"),
        ({"conversations": [{"from": "system", "value": "be kind"}]}, "roles"),
        ({"id": "a", "conversations": [{"from": "human", "value": ""}]}, "malformed"),
        ({"id": "a", "conversations": [{"from": "human", "value": 3}]}, "malformed"),
        ({"id": "a", "conversations": ["q"]}, "malformed"),
        ({"conversations": [{"from": "human", "value": "half \ud83d"}]}, "encoding"),
    ],
)
def test_malformed_records_are_named(record: object, reason: str) -> None:
    with pytest.raises(BadRecord) as caught:
        parse_turns(record)
    assert caught.value.reason == reason


def test_an_id_may_be_missing_or_a_number() -> None:
    assert (
        record_id({}) is None and record_id({"id": None}) is None and record_id({"id": ""}) is None
    )
    assert record_id({"id": 10**30}) == str(10**30) and record_id({"id": "a"}) == "a"
    for wrong in (True, {"a": 1}, [1], "half \udc00"):
        with pytest.raises(BadRecord):
            record_id({"id": wrong})


def test_marker_count_must_fit() -> None:
    check_markers([("human", "<image>q<image>"), ("gpt", "a")], 2)
    for turns, pictures in (
        ([("human", "<image>q"), ("gpt", "a")], 0),
        ([("human", "<image>q"), ("gpt", "a")], 2),
        ([("human", "q"), ("gpt", "<image>")], 1),
    ):
        with pytest.raises(BadRecord, match="markers"):
            check_markers(turns, pictures)


@pytest.mark.parametrize("kinds", ["what", ["what"], [1, 2], {"a": 1}, ["a", "\ud800"]])
def test_kinds_must_be_one_text_an_exchange(kinds: object) -> None:
    assert question_kinds({}, 2) == question_kinds({"kinds": None}, 2) == []
    assert question_kinds({"kinds": ["a", "b"]}, 2) == ["a", "b"]
    with pytest.raises(BadRecord):
        question_kinds({"kinds": kinds}, 2)


def test_a_record_has_no_picture_one_or_several() -> None:
    for nothing in ({}, {"image": None}, {"image": ""}, {"image": []}, {"images": None}):
        assert picture_sources(nothing) == []
    assert picture_sources({"image": "a.png"}) == ["a.png"]
    assert picture_sources({"image": ["a.png", "b.png"]}) == ["a.png", "b.png"]
    assert picture_sources({"images": [{"bytes": b"x", "path": "a.png"}, b"y"]}) == [b"x", b"y"]
    assert picture_sources({"image": {"bytes": None, "path": "a.png"}}) == ["a.png"]
    for wrong in (3, {"a": 1}, ["a.png", None], [["a.png"]]):
        with pytest.raises(BadRecord, match="not a path"):
            picture_sources({"image": wrong})
