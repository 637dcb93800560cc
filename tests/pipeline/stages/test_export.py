"""Export of a real, small LLaVA: what is written, that a copy is the same, what is refused."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file, save_file

import adsc
from pipeline.durable.record import Record
from pipeline.durable.stage import Input
from pipeline.kinds.export import ExportConfig
from pipeline.publishing.manifest import ExportError, verify_folder, write_manifest
from pipeline.publishing.publish import pull
from pipeline.reporting.card import Card, write_card
from pipeline.stages.export import compare_logits, evaluation, export, main, runs_behind
from pipeline.store import open_store
from pipeline.tracking import tracker as tracking
from tests.pipeline.contexts import stage_context
from workflows.commands.main import main as command
from workflows.demo.tiny_llava import TinyLlavaConfig, build_model, build_processor

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
    content = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}],
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
        ("pytorch_model.bin", "of a type that is never exported"),
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
    with pytest.raises(ExportError, match="is not an exported checkpoint"):
        verify_folder(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema_version": 9, "files": []}')
    with pytest.raises(ExportError, match="schema version 9, this program reads 1"):
        verify_folder(tmp_path)


def test_the_command_checks_a_copy(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(copy)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["worst_difference"] == 0
    damage(copy, "altered")
    assert main([str(copy)]) == 1
    printed = capsys.readouterr()
    assert "was altered" in printed.err and printed.out == ""


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


def test_the_folder_says_what_was_measured_and_on_what_it_was_trained(
    merged: Path, tmp_path: Path
) -> None:
    """As the stages hand it over: results.json and the data's manifest.json."""
    own = {"name": "mine", "trained": True, "plan": PLAN, "accuracy": {"mean": 0.9}}
    own |= {"retention": 0.97, "retention_interval": {"mean": 0.97, "low": 0.94, "high": 0.99}}
    own |= {"flops": 30, "kv_cache_bytes": 20, "average_vision_tokens": 12.0}
    control = own | {"name": "control", "plan": "", "flops": 60, "kv_cache_bytes": 40}
    untrained = own | {"name": "untrained", "trained": False}
    results = {"control_arm": "control", "arms": [own, control, untrained]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "manifest.json").write_text('{"in": 24}')
    run(merged, tmp_path, ExportConfig(log_model=False))
    measured = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (measured["arm"], measured["control"]) == ("mine", "control")
    assert measured["own"] == {
        "accuracy": 0.9,
        "retention": 0.97,
        "retention_low": 0.94,
        "flops_of_control": 0.5,
        "kv_cache_of_control": 0.5,
        "average_vision_tokens": 12.0,
    }
    assert (tmp_path / "out" / "data_manifest.json").read_text() == '{"in": 24}'


@pytest.mark.parametrize(
    ("others", "found"),
    [
        ([{"name": "other"}], "plan_trained"),
        ([{"name": "elastic_a", "budget": "a"}, {"name": "elastic_b", "budget": "b"}], "elastic_a"),
    ],
)
def test_recipes_compared_at_the_same_plan_do_not_hide_the_own_scores(
    others: list[dict[str, Any]], found: str, tmp_path: Path
) -> None:
    own = {"name": "plan_trained", "trained": True, "plan": PLAN, "accuracy": {"mean": 0.9}}
    own |= {"retention": 0.97, "retention_interval": None, "budget": ""}
    own |= {"flops": 30, "kv_cache_bytes": 20, "average_vision_tokens": 12.0}
    arms = [own | {"name": "control", "plan": ""}, *(own | other for other in others)]
    arms += [own] if found == own["name"] else []
    results = {"control_arm": "control", "arms": arms}
    (tmp_path / "results.json").write_text(json.dumps(results))
    record = Record(stage="evaluate", fingerprint="", attempt="", uri=str(tmp_path))
    measured = evaluation(Input(record), PLAN)
    assert measured["arm"] == found and measured["own"]["accuracy"] == 0.9
    assert list(measured["budgets"]) == [it["budget"] for it in others if "budget" in it]


def version_of(exported: Exported) -> Any:
    client = MlflowClient(exported.tracking_uri)
    _, name, number = exported.outputs["mlflow_version"].rsplit("/", 2)
    return client.get_model_version(name, number)


