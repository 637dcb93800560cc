"""Files of records: every layout gives the same records, whatever lies between and around them."""

import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import sources
from pipeline.data.sources import (
    SourceError,
    Unreadable,
    find_files,
    index_file,
    iter_records,
    read_chunk,
)


def record(number: int, **more: object) -> dict:
    turns = [{"from": "human", "value": f"q {number}"}, {"from": "gpt", "value": "ä \u2028 }]"}]
    return {"id": number, "conversations": turns} | more


RECORDS = [record(i) for i in range(1000)]


def found(path: Path) -> list:
    return [item for _, item in iter_records(path)]


def test_all_layouts_give_the_same_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_READ", 700)  # records are cut by the reads of the scan
    text = json.dumps(RECORDS, ensure_ascii=False)
    (tmp_path / "one.json").write_text(text, encoding="utf-8")
    (tmp_path / "bom.json").write_text(" \n" + text + "\n", encoding="utf-8-sig")
    (tmp_path / "pretty.json").write_text(json.dumps(RECORDS, indent=2))
    lines = [json.dumps(item, ensure_ascii=False) for item in RECORDS]
    (tmp_path / "lines.jsonl").write_text("\r\n \r\n".join(lines), encoding="utf-8-sig", newline="")
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "rows.parquet", row_group_size=300)
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as file:
        table = pa.Table.from_pylist(RECORDS)
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=300)
    for path in sorted(tmp_path.iterdir()):
        assert found(path) == RECORDS, path.name
    assert len(list(index_file(tmp_path / "one.json"))) >= 4
    assert [line for line, _ in iter_records(tmp_path / "lines.jsonl")][:3] == [1, 3, 5]
    assert [line for line, _ in iter_records(tmp_path / "pretty.json")][:3] == [2, 15, 28]
    assert [line for line, _ in iter_records(tmp_path / "rows.arrow")][298:302] == [
        299,
        300,
        301,
        302,
    ]


def test_chunks_can_be_read_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    chunks = list(index_file(tmp_path / "a.json"))
    assert sum(chunk.count for chunk in chunks) == 1000
    for chunk in random.Random(0).sample(chunks, len(chunks)):
        read = [item for _, item in read_chunk(chunk, tmp_path / "a.json")]
        assert read == RECORDS[chunk.first : chunk.first + chunk.count]


@pytest.mark.parametrize("indent", [None, 1])
def test_what_stands_in_texts_does_not_cut_records(tmp_path: Path, indent: int | None) -> None:
    odd = ['}], {"', '\\"', "\\\\", '\\\\"]', "[[", '"', "\n\t\\n", "\u2028\x85", "😀"] * 40
    records: list = [record(i, note=text) for i, text in enumerate(odd)]
    records += [3, -1.5e3, "text, with ] and }", None, True, [], {}, [[1], {"a": [2]}]]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=indent))
    (tmp_path / "b.json").write_text(json.dumps(records, indent=indent, ensure_ascii=False))
    assert found(tmp_path / "a.json") == found(tmp_path / "b.json") == records


def test_one_unreadable_record_is_one(tmp_path: Path) -> None:
    good = json.dumps(record(1)).encode()
    bad = {
        b'{"id": 2,': "malformed",
        b'{"id": "caf\xe9"}': "encoding",
        b'{"id": ' + b"9" * 5000 + b"}": "malformed",
        b"[" * 50_000 + b"]" * 50_000: "malformed",
        b"text": "malformed",
    }
    for number, (line, reason) in enumerate(bad.items()):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(good + b"\n" + line + b"\n" + good)
        (_, first), (at, middle), (_, last) = iter_records(path)
        assert first == last == record(1) and at == 2
        assert isinstance(middle, Unreadable) and middle.reason == reason
        if reason == "encoding" or line.startswith((b"[", b'{"id": 9')):
            path = tmp_path / f"{number}.json"
            path.write_bytes(b"[" + good + b", " + line + b"," + good + b"]")
            _, middle, _ = found(path)
            assert isinstance(middle, Unreadable) and middle.reason == reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": 1},]', r"line 1: a comma before the closing bracket"),
        ('[{"id": 1},\n', r"line 2: the list is cut off"),
        ('[{"id": 1}', r"line 1: the list is cut off"),
        ('[{"id": 1},\n{"id": "x', r"line 2: the record that starts here is cut off"),
        ('[{"id": 1}]\n]', r"line 2: text after the closing bracket"),
        ('[{"id": 1} {"id": 2}]', r"'\{' after a record, no comma"),
        ("[,]", r"',' where a record must start"),
        ('{\n"train": []}', r"one JSON object over several lines"),
    ],
)
def test_a_broken_frame_is_an_error_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SourceError, match=message):
        list(index_file(tmp_path / "a.json"))


def test_other_kinds_of_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]", encoding="utf-16")
    with pytest.raises(SourceError, match="UTF-16"):
        list(index_file(tmp_path / "a.json"))
    (tmp_path / "b.json").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(SourceError, match="gunzip"):
        list(index_file(tmp_path / "b.json"))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "c.parquet")
    with pytest.raises(SourceError, match="no column `conversations`; it has text"):
        list(index_file(tmp_path / "c.parquet"))
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(SourceError, match="not a readable Parquet file"):
        list(index_file(tmp_path / "d.parquet"))
    words = [[{"from": "human", "value": f"word {n}" * 50}] for n in range(500)]
    pq.write_table(pa.table({"conversations": words}), tmp_path / "e.parquet")
    data = bytearray((tmp_path / "e.parquet").read_bytes())
    data[200:1200] = bytes(1000)
    (tmp_path / "e.parquet").write_bytes(data)
    with pytest.raises(SourceError, match=r"can't read row group 0 of e\.parquet"):
        list(iter_records(tmp_path / "e.parquet"))
    for empty in ("", "[]", "\n \n"):
        (tmp_path / "e.json").write_text(empty)
        assert list(index_file(tmp_path / "e.json")) == []


def test_a_record_without_end_is_not_read_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_RECORD", 10_000)
    monkeypatch.setattr(sources, "_READ", 1000)
    (tmp_path / "a.json").write_text('[{"a": "' + "x" * 100_000)
    with pytest.raises(SourceError, match="does not end within"):
        list(index_file(tmp_path / "a.json"))


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    png = io.BytesIO()
    Image.new("RGB", (20, 20)).save(png, "PNG")
    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "image": datasets.Image(),
            "conversations": [
                {"from": datasets.Value("string"), "value": datasets.Value("string")}
            ],
        }
    )
    rows = [record(i, image={"bytes": png.getvalue(), "path": None}) for i in range(20)]
    made = datasets.Dataset.from_list(rows, features=features)
    made.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": made, "test": made.select([3])}).save_to_disk(tmp_path / "two")
    made.to_parquet(tmp_path / "three" / "train-00000-of-00001.parquet")
    made.select([1]).to_parquet(tmp_path / "three" / "test-00000-of-00001.parquet")
    for name in ("one", "two", "three"):
        read = [item for file in find_files(name, tmp_path, "train") for item in found(Path(file))]
        assert read == rows, name
    (test,) = [item for file in find_files("two", tmp_path, "test") for item in found(Path(file))]
    assert test["id"] == 3
    with pytest.raises(SourceError, match="no 'val'"):
        find_files("two", tmp_path, "val")
    with pytest.raises(SourceError, match="there is no file"):
        find_files("none*.json", tmp_path, "train")
