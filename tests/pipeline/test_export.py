"""Export of a real, small LLaVA: what is written, that a copy is the same, what is refused."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file, save_file

import adsc
from pipeline.manifest import ExportError, verify_folder, write_manifest
from pipeline.stages.card import Card, write_card
from pipeline.stages.export import ExportConfig, compare_logits, export, main
from pipeline.tracking import tracker as tracking
from tests.pipeline.contexts import stage_context
from workflows.tiny_llava import TinyLlavaConfig, build_model, build_processor

PLAN = "1:1/2"
TINY = TinyLlavaConfig(
    image_size=48, vision_width=32, vision_layers=2, width=32, layers=3, heads=2, mlp_width=64
)
ARMS = {
    "dense_lora": {"accuracy": 0.93, "retention": 1.0, "flops": 4.2e7, "plan": ""},
    "plan | <trained>": {"accuracy": 0.9, "retention": 0.97, "flops": 2.8e7, "plan": PLAN},
}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the merge stage writes it: two shards at least, adapter, probe."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("merged")
    processor = build_processor(["what is at the top left ? a bag"] * 20, TINY)
    model = build_model(processor, TINY, seed=0).eval()
    adsc.attach(model, PLAN)
    picture = Image.linear_gradient("L").resize((48, 48)).convert("RGB")
    asked = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": asked}],
        add_generation_prompt=True,  # type: ignore[arg-type]
    )
    probe = dict(processor(text=[prompt], images=[picture], return_tensors="pt"))
    with torch.inference_mode():
        logits = model(**probe).logits
    save_file({**probe, "logits": logits}, folder / "probe.safetensors")
    model.save_pretrained(folder, max_shard_size="200KB")
    processor.save_pretrained(folder)
    adapter = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*q_proj"))
    adapter.peft_config["default"].base_model_name_or_path = "/home/ada/base"
    adapter.save_pretrained(str(folder / "adapter"))
    return folder


def run(merged: Path, place: Path, config: ExportConfig, track: Any = None) -> dict[str, Any]:
    inputs: dict[str, tuple[Path, dict[str, Any]]] = {
        "merge": (merged, {"plan": PLAN}),
        "evaluate": (place, {"arms": ARMS, "majority": 0.31}),
        "data": (place, {"digest": "0123abcd"}),
    }
    return export(stage_context("export", place / "out", inputs, track), config)


@dataclass
class Exported:
    folder: Path
    outputs: dict[str, Any]
    tracking_uri: str
    tracker: tracking.Tracker


@pytest.fixture(scope="module")
def exported(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    place = tmp_path_factory.mktemp("export")
    config = ExportConfig(name="tiny", base="our/base", licence="apache-2.0", tolerance=0)
    uri = tracking.prepare(tracking.default_uri(place / "tracking"), "adsc")
    with tracking.stage_run(uri, "adsc", None, "export", {}) as tracker:
        outputs = run(merged, place, config, tracker)
    return Exported(place / "out", outputs, uri, tracker)


@pytest.fixture
def copy(exported: Exported, tmp_path: Path) -> Path:
    return shutil.copytree(exported.folder, tmp_path / "copy")


def test_a_fresh_process_computes_bit_for_bit_what_the_merged_model_did(
    exported: Exported,
) -> None:
    folder, outputs = exported.folder, exported.outputs
    assert outputs["probe"]["worst_difference"] == 0  # tolerance 0 passed as well
    assert outputs["probe"]["largest_logit"] > 0.1
    assert outputs["bytes"] == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert outputs["files"] == len(verify_folder(folder)) + 1
    assert len(list(folder.glob("model-*.safetensors"))) >= 2
    assert adsc.plan_of(adsc.from_pretrained(folder)) == adsc.PruningPlan.parse(PLAN)


def test_the_folder_names_nothing_of_the_machine_that_made_it(
    exported: Exported, merged: Path
) -> None:
    folder = exported.folder
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "our/base"
    for path in folder.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o777 == 0o644
            content = path.read_bytes()
            assert b"/home/ada" not in content and str(merged).encode() not in content


def test_manifest_and_card_say_where_it_comes_from(exported: Exported) -> None:
    folder = exported.folder
    manifest = json.loads((folder / "manifest.json").read_text())
    prints = manifest["lineage"].pop("fingerprints")
    assert manifest["lineage"] == {"commit": "8518b82", "data": "0123abcd"}
    assert (prints["merge"], prints["export"]) == ("m" * 64, "f" * 64)
    newest = max(folder.rglob("*"), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == "manifest.json" or newest.is_dir()
    card = (folder / "README.md").read_text()
    assert card.startswith('---\nlicense: "apache-2.0"\n')
    for text in (
        "- before layer 1, 1/2 of the vision tokens stay",
        "entering each layer: 16, 8, 8 (33.3 % fewer on average)",
        "| plan \\| \\<trained\\> | 1:1/2 | 90.0 % | 97.0 % | 2.8e+07 |",
        "| commit | 8518b82 |",
        "| data manifest | 0123abcd |",
        f"| stage merge | `{'m' * 64}` |",
        "most frequent answer of the question's kind: 31.0 %",
        "That of the base: apache-2.0.",
    ):
        assert text in card, text


def test_card_without_facts_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    empty: dict[str, Any] = dict.fromkeys(("name", "base", "licence", "plan", "workflow"), "")
    missing: dict[str, Any] = dict.fromkeys(("majority", "commit", "data_digest"))
    write_card(tmp_path, Card(**empty, **missing, arms={}, lineage={}))
    card = (tmp_path / "README.md").read_text()
    assert "The licence of the base was not given" in card
    assert "every decoder layer sees all vision tokens" in card
    assert "None were handed over" in card


def damage(folder: Path, how: str) -> None:
    shard = next(folder.glob("model-*.safetensors"))
    if how == "missing":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-8])
    elif how == "altered":
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    elif how == "extra":
        (folder / "adapter" / "surprise.json").write_text("{}")
    elif how == "link":
        shutil.copy(shard, folder.parent / "elsewhere.safetensors")
        shard.unlink()
        shard.symlink_to(folder.parent / "elsewhere.safetensors")
    else:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"].append({"path": how, "size": 1, "sha256": "0" * 64})
        (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", r"model-0.*\.safetensors is missing"),
        ("truncated", r"model-0.*\.safetensors has \d+ bytes instead of \d+"),
        ("altered", r"model-0.*\.safetensors was altered"),
        ("extra", "adapter/surprise.json is not in the manifest"),
        ("link", r"model-0.*\.safetensors is a link out of the folder"),
        ("../x.json", "'../x.json' leads out of the folder"),
        ("/etc/x.json", "'/etc/x.json' leads out of the folder"),
        ("a\\..\\x.json", "leads out of the folder"),
        ("pytorch_model.bin", "of a kind that is never exported"),
    ],
)
def test_a_damaged_copy_is_named(copy: Path, how: str, says: str) -> None:
    assert verify_folder(copy)
    damage(copy, how)
    with pytest.raises(ExportError, match=says):
        verify_folder(copy)


def test_all_damage_is_named_at_once(copy: Path) -> None:
    damage(copy, "extra")
    (copy / "config.json").unlink()
    with pytest.raises(ExportError, match=r"config\.json is missing.*surprise\.json"):
        verify_folder(copy)


@pytest.mark.parametrize("content", ["", "[]", '{"schema_version": 1}', '{"files": [{}]}'])
def test_a_broken_manifest_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ExportError, match="can't be read"):
        verify_folder(tmp_path)


def test_other_places_and_later_manifests_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is no exported checkpoint"):
        verify_folder(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema_version": 9, "files": []}')
    with pytest.raises(ExportError, match="schema version 9, this program reads 1"):
        verify_folder(tmp_path)


def test_the_command_checks_a_copy(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(copy)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["worst_difference"] == 0
    damage(copy, "altered")
    assert main([str(copy)]) == 1
    said = capsys.readouterr()
    assert "was altered" in said.err and said.out == ""


def changed(merged: Path, place: Path) -> Path:
    return shutil.copytree(merged, place / "changed")


def test_weights_that_compute_otherwise_fail_the_stage(merged: Path, tmp_path: Path) -> None:
    folder = changed(merged, tmp_path)
    for shard in folder.glob("model-*.safetensors"):
        tensors = {name: tensor * 1.01 for name, tensor in load_file(shard).items()}
        save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"logits differ by .* is allowed"):
        run(folder, tmp_path, ExportConfig(log_model=False))


def test_missing_weights_fail_the_stage(merged: Path, tmp_path: Path) -> None:
    folder = changed(merged, tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name, shard = next(iter(index["weight_map"].items()))
    tensors = load_file(folder / shard)
    del tensors[name]
    save_file(tensors, folder / shard, metadata={"format": "pt"})
    del index["weight_map"][name]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match=r"(?s)fresh process can't use .*missing_keys"):
        run(folder, tmp_path, ExportConfig(log_model=False))


def test_another_plan_fails_the_check(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["adsc"] = adsc.PruningPlan.parse("1:1/4").to_dict()
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="logits have shape"):
        compare_logits(copy)


def test_what_could_be_executed_is_not_published(merged: Path, tmp_path: Path) -> None:
    folder = changed(merged, tmp_path)
    torch.save({}, folder / "optimizer.bin")
    (folder / "modeling.py").write_text("")
    with pytest.raises(ExportError, match=r"modeling\.py, optimizer\.bin: only"):
        run(folder, tmp_path, ExportConfig(log_model=False))


def test_a_merge_without_probe_is_refused(merged: Path, tmp_path: Path) -> None:
    folder = changed(merged, tmp_path)
    (folder / "probe.safetensors").unlink()
    with pytest.raises(ExportError, match=r"has no probe\.safetensors; the merge stage"):
        run(folder, tmp_path, ExportConfig(log_model=False))


def test_weights_outside_the_folder_are_not_written_down(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_text("")
    with pytest.raises(ExportError, match="safetensors"):
        write_manifest(tmp_path, {})


def test_the_mlflow_model_answers_as_the_checkpoint_does(
    exported: Exported, tmp_path: Path
) -> None:
    uri, run_id = exported.tracking_uri, exported.tracker.run_id
    assert exported.tracker.problems == [] and run_id is not None
    client = MlflowClient(uri)
    logged = client.get_logged_model(exported.outputs["mlflow_model"].removeprefix("models:/"))
    assert (logged.name, str(logged.status), logged.source_run_id) == ("tiny", "READY", run_id)
    logged_by_run = client.get_run(run_id).outputs
    assert logged_by_run is not None
    assert [model.model_id for model in logged_by_run.model_outputs] == [logged.model_id]
    requirements = Path(logged.artifact_location.removeprefix("file://")) / "requirements.txt"
    # What an index serves: without the local part of the version, as in 2.13.0+cpu.
    public = torch.__version__.partition("+")[0]
    assert f"torch=={public}" in requirements.read_text().splitlines()

    picture = io.BytesIO()
    Image.linear_gradient("L").save(picture, "PNG")
    image = base64.b64encode(picture.getvalue()).decode()
    script = (
        "import json, sys, mlflow, pandas; row = json.loads(sys.argv[2]);"
        "model = mlflow.pyfunc.load_model(sys.argv[1]);"
        "rows = pandas.DataFrame([row, row]);"
        "answers = model.predict(rows, params={'max_new_tokens': 5});"
        "import adsc; print(json.dumps([*answers, adsc.__file__]))"
    )
    row = json.dumps({"image": image, "question": "what is it?"})
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri}
    done = subprocess.run(
        [sys.executable, "-c", script, logged.artifact_location, row],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    first, second, code = json.loads(done.stdout.splitlines()[-1])
    assert Path(code).is_relative_to(logged.artifact_location.removeprefix("file://"))
    assert first == second == {"answer": answer(exported.folder, image)}


def answer(folder: Path, image: str) -> str:
    from transformers import AutoProcessor

    from pipeline.evaluation.generation import Question, generate_answers

    model = adsc.from_pretrained(folder).eval()
    question = Question("1", "any", "what is it?", "", (base64.b64decode(image),))
    return generate_answers(model, AutoProcessor.from_pretrained(folder), [question], 1, 5)[0]


def test_a_picture_that_is_none_is_a_clear_error(copy: Path) -> None:
    from mlflow.pyfunc import PythonModelContext

    from pipeline.tracking.mlflow_model import VisionLanguageModel

    model = VisionLanguageModel()
    model.load_context(PythonModelContext({"checkpoint": str(copy)}, None))
    with pytest.raises(ValueError, match="must be a base64 PNG or JPEG"):
        model._answer("bm90IGEgcGljdHVyZQ==", "what?", 3)
