"""The prepare stage on real pictures and on broken ones; Ray Data is the real one."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoProcessor

from pipeline.stages.prepare import PrepareConfig, TooManyBadRecords, prepare
from tests.pipeline.contexts import stage_context
from tests.small import Small

CONFIG = PrepareConfig(splits={"train": "train.json"}, template="vicuna_short", context=512)


@pytest.fixture
def damaged(small: Small, tmp_path: Path) -> Path:
    """The small data with one broken picture, one malformed conversation, and one record twice."""
    folder = tmp_path / "data"
    shutil.copytree(small.pictures, folder)
    records = json.loads((folder / "train.json").read_text())
    (folder / "images" / records[3]["image"]).write_bytes(b"\x89PNG broken")
    records[5]["conversations"].pop()
    records.append(records[0])
    (folder / "train.json").write_text(json.dumps(records))
    return folder


def test_shards_hold_every_record_in_order(small: Small) -> None:
    table = pq.read_table(small.prepared / "train")
    records = json.loads((small.pictures / "train.json").read_text())
    assert table["id"].to_pylist() == [record["id"] for record in records]
    tokenizer = AutoProcessor.from_pretrained(small.base).tokenizer
    row = table.slice(0, 1).to_pylist()[0]
    picture = small.pictures / "images" / records[0]["image"]
    assert row["pictures"] == [picture.read_bytes()]
    answers = [turn["value"] for turn in records[0]["conversations"][1::2]]
    supervised = tokenizer.decode([label for label in row["labels"] if label >= 0])
    assert supervised == "".join(f" {answer}</s>" for answer in answers)
    manifest = json.loads((small.prepared / "manifest.json").read_text())
    assert manifest["splits"]["train"] | {"quarantined": {}} == manifest["splits"]["train"]
    assert (manifest["splits"]["train"]["in"], manifest["splits"]["train"]["out"]) == (24, 24)


def test_counts_of_a_row_are_those_of_its_tokens(small: Small) -> None:
    image = AutoProcessor.from_pretrained(small.base).tokenizer.convert_tokens_to_ids("<image>")
    for row in pq.read_table(small.prepared / "train").to_pylist():
        assert row["length"] == len(row["input_ids"])
        assert row["supervised"] == sum(label >= 0 for label in row["labels"]) > 0
        assert row["vision_tokens"] == row["input_ids"].count(image) == 64


def test_row_groups_are_small(small: Small, tmp_path: Path) -> None:
    inputs = {"data": (small.pictures, {}), "base": (small.base, {})}
    ctx = stage_context("prepare", tmp_path / "out", inputs)
    prepare(ctx, CONFIG.model_copy(update={"rows_per_group": 10}))
    file = pq.ParquetFile(ctx.out / "train" / "00000.parquet")
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert groups == [10, 10, 4]
    assert file.read_row_group(1, columns=["length"]).num_rows == 10


def test_bad_records_are_set_aside_with_reasons(
    damaged: Path, small: Small, tmp_path: Path
) -> None:
    inputs = {"data": (damaged, {}), "base": (small.base, {})}
    ctx = stage_context("prepare", tmp_path / "out", inputs)
    outputs = prepare(ctx, CONFIG.model_copy(update={"max_quarantined": 0.2}))
    expected = {"broken_picture": 1, "roles": 1, "duplicate": 1}
    assert outputs["quarantined"] == expected
    assert (outputs["splits"]["train"]["in"], outputs["splits"]["train"]["out"]) == (25, 22)
    lines = [json.loads(line) for line in (ctx.out / "quarantine.jsonl").open()]
    assert {(line["line"], line["reason"]) for line in lines} == {
        (3, "broken_picture"),
        (5, "roles"),
        (24, "duplicate"),
    }
    assert pq.read_table(ctx.out / "train").num_rows == 22


def test_too_many_bad_records_fail_the_stage(damaged: Path, small: Small, tmp_path: Path) -> None:
    inputs = {"data": (damaged, {}), "base": (small.base, {})}
    with pytest.raises(TooManyBadRecords, match=r"3 of 25 records .*broken_picture 1"):
        prepare(stage_context("prepare", tmp_path / "out", inputs), CONFIG)


def test_an_unknown_template_is_refused(small: Small, tmp_path: Path) -> None:
    inputs = {"data": (small.pictures, {}), "base": (small.base, {})}
    with pytest.raises(ValueError, match="vicuna_shor' is unknown; there are"):
        prepare(
            stage_context("prepare", tmp_path / "out", inputs),
            CONFIG.model_copy(update={"template": "vicuna_shor"}),
        )


def test_the_shards_do_not_depend_on_how_they_are_cut(small: Small, tmp_path: Path) -> None:
    inputs = {"data": (small.pictures, {}), "base": (small.base, {})}
    ctx = stage_context("prepare", tmp_path / "out", inputs)
    prepare(ctx, CONFIG.model_copy(update={"rows_per_shard": 7}))
    assert len(list((ctx.out / "train").glob("*.parquet"))) == 4
    assert pq.read_table(ctx.out / "train").equals(pq.read_table(small.prepared / "train"))