def test_the_registry_knows_the_checkpoint_and_the_runs_behind_it(exported: Exported) -> None:
    version = version_of(exported)
    assert version.aliases == ["candidate"]
    assert version.run_id == exported.tracker.run_id
    assert version.tags["adsc.manifest"] == exported.outputs["manifest"]
    assert (version.tags["adsc.plan"], version.tags["adsc.commit"]) == (PLAN, "8518b82")
    assert "Plan `1:1/2`" in version.description
    # The same again is no second version.
    again = exported.tracker.model(
        exported.folder, "tiny", {"adsc.manifest": exported.outputs["manifest"]}
    )
    assert again == (exported.outputs["mlflow_model"], exported.outputs["mlflow_version"])


def test_lineage_goes_back_over_all_stages(tmp_path: Path) -> None:
    from pipeline.durable.record import Record, Source
    from pipeline.durable.stage import Input

    store, first = open_store(str(tmp_path)), tmp_path / "first-0" / "attempts" / "1"
    middle = tmp_path / "middle-0" / "attempts" / "1"
    for record in (
        Record(stage="first", fingerprint="1" * 64, attempt="1", run_id="run of first"),
        Record(
            stage="middle",
            fingerprint="2" * 64,
            attempt="1",
            run_id="run of middle",
            inputs={"x": Source(fingerprint="1" * 64, uri=str(first))},
        ),
    ):
        store.create(f"{record.stage}-0/record.json", record.model_dump_json().encode())
    last = Record(
        stage="last",
        fingerprint="3" * 64,
        attempt="1",
        inputs={
            "y": Source(fingerprint="2" * 64, uri=str(middle)),
            "gone": Source(fingerprint="4" * 64, uri=str(tmp_path / "gone-0/attempts/1")),
        },
    )
    assert runs_behind({"merge": Input(last)}) == {
        "first": "run of first",
        "middle": "run of middle",
    }


def promote(exported: Exported, *words: str) -> int:
    return command(["promote", "tiny", "--mlflow", exported.tracking_uri, *words])


