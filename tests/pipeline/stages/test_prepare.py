"""The prepare stage on real pictures and on broken ones; Ray is the real one."""

import hashlib
import json
import os
import re
import shutil
import signal
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoProcessor

from pipeline.data.config import PrepareConfig
from pipeline.data.mixture import Source
from pipeline.data.pictures import FolderPictures, PictureLimits
from pipeline.data.shards import ShardWriter
from pipeline.data.sources import find_files
from pipeline.stages.prepare import TooManyBadRecords, _plan, _rendered, _write_split, prepare
from pipeline.store import StoreError, open_store
from tests.pipeline.contexts import stage_context
from tests.small import Small

pytestmark = pytest.mark.usefixtures("ray_address")

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
    assert {(line["index"], line["reason"]) for line in lines} == {
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


def test_mixtures_take_what_weights_and_caps_allow(small: Small, tmp_path: Path) -> None:
    shutil.copytree(small.pictures, tmp_path / "data")
    text = [
        {
            "id": f"text-{i}",
            "conversations": [
                {"from": "human", "value": f"{i} + 1?"},
                {"from": "gpt", "value": "x"},
            ],
        }
        for i in range(600)
    ]
    (tmp_path / "data" / "text.jsonl").write_text("\n".join(map(json.dumps, text)))
    mix = {
        "grids": Source(data="train.json", weight=2),
        "sums": Source(data="text.jsonl", weight=1),
        "more": Source(data="text.jsonl", cap=3),
    }
    taken = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        inputs = {"data": (tmp_path / "data", {}), "base": (small.base, {})}
        ctx = stage_context("prepare", tmp_path / name, inputs)
        config = CONFIG.model_copy(
            update={"splits": {"train": mix}, "seed": seed, "max_quarantined": 0.1}
        )
        counts = prepare(ctx, config)["splits"]["train"]
        assert counts["in"] == 24 + 12 + 3 == counts["out"] + sum(counts["quarantined"].values())
        assert {source: found["in"] for source, found in counts["sources"].items()} == {
            "grids": 24,
            "sums": 12,
            "more": 3,
        }
        taken.append(pq.read_table(ctx.out / "train").to_pylist())
    assert taken[0] == taken[1] != taken[2]
    rows = [row for row in taken[0] if row["id"].startswith("text-")]
    assert rows and all(row["pictures"] == [] and row["vision_tokens"] == 0 for row in rows)


def test_test_records_that_train_has_are_leaks(small: Small, tmp_path: Path) -> None:
    shutil.copytree(small.pictures, tmp_path / "data")
    train = json.loads((tmp_path / "data" / "train.json").read_text())
    test = json.loads((tmp_path / "data" / "test.json").read_text())
    leaked = train[4] | {"id": "seen"}
    (tmp_path / "data" / "test.json").write_text(json.dumps([*test, leaked]))
    inputs = {"data": (tmp_path / "data", {}), "base": (small.base, {})}
    ctx = stage_context("prepare", tmp_path / "out", inputs)
    outputs = prepare(ctx, PrepareConfig(template="vicuna_short", max_quarantined=0.5))
    assert outputs["splits"]["test"]["quarantined"] == {"leak": 1}
    (line,) = [json.loads(line) for line in (ctx.out / "quarantine.jsonl").open()]
    assert (line["id"], line["split"], line["index"]) == ("seen", "test", len(test))


def test_the_manifest_tells_what_is_in_the_shards(small: Small, tmp_path: Path) -> None:
    inputs = {"data": (small.pictures, {}), "base": (small.base, {})}
    ctx = stage_context("prepare", tmp_path / "out", inputs)
    prepare(ctx, CONFIG.model_copy(update={"bytes_per_shard": 30_000, "rows_per_group": 5}))
    manifest = json.loads((ctx.out / "manifest.json").read_text())
    rows = pq.read_table(ctx.out / "train")
    files = {path.relative_to(ctx.out).as_posix(): path for path in ctx.out.rglob("*.parquet")}
    assert files.keys() == manifest["files"].keys() and len(files) > 2
    for name, path in files.items():
        found = manifest["files"][name]
        assert found["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert found["rows"] == pq.read_metadata(path).num_rows
        assert found["bytes"] == path.stat().st_size < 40_000  # and Parquet's own few hundred
    counts = manifest["splits"]["train"]
    lengths = sorted(rows["length"].to_pylist())
    assert counts["tokens"] == sum(lengths) and counts["longest"] == lengths[-1]
    assert counts["vision_tokens"] == 24 * 64
    assert counts["supervised_tokens"] == sum(rows["supervised"].to_pylist())
    assert counts["length_quantiles"]["0"] == lengths[0]
    assert counts["length_quantiles"]["50"] == lengths[11]
    assert counts["length_quantiles"]["100"] == lengths[-1]
    assert sum(counts["length_histogram"].values()) == 24
    assert rows.equals(pq.read_table(small.prepared / "train"))


class DiesOnce:
    """Pictures whose reader's process is killed once, in the middle."""

    waits = False

    def __init__(self, root: Path, name: str) -> None:
        self.pictures, self.name = FolderPictures(root), name
        self.flag = root / "died"

    def read(self, name: str, limits: PictureLimits) -> bytes:
        if name == self.name and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.pictures.read(name, limits)


def test_a_killed_worker_loses_and_repeats_nothing(damaged: Path, small: Small) -> None:
    records = json.loads((damaged / "train.json").read_text())
    more = [json.loads(json.dumps(record) + " ") for record in records]
    for i, record in enumerate(more):
        record["conversations"][0]["value"] += f" {i}"
    (damaged / "train.json").write_text(json.dumps(records + more * 12))
    inputs = {"data": (damaged, {}), "base": (small.base, {})}
    ctx = stage_context("prepare", damaged.parent / "out", inputs)
    work, tasks = _plan("train", ctx.inputs["data"], ctx.inputs["base"], CONFIG, "vicuna_short")
    assert len(tasks) > 1
    work = replace(work, roots={"train": DiesOnce(damaged / "images", records[20]["image"])})
    writer = ShardWriter(ctx.out, 1000, 1 << 30, 64)
    with (ctx.out / "quarantine.jsonl").open("w") as quarantine:
        counts = _write_split(
            tasks,
            work,
            _rendered(tasks, work),
            writer,
            {"train": set()},
            quarantine,
            lambda *_: None,
        )
    assert (damaged / "images" / "died").exists()
    lines = (ctx.out / "quarantine.jsonl").read_text().splitlines()
    assert counts["in"] == 25 * 13 == counts["out"] + len(lines)
    assert len(lines) == sum(counts["quarantined"].values())


class Refuses:
    """Pictures in a store that refuses: no fault of any record."""

    waits = False

    def read(self, name: str, limits: PictureLimits) -> bytes:
        raise StoreError(f"can't use s3://bucket for {name}: access is denied")


def test_a_store_that_refuses_is_an_error_not_a_bad_record(small: Small, tmp_path: Path) -> None:
    inputs = {"data": (small.pictures, {}), "base": (small.base, {})}
    ctx = stage_context("prepare", tmp_path / "out", inputs)
    work, tasks = _plan("train", ctx.inputs["data"], ctx.inputs["base"], CONFIG, "vicuna_short")
    work = replace(work, roots={"train": Refuses()})
    writer = ShardWriter(ctx.out, 1000, 1 << 30, 64)
    with (
        (ctx.out / "quarantine.jsonl").open("w") as quarantine,
        pytest.raises(StoreError, match="access is denied") as caught,
    ):
        _write_split(
            tasks,
            work,
            _rendered(tasks, work),
            writer,
            {"train": set()},
            quarantine,
            lambda *_: None,
        )
    assert str(caught.value).startswith("can't use s3://bucket")


class GivesParts(SimpleHTTPRequestHandler):
    """A web server's answers, to requests for a part of a file as well."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data, wanted = path.read_bytes(), self.headers.get("Range", "")
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            data = data[int(first) : int(last) + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of a web server for `tmp_path`."""
    handler = partial(GivesParts, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_buckets_tar_files_and_web_servers_give_the_same_shards(
    small: Small, tmp_path: Path, served: str
) -> None:
    records = json.loads((small.pictures / "train.json").read_text())
    (tmp_path / "data").mkdir()
    gone = [
        {"id": name, "image": name, "conversations": records[0]["conversations"]}
        for name in ("gone.png", "../train.json")
    ]
    (tmp_path / "data" / "train.json").write_text(json.dumps(records + gone))
    open_store("s3://lab/prepare").upload(small.pictures / "images", "images")
    with tarfile.open(tmp_path / "data" / "0.tar", "w") as tar:
        tar.add(small.pictures / "images", "images")
    shutil.copytree(small.pictures / "images", tmp_path / "data" / "images")
    open_store("s3://lab/prepare").upload(tmp_path / "data", "data")
    for number, (place, images) in enumerate(
        (
            ("train.json", "s3://lab/prepare/images"),
            ("train.json", "*.tar"),
            ("s3://lab/prepare/data/train.json", "s3://lab/prepare/data/*.tar"),
            (f"{served}/data/train.json", f"{served}/data/images"),
        )
    ):
        inputs = {"data": (tmp_path / "data", {}), "base": (small.base, {})}
        ctx = stage_context("prepare", tmp_path / str(number), inputs)
        changes = {"images": images, "max_quarantined": 0.1, "splits": {"train": place}}
        assert prepare(ctx, CONFIG.model_copy(update=changes))["quarantined"] == {
            "missing_picture": 1,
            "path": 1,
        }
        assert pq.read_table(ctx.out / "train").equals(pq.read_table(small.prepared / "train"))


def test_addresses_that_cannot_be_read(tmp_path: Path, served: str) -> None:
    for place, why in {
        f"{served}/none.json": "there is no file http://",
        "s3://lab/none-*.json": "there is no file s3://lab/none",
        "s3://no-such-bucket-at-all/*.json": "there is no bucket no-such-bucket-at-all",
        "nothing://a/b.json": "nothing:// is not a kind of store",
        "ftp://ada:lovelace@host/a.json": "ftp://host has credentials",
    }.items():
        with pytest.raises(ValueError, match=re.escape(why)) as caught:
            find_files(place, tmp_path, "train")
        assert "lovelace" not in str(caught.value)
