"""Files that are not what their names say: one sentence with the file and what to do, at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adsc
from adsc.weight_files import original_layout, problem
from pipeline.data.conversations import BadRecord
from pipeline.data.pictures import PictureLimits, open_pictures
from pipeline.data.prepared import FLAT, split_folder
from pipeline.durable.identity import load_body
from pipeline.evaluation.benchmarks import BenchmarkError, convert_one, find_files
from pipeline.kinds.base import BaseError
from pipeline.stages.prepare import TooManyBadRecords
from tests.pipeline.contexts import stage_context
from tests.pipeline.evaluation.benchmark_files import WRITERS
from tests.small import Small
from workflows.commands.main import main
from workflows.evaluation import evaluation_stages
from workflows.registry import load_workflow

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def picture(small: Small) -> Path:
    return min((small.pictures / "images" / "train").iterdir())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no picture", "x.png' is none of JPEG"),
        (LFS, "x.png' is a git-LFS pointer"),
        (b"", "x.png' is empty"),
        (b"<html>404</html>", "x.png' is a web page"),
    ],
)
def test_chat_with_what_is_no_picture(
    content: bytes, says: str, small: Small, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "x.png").write_bytes(content)
    assert main(["chat", str(small.base), str(tmp_path / "x.png"), "what?"]) == 2
    assert says in capsys.readouterr().err


def cut(data: bytes) -> bytes:
    return data[:-100]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: LFS, "model.safetensors is a git-LFS pointer"),
        (lambda data: b"", "is not a whole safetensors file (0 bytes)"),
        (cut, "is not a whole safetensors file ("),
        (lambda data: b"PK\x03\x04" + data, "is not a whole safetensors file ("),
        (lambda data: data[:8] + b"[" + data[9:], "is not a whole safetensors file ("),
    ],
)
def test_chat_with_weights_that_are_none(
    change: Any, says: str, small: Small, picture: Path, tmp_path: Path, capsys: Captured
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(small.base, folder)
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(change(weights.read_bytes()))
    assert main(["chat", str(folder), str(picture), "what?"]) == 2
    assert says in capsys.readouterr().err


def test_weights_in_other_formats_are_named(small: Small, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(small.base, folder)
    (weights,) = folder.glob("*.safetensors")
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(adsc.CheckpointError, match=r"as pytorch_model\.bin: only safetensors"):
        adsc.from_pretrained(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(adsc.CheckpointError, match="holds no weights"):
        adsc.from_pretrained(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(adsc.CheckpointError, match="holds an adapter, not a model"):
        adsc.from_pretrained(folder)
    config = folder / "config.json"
    config.unlink()  # as PEFT saves it
    with pytest.raises(adsc.CheckpointError, match="holds an adapter, not a model"):
        adsc.from_pretrained(folder)
    config.write_bytes(LFS)
    with pytest.raises(adsc.CheckpointError, match=r"config\.json is a git-LFS pointer"):
        adsc.from_pretrained(folder)
    assert problem(small.base) is None


@settings(max_examples=50)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_damage_is_a_sentence(damage: bytes, place: int) -> None:
    import tempfile

    import torch
    from safetensors.torch import save

    whole = save({"a": torch.zeros(20), "b": torch.ones(3)})
    place = min(place, len(whole))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text("{}")
        Path(folder, "model.safetensors").write_bytes(whole)
        assert problem(Path(folder)) is None
        for altered in (whole[:place], damage):
            Path(folder, "model.safetensors").write_bytes(altered)
            found = problem(Path(folder))
            assert altered == whole or (found and "model.safetensors" in found)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llava_llama"},
        {"model_type": "llava_mistral"},
        {"model_type": "llava_qwen"},
        {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]},
        {"model_type": "llava_mpt", "architectures": ["LlavaMptForCausalLM"]},
    ],
)
def test_original_checkpoints_are_refused_before_anything_runs(
    config: dict[str, Any], small: Small, tmp_path: Path, capsys: Captured
) -> None:
    folder = tmp_path / "original"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    says = "in transformers' layout, such as llava-hf/"
    with pytest.raises(BaseError, match=says):
        load_workflow("demo", [f"base.source={folder}"]).stages()
    with pytest.raises(ValueError, match=says):
        evaluation_stages(str(folder), ["dense"], tasks=[str(small.pictures / "test.json")])
    with pytest.raises(adsc.CheckpointError, match=says):
        adsc.from_pretrained(folder)
    data = str(small.pictures / "train.json")
    out = tmp_path / "out"
    assert main(["prepare", data, "--model", str(folder), "--out", str(out)]) == 2
    assert says in capsys.readouterr().err and not out.exists()


def test_original_checkpoints_are_known_by_their_hub_ids(tmp_path: Path, capsys: Captured) -> None:
    with pytest.raises(BaseError, match=r"use one .* such as llava-hf/llava-1\.5-13b-hf"):
        load_workflow("llava15_7b", ["base.source=liuhaotian/llava-v1.5-13b"]).stages()
    with pytest.raises(ValueError, match=r"llava-hf/llava-1\.5-7b-hf"):
        evaluation_stages("liuhaotian/llava-v1.5-7b", ["dense"], tasks=["a.json"])
    assert original_layout({"model_type": "llava"}) is None
    assert original_layout({"model_type": "llava_next", "architectures": ["LlavaNext"]}) is None


def test_a_flat_folder_of_prepared_data_is_evaluated_whole(small: Small, tmp_path: Path) -> None:
    """As `adsc prepare` writes it: shards in the folder itself."""
    flat = tmp_path / "flat"
    shutil.copytree(small.prepared / "test", flat)
    shutil.copy(small.prepared / "manifest.json", flat)
    stages = evaluation_stages(str(small.base), ["dense"], data=str(flat))
    assert stages[-2].config.splits == (FLAT,)
    assert split_folder(flat, FLAT) == flat
    assert split_folder(small.prepared, "test") == small.prepared / "test"


@pytest.mark.parametrize(
    ("splits", "words", "says"),
    [
        (("train",), ["test"], "holds no test, only train: name one with --tasks"),
        (("train", "val"), [], "holds train, val: name one with --tasks"),
        ((), [], "there is no Parquet shard in it"),
    ],
)
def test_splits_that_are_not_there_are_named_before_anything_runs(
    splits: tuple[str, ...], words: list[str], says: str, small: Small, tmp_path: Path
) -> None:
    folder = tmp_path / "prepared"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    for split in splits:
        shutil.copytree(small.prepared / "test", folder / split)
    with pytest.raises(ValueError, match=says):
        evaluation_stages(str(small.base), ["dense"], data=str(folder), tasks=words)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_address")
def test_eval_of_what_prepare_wrote(small: Small, tmp_path: Path, capsys: Captured) -> None:
    out = str(tmp_path / "prepared")
    given = ["--images", str(small.pictures / "images"), "--model", str(small.base)]
    assert main(["prepare", str(small.pictures / "test.json"), *given, "--out", out]) == 0
    command = ["eval", str(small.base), "--data", out, "--methods", "dense", "--json"]
    assert main([*command, "--root", str(tmp_path / "runs"), "--max-new-tokens", "3"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_questions"] == 48


@pytest.fixture
def questions(small: Small, tmp_path: Path) -> str:
    """A task file in which a record names a video."""
    records = json.loads((small.pictures / "test.json").read_text())
    records[0]["video"] = "a.mp4"
    (tmp_path / "q.json").write_text(json.dumps(records))
    (tmp_path / "images").symlink_to(small.pictures / "images")
    return str(tmp_path / "q.json")


def test_bad_records_of_tasks_advise_no_option_that_eval_lacks(
    ray_address: str, small: Small, questions: str, tmp_path: Path
) -> None:
    (stage,) = [
        one
        for one in evaluation_stages(str(small.base), ["dense"], tasks=[questions])
        if one.name == "prepare"
    ]
    inputs = {"data": (tmp_path, {}), "base": (small.base, {})}
    with pytest.raises(TooManyBadRecords, match="fix the task files") as caught:
        load_body(stage.kind.body)(stage_context("prepare", tmp_path / "out", inputs), stage.config)
    assert "max_quarantined" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_address")
def test_eval_advises_no_option_that_it_lacks(
    small: Small, questions: str, tmp_path: Path, capsys: Captured
) -> None:
    command = ["eval", str(small.base), "--tasks", questions, "--methods", "dense"]
    assert main([*command, "--root", str(tmp_path / "runs")]) != 0
    printed = capsys.readouterr()
    assert "fix the task files" in printed.err + printed.out
    assert "max_quarantined" not in printed.err + printed.out


def test_a_linked_folder_of_pictures_is_named_with_the_link(tmp_path: Path) -> None:
    (tmp_path / "far" / "coco").mkdir(parents=True)
    (tmp_path / "far" / "coco" / "a.png").write_bytes(b"x")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "coco").symlink_to(tmp_path / "far" / "coco")
    (tmp_path / "root").symlink_to(tmp_path / "far")
    limits = PictureLimits(min_side=1, max_pixels=100, max_bytes=100, max_aspect=9)
    with pytest.raises(BadRecord) as caught:
        open_pictures("images", tmp_path).read("coco/a.png", limits)
    link, target = tmp_path / "images" / "coco", tmp_path / "far" / "coco"
    assert f"by the symbolic link {link}, which is not followed: name {target}" in str(caught.value)
    for name in ("../far/coco/a.png", str(target / "a.png")):
        with pytest.raises(BadRecord, match="leads out of the image root ") as caught:
            open_pictures("images", tmp_path).read(name, limits)
        assert "symbolic" not in str(caught.value)
    # A root that is a link itself is where the user pointed.
    assert open_pictures("root", tmp_path).read("coco/a.png", limits) == b"x"


@pytest.mark.parametrize("content", [b"caf\xe9\tYes\n", LFS, b"Is it?\n", b"a\tb\tYes\n"])
def test_a_file_of_mme_that_cannot_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    WRITERS["mme"](tmp_path)
    file = min(tmp_path.rglob("*.txt"))
    file.write_bytes(content)
    (tmp_path / "out").mkdir()
    with pytest.raises(BenchmarkError) as caught:
        convert_one("mme", tmp_path, tmp_path / "out")
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("content", [b"\xff\xfe\xfa", LFS, b"<html>"])
def test_files_of_all_benchmarks_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    read = [
        path
        for found in find_files(name, tmp_path)
        for path in ([found] if found.is_file() else found.rglob("*.txt"))
    ]
    assert read
    for file in read:
        kept = file.read_bytes()
        file.write_bytes(content)
        (tmp_path / "out").mkdir(exist_ok=True)
        with pytest.raises(BenchmarkError) as caught:
            convert_one(name, tmp_path, tmp_path / "out")
        assert str(file) in str(caught.value)
        file.write_bytes(kept)
