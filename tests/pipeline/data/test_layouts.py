"""What LLaVA's layout has no place for is set aside with its name; metadata is no fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.config import PrepareConfig
from pipeline.data.conversations import BadRecord, parse_turns, picture_sources
from pipeline.data.layouts import READ, foreign_marker, lost_content
from pipeline.data.sources import SourceError, index_file, iter_records
from pipeline.stages.prepare import prepare
from tests.pipeline.contexts import stage_context
from tests.small import Small

MEDIA = ("video", "videos", "audio", "audios", "image_path", "img", "Image", "image_2", "clip")


def turns(question: str = "what?", **more: Any) -> list[dict[str, Any]]:
    return [{"from": "human", "value": question, **more}, {"from": "gpt", "value": "a bag"}]


def record(question: str = "what?", /, **more: Any) -> dict[str, Any]:
    return {"id": "a", "conversations": turns(question)} | more


def reason(bad: Any) -> str:
    """Why it is set aside, with the reason in front."""
    with pytest.raises(BadRecord) as caught:
        parse_turns(bad)
    return f"{caught.value.reason}: {caught.value.detail}"


REAL = {
    "LLaVA-665K": record("<image>\nq", id="000000033471", image="coco/train2017/1.jpg"),
    "LLaVA-665K, text": record("Write HTML", id="wgByO4Y_0", model=""),
    "ShareGPT4V": record("q\n<image>", id="sam/1", image="sam/images/sa_1.jpg"),
    "LLaVA-OneVision": record("<image>", image={"bytes": b"x", "path": None}, data_source="ai2d"),
    "LLaVA-OneVision, text": record(image=None, data_source="magpie"),
    "InternVL": record("<image>\nq", image="a.jpg", width=640, height=480),
    "InternVL, several": record("<image><image>", image=["a", "b"], width_list=[1, 2]),
    "M4-Instruct": record(
        "<image>", image=["a.jpg"], sample_id=1, choice_list=None,
        metadata={"dataset": "NLVR2", "split": "train", "num_sample": 9, "question_type": "open"},
    ),
    "Vision-Flan": record("<image>\nq", image="a.jpg", task_name="VQA", image_id=4),
    "ALLaVA": record("<image>\nq", image="a.jpeg", url="https://host/a.jpeg"),
    "LRV": record("<image>\nq", image="a.jpg", question="q", answer="a bag", score=0.5),
    "OpenHermes": record(
        source="x", category=None, system_prompt=None, custom_instruction=None, topic="t", idx=3,
        skip_prompt_formatting=False, hash="ab12", avatarUrl=None, views=None, language="English",
    ),
    "a table with empty columns": record(videos=[], audios=None, system="", tools="[]"),
    "pandas": record(video=float("nan"), system=float("nan")),
    "frames": record("<image><image>", image=["1.jpg", "2.jpg"], video_id="v7", video_fps=2),
    "a digest": record(sha=b"0" * 32, phash=12, tokens=[1, 2]),
    "ShareGPT's turns": {"id": 1, "conversations": turns(markdown=None, text=None)},
    "a turn of weight 1": {"id": 1, "conversations": turns(weight=1)},
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_records_of_real_data_sets_are_read(name: str) -> None:
    assert len(parse_turns(REAL[name])) == 2


@pytest.mark.parametrize(
    ("more", "says"),
    [
        *((({key: "a.mp4"}), f"key '{key}' holds 'a.mp4'") for key in MEDIA),
        ({"video": 7}, "key 'video' holds 7"),
        ({"audio": {"bytes": b"RIFF", "path": None}}, "key 'audio' holds"),
        ({"image_id": 4}, "key 'image_id'"),
        ({"url": "https://host/a.png"}, "holds a picture, 'https://host/a.png', and `image` none"),
        ({"image": "a.png", "image_path": "b.png"}, "key 'image_path'"),
        ({"image": "a.png", "meta": {"file": "b.mp4"}}, "key 'meta' holds a file, 'b.mp4'"),
        ({"blob": bytes(1000)}, "key 'blob' holds a file, 1000 bytes"),
        ({"doc": "data:image/png;base64,AAAA"}, "key 'doc' holds a file"),
        ({"system": "Be brief."}, "key 'system' holds 'Be brief.', which no turn has"),
        ({"systemPrompt": "Be brief."}, "key 'systemPrompt'"),
        ({"tools": '[{"name": "f"}]'}, "key 'tools'"),
        ({"history": [["q", "a"]]}, "key 'history'"),
        ({"chosen": {"from": "gpt", "value": "b"}}, "key 'chosen'"),
        ({"other": turns()}, "key 'other' holds turns"),
    ],
)
def test_keys_that_hold_content_are_named_with_the_layout(more: dict[str, Any], says: str) -> None:
    found = reason(record(**more))
    assert found.startswith("layout: ") and says in found
    assert "a record of LLaVA's layout has id, image, images, conversations, kinds" in found


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        ({"image": "a.png"}, "turn 0 has a key 'image' that holds 'a.png'"),
        ({"images": ["a.png"]}, "has a key 'images'"),
        ({"weight": 0}, "weight: 0, which decides what is trained"),
        ({"loss": False}, "loss: False, which decides"),
        ({"tool_calls": [{"name": "f"}]}, "has a key 'tool_calls'"),
    ],
)
def test_keys_of_turns_are_judged_alike(turn: dict[str, Any], says: str) -> None:
    assert says in reason({"id": 1, "conversations": turns(**turn)})


@pytest.mark.parametrize(
    "marker",
    [
        "<video>", "<audio>", "<Image>", "<IMAGE>", "<image 1>", "<image_2>", "<images>", "<img>",
        "<img_1>", "<|image_1|>", "<|image_pad|>", "<|vision_start|>", "<|AUDIO|>", "<|image|>",
        "<img>a/b.jpg</img>", "<audio>a.wav</audio>", "<ImageHere>", "<im_start>", "<speech>",
        "<image_placeholder>", "<start_of_image>", "[IMG]", "<image>./</image>", "<video/>",
    ],
)  # fmt: skip
def test_markers_of_other_layouts_are_named(marker: str) -> None:
    for text in (f"{marker}\nwhat?", f"what?\n{marker}", f"look:\n{marker}\nwhat?"):
        found = reason(record(text))
        assert found.startswith("layout: turn 0 holds ") and repr(marker)[1:-1] in found
    assert marker in reason(record(f"<image>\n{marker}", image="a.png"))


@pytest.mark.parametrize(
    "text",
    [
        "<image>\nwhat?", 'Center this: <img src="a.png" alt="">', "<video controls></video>",
        "Why does `<video>` not play?", "What does the <video> tag do?", "<audio> elements?",
        "```html\n<video>\n```\nIs this right?", "a < b > c", "<|im_start|>user", "List<Image2D>",
        "[IMG]http://host/a.png[/IMG]", "<p>image</p>", "<video>\n<source>\n</video>",
    ],
)  # fmt: skip
def test_prose_about_pages_is_read(text: str) -> None:
    assert foreign_marker(text, question=True) is None
    assert foreign_marker(text, question=False) is None


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"messages": [{"role": "user", "content": "q"}]}, "write each {role: user|assistant"),
        ({"instruction": "q", "input": "", "output": "a"}, "the alpaca layout: write"),
        ({"image": "a.png", "question": "q", "answer": "a"}, "questions and answers: write"),
        ({"texts": [{"user": "q", "assistant": "a"}]}, "`texts`: write each {user, assistant}"),
        ({"prompt": "q", "completion": "a"}, "prompts and completions: write"),
        ({"query": "q", "response": "a"}, "queries and responses"),
        ({"conversation": turns()}, "name it `conversations`"),
        ({"conversations": [{"role": "user", "content": "q"}]}, "turn 0 has role and content"),
        (
            {"conversations": [{"from": "human", "value": [{"type": "image"}]}]},
            "turn 0 is a list of parts: write one text",
        ),
    ],
)
def test_known_layouts_are_recognised_and_converted_by_a_sentence(
    other: dict[str, Any], says: str
) -> None:
    assert reason(other).startswith("layout: ") and says in reason(other)


@pytest.mark.parametrize(
    ("role", "says"),
    [("user", "write from: human for user"), ("system", "put its text into the first question")],
)
def test_roles_of_other_layouts_are_translated(role: str, says: str) -> None:
    found = reason({"conversations": [{"from": role, "value": "q"}]})
    assert found.startswith("roles: ") and says in found


def test_two_keys_of_pictures_must_agree() -> None:
    assert picture_sources({"image": "a.png", "images": ["a.png"]}) == ["a.png"]
    assert picture_sources({"image": "a.png", "images": []}) == ["a.png"]
    with pytest.raises(BadRecord, match="1 `image` and 2 `images` differ"):
        picture_sources({"image": "a.png", "images": ["a.png", "b.png"]})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
)


def blank(value: Any) -> bool:
    """Nothing in it but nothing."""
    if isinstance(value, dict | list):
        return all(map(blank, value.values() if isinstance(value, dict) else value))
    if isinstance(value, str | bytes):
        return not value.strip() or value.strip() in ("[]", "{}")
    return not value or value != value


@given(st.dictionaries(st.text(max_size=8) | st.sampled_from(MEDIA), VALUES, max_size=4))
def test_whatever_a_record_holds_it_is_read_or_named(more: dict[str, Any]) -> None:
    """And a key that is named can be deleted: then the rest is as good as it was."""
    kept = {key: value for key, value in more.items() if key not in READ}
    while lost := lost_content(record() | kept):
        named = [key for key in kept if f"key {key!r} " in lost]
        assert named
        del kept[named[0]]
    assert len(parse_turns(record() | kept)) == 2
    assert all(blank(kept.get(key)) for key in MEDIA)


@given(
    st.sampled_from(["video", "image", "audio", "img", "photo"]),
    st.sampled_from(["{}", "{}s", "{}_path", "path_to_{}", "{}1", "my{}", "{}File", "the {}"]),
    st.sampled_from([str.lower, str.upper, str.title]),
)
def test_names_of_media_are_seen_in_any_spelling(word: str, form: str, spell: Any) -> None:
    key = spell(form.format(word))
    if key not in READ and not key.lower().startswith("my"):
        assert lost_content(record(**{key: "somewhere"})), key


@given(
    st.lists(st.sampled_from(["<image>", "<video>", "<b>", "x", " ", "\n", "<img>"]), max_size=6)
)
def test_pictures_markers_alone_are_never_foreign(parts: list[str]) -> None:
    text = "".join(parts)
    if foreign_marker(text, question=True) == "<image>":
        raise AssertionError(text)
    if "<video>" in text and "x" not in text:
        assert foreign_marker(text, question=True)


def test_columns_of_tables_are_seen(tmp_path: Path) -> None:
    rows = [
        record(video=None, system=None, source="a", vector=[0.5], when=1, frames=None),
        record(video="a.mp4", system="be brief", source="b", vector=[0.1], when=2, frames=8),
    ]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet")
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        first, second = (item for _, item in iter_records(tmp_path / name))
        assert set(first) == {"id", "conversations", "video", "system", "source", "frames"}
        assert len(parse_turns(first)) == 2
        assert "'video' holds 'a.mp4'" in reason(second)
    pq.write_table(pa.table({"messages": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(SourceError, match=r"no column `conversations`; .* write each \{role"):
        list(index_file(tmp_path / "b.parquet"))


def test_a_pointer_instead_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(SourceError, match=r"a\.json is a git-LFS pointer.*git lfs pull"):
        list(index_file(tmp_path / "a.json"))
    (tmp_path / "b.json").write_text("<!DOCTYPE html><html></html>")
    with pytest.raises(SourceError, match=r"b\.json is a web page"):
        list(index_file(tmp_path / "b.json"))


def test_no_record_with_a_video_becomes_text_alone(
    ray_address: str, small: Small, tmp_path: Path
) -> None:
    records = json.loads((small.pictures / "train.json").read_text())
    foreign = [
        record("q1", video="a.mp4"), record("<video>\nq2"), record("q3", image_path="a.png"),
        record("q4", system="be brief"), {"messages": [{"role": "user", "content": "q"}]},
    ]  # fmt: skip
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text(json.dumps(records + foreign))
    inputs = {"data": (tmp_path / "data", {}), "base": (small.base, {})}
    ctx = stage_context("prepare", tmp_path / "out", inputs)
    config = PrepareConfig(
        splits={"train": "train.json"}, images=str(small.pictures / "images"), context=512,
        template="vicuna_short", max_quarantined=0.5,
    )  # fmt: skip
    outputs = prepare(ctx, config)
    assert outputs["quarantined"] == {"layout": 5}
    assert pq.read_table(ctx.out / "train").equals(pq.read_table(small.prepared / "train"))
