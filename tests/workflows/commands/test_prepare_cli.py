"""`adsc prepare` on files as people have them: what comes out, and what it says when it refuses."""

import io
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.training.batches import PreparedData
from tests.small import Small
from workflows.commands.main import main

pytestmark = pytest.mark.usefixtures("ray_address")

Captured = pytest.CaptureFixture[str]


def turns(question: str, answer: str = "bag") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def empty_table() -> bytes:
    """Parquet with the right columns and no row."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"conversations": pa.array([], pa.list_(pa.string()))}), buffer)
    return buffer.getvalue()


def test_good_and_bad_records(small: Small, tmp_path: Path, capsys: Captured) -> None:
    image = "train/" + min(path.name for path in (small.pictures / "images" / "train").iterdir())
    good = [
        {"id": "one", "image": image, "conversations": turns("<image>\nwhat?")},
        {"id": 10**30, "image": [image, image], "conversations": turns("<image> or <image>?")},
        {"image": "", "conversations": turns("no picture and no id")},
        {"id": None, "image": None, "conversations": turns("no picture")},
    ]
    bad = [
        {"id": "gone", "image": "gone.png", "conversations": turns("<image>")},
        {"id": "out", "image": "../train.json", "conversations": turns("<image>")},
        {"id": "again", "image": image, "conversations": turns("<image>\nwhat?")},
        {"id": "order", "conversations": turns("q")[::-1]},
    ]
    lines = [json.dumps(record) for record in good + bad] + ['{"id": "cut"']
    path = tmp_path / "records.jsonl"
    path.write_text("\r\n\r\n".join(lines), encoding="utf-8-sig", newline="")
    options = ["--images", str(small.pictures / "images"), "--model", str(small.base)]
    out = tmp_path / "new" / "out"
    command = ["prepare", str(path), *options, "--json", "--out", str(out)]
    assert main([*command, "--max-quarantined", "0.5"]) == 2  # five of nine
    printed = capsys.readouterr()
    reasons = {"duplicate": 1, "malformed": 1, "missing_picture": 1, "path": 1, "roles": 1}
    expected = {"in": 9, "out": 4, "quarantined": reasons}
    assert json.loads(printed.out.splitlines()[-1]) == expected
    kept = tmp_path / "new" / "out.quarantine.jsonl"
    assert "5 of 9 records are quarantined" in printed.err and str(kept) in printed.err
    assert len(kept.read_text().splitlines()) == 5
    assert [entry.name for entry in out.parent.iterdir()] == [kept.name]

    assert main([*command, "--max-quarantined", "0.6"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1]) == expected
    assert sorted(entry.name for entry in out.iterdir()) == [
        "00000.parquet",
        "manifest.json",
        "quarantine.jsonl",
    ]
    rows = pq.read_table(out / "00000.parquet").to_pylist()
    assert [row["id"] for row in rows] == ["one", str(10**30), "records.jsonl:5", "records.jsonl:7"]
    assert [len(row["pictures"]) for row in rows] == [1, 2, 0, 0]
    found = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["id"], line["line"], line["reason"]) for line in found] == [
        ("gone", 9, "missing_picture"),
        ("out", 11, "path"),
        ("again", 13, "duplicate"),
        ("order", 15, "roles"),
        (None, 17, "malformed"),
    ]
    assert len(PreparedData(out)) == 4
    assert main(command) == 2
    assert f"{out} is not empty" in capsys.readouterr().err


def test_each_file_has_the_pictures_beside_it(
    small: Small, tmp_path: Path, capsys: Captured
) -> None:
    own = sorted((small.pictures / "images" / "train").iterdir())[:2]
    for folder, picture in zip(("a", "b"), own, strict=True):
        (tmp_path / folder / "images").mkdir(parents=True)
        shutil.copy(picture, tmp_path / folder / "images" / "x.png")
        record = {"id": folder, "image": "x.png", "conversations": turns("<image>\nwhat?")}
        (tmp_path / folder / "d.json").write_text(json.dumps([record]))
    files = [str(tmp_path / folder / "d.json") for folder in ("a", "b")]
    out = tmp_path / "out"
    stale = tmp_path / "out.quarantine.jsonl"
    stale.touch()
    assert main(["prepare", *files, "--model", str(small.base), "--out", str(out)]) == 0
    rows = pq.read_table(out / "00000.parquet").to_pylist()
    assert {row["id"]: row["pictures"][0] for row in rows} == {
        folder: picture.read_bytes() for folder, picture in zip(("a", "b"), own, strict=True)
    }
    assert not stale.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty: no record in it"),
        ("[]", "is empty: no record in it"),
        (empty_table(), "a.json is empty: no record in it"),
        ('[{"id": 1},]', "line 1: a comma before the closing bracket"),
        ('{"id": 1}\n', "no valid record is left"),
    ],
)
def test_bad_files(
    content: str | bytes, message: str, small: Small, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    out = tmp_path / "out"
    command = ["prepare", str(tmp_path / "a.json"), "--model", str(small.base), "--out", str(out)]
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not out.exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "none.json"}, "there is no file or folder"),
        ({"--images": "none"}, "for --images"),
        ({"--model": "none"}, "there is no checkpoint folder 'none'"),
        ({"--model": "."}, "no processor can be loaded"),
        ({"--template": "vicuna"}, "template 'vicuna' is unknown; there are"),
        ({"--weights": "1,2"}, "is not 1 numbers from 1e-9 to 1e9"),
        ({"--weights": "inf"}, "is not 1 numbers from 1e-9 to 1e9"),
        ({"--out": "a.json"}, "is not a folder"),
    ],
)
def test_bad_options(
    changes: dict[str, str],
    message: str,
    small: Small,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps([{"id": 1, "conversations": turns("q")}]))
    options = {"--model": str(small.base), "--out": "out"} | changes
    data = options.pop("data", "a.json")
    assert main(["prepare", data, *(word for pair in options.items() for word in pair)]) == 2
    assert message in capsys.readouterr().err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.json"]