def test_an_alias_moves_only_through_the_gates(
    exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    client, version = MlflowClient(exported.tracking_uri), version_of(exported)

    def champion() -> object:
        return client.get_registered_model("tiny").aliases.get("champion")

    assert promote(exported) == 1
    assert "not measured" in capsys.readouterr().out and champion() is None
    for name, value in (("retention_low", "0.93"), ("flops_of_control", "0.66")):
        client.set_model_version_tag("tiny", version.version, f"adsc.{name}", value)
    assert promote(exported, "--min-retention", "0.95", "--max-cost", "0.7") == 1
    printed = capsys.readouterr().out
    assert "refused: champion stays with version none" in printed and champion() is None
    assert promote(exported, "--min-retention", "0.9", "--max-cost", "0.6") == 1
    assert promote(exported, "--min-retention", "0.9", "--max-cost", "0.7", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["refused"] == []
    assert str(champion()) == str(version.version)
    promoted = version_of(exported).tags["adsc.promoted.champion"]
    assert "retention (lower end) at least 0.9: 0.93" in promoted
    assert promote(exported, "--version", "77") == 2
    assert "can't promote tiny" in capsys.readouterr().err
    for nowhere in (str(exported.folder), f"sqlite:///{exported.folder}/none.db"):
        assert command(["promote", "tiny", "--mlflow", nowhere]) == 2
        assert "can't promote tiny" in capsys.readouterr().err
    assert not (exported.folder / "none.db").exists()


def test_export_and_pull_by_command(
    exported: Exported, s3_endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of the stage: loaded back from S3 in a fresh process, and the same bits below."""
    address = f"s3://lab/{uuid.uuid4().hex}/tiny"
    assert command(["export", str(exported.folder), address, "--tolerance", "0", "--json"]) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert done["probe"]["worst_difference"] == 0 and done["probe"]["largest_logit"] > 0.1
    assert (done["digest"], done["moved"]) == (exported.outputs["manifest"], done["files"] - 1)
    assert command(["export", str(exported.folder), address]) == 0
    assert "already published: nothing to do" in capsys.readouterr().out
    copy = tmp_path / "copy"
    assert command(["pull", address, str(copy), "--expect", done["digest"]]) == 0
    assert "all verified" in capsys.readouterr().out
    for path in exported.folder.rglob("*"):
        if path.is_file():
            assert (copy / path.relative_to(exported.folder)).read_bytes() == path.read_bytes()
    assert command(["pull", address, str(tmp_path / "other"), "--expect", "0" * 64]) == 2
    assert "another checkpoint, or one that was tampered with" in capsys.readouterr().err


def test_any_saved_model_can_be_exported(
    merged: Path, s3_endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `save_pretrained` leaves: no probe, no card, no manifest; and never a module."""
    source = changed(merged, tmp_path)
    (source / "probe.safetensors").unlink()
    address = f"s3://lab/{uuid.uuid4().hex}"
    words = ["export", str(source), address, "--name", "mine", "--base", "our/base"]
    (source / "modeling.py").write_text("raise SystemExit('executed')")
    assert command(words) == 2
    assert "modeling.py: only" in capsys.readouterr().err
    (source / "modeling.py").unlink()
    # What a snapshot of the hub has beside it is left out.
    (source / ".gitattributes").write_text("*.safetensors filter=lfs")
    (source / ".cache" / "huggingface").mkdir(parents=True)
    (source / ".cache" / "huggingface" / "config.json.metadata").write_text("1")
    assert command(words) == 0
    assert command(words) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert command(["pull", address, str(tmp_path / "copy"), "--check"]) == 0
    assert adsc.plan_of(adsc.from_pretrained(tmp_path / "copy")) == adsc.PruningPlan.parse(PLAN)
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "# mine" in card and "before layer 1, 1/2 of the vision tokens stay" in card
    assert not (source / "README.md").exists() and not (source / "manifest.json").exists()
    assert not list((tmp_path / "copy").glob(".*"))


def test_the_stage_publishes_to_the_address_in_its_config(
    merged: Path, s3_endpoint: str, tmp_path: Path
) -> None:
    address = f"s3://lab/{uuid.uuid4().hex}"
    outputs = run(merged, tmp_path, ExportConfig(log_model=False, to=address, tolerance=0))
    assert outputs["published"] == address
    done = pull(open_store(address), tmp_path / "copy")
    assert done.digest == outputs["manifest"]
    assert verify_folder(tmp_path / "copy") == verify_folder(tmp_path / "out")


def test_nothing_but_weights_lies_beside_the_config(exported: Exported) -> None:
    """Serving engines read every safetensors file that does."""
    folder = exported.folder
    beside = {path.name for path in folder.glob("*.safetensors")}
    assert beside and all(name.startswith("model-") for name in beside)
    assert (folder / "probe" / "probe.safetensors").is_file()
    assert "probe/probe.safetensors" in (folder / "README.md").read_text()


def test_an_export_from_before_is_checked_as_it_is(copy: Path) -> None:
    """Its probe lies beside the weights."""
    shutil.move(copy / "probe" / "probe.safetensors", copy / "probe.safetensors")
    (copy / "probe").rmdir()
    write_manifest(copy, {})
    assert main([str(copy)]) == 0


def test_the_template_writes_the_bos_token_once(exported: Exported, merged: Path) -> None:
    """A rendered conversation has the tokens that training had, whoever turns it into ids."""
    from transformers import AutoProcessor

    from pipeline.data.config import PrepareConfig
    from pipeline.data.rendering import Renderer
    from pipeline.data.templates import shipped, special_tokens

    processor: Any = AutoProcessor.from_pretrained(exported.folder)
    turn = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": turn}], add_generation_prompt=True
    )
    assert text.startswith("<s>USER: <image>")
    picture = Image.linear_gradient("L").resize((48, 48)).convert("RGB")
    special = special_tokens(processor, [text])
    ids = processor(text=[text], images=[picture], **special)["input_ids"][0]
    segments = shipped("vicuna_short").render([("human", "<image>what is it?")])
    renderer = Renderer.load(merged, "vicuna_short", 512, PrepareConfig(min_side=1).limits())
    vision = processor.tokenizer.convert_tokens_to_ids("<image>")
    trained, _ = renderer.tokenise(segments, [sum(token == vision for token in ids)])
    assert list(ids) == list(trained)
    assert sum(token == processor.tokenizer.bos_token_id for token in ids) == 1
    raw = processor.tokenizer(text, add_special_tokens=False)["input_ids"]  # as vLLM does
    assert raw[0] == processor.tokenizer.bos_token_id != raw[1]


def test_a_tensor_that_no_engine_places_is_refused(merged: Path, tmp_path: Path) -> None:
    folder = changed(merged, tmp_path)
    save_file({"language_model.model.extra.weight": torch.zeros(1)}, folder / "model-x.safetensors")
    with pytest.raises(ExportError, match=r"no serving engine has a place for: language_model"):
        run(folder, tmp_path, ExportConfig(log_model=False))
