"""`adsc eval` as people call it, on the small base: task files, prepared data, what is refused."""

import json
import shutil
import sys
import tempfile
import uuid
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import adsc
from pipeline.durable.graph import fingerprints
from pipeline.durable.identity import load_body
from pipeline.durable.stage import Input
from pipeline.evaluation.benchmarks import BENCHMARKS
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.engine import VARIABLE, engine_python
from pipeline.evaluation.scoring import RULES
from pipeline.packaged import resolve
from pipeline.store import open_store
from tests.pipeline.contexts import stage_context
from tests.pipeline.evaluation.benchmark_files import QUESTIONS, WRITERS
from tests.small import Small
from workflows.commands.main import main
from workflows.evaluation import content_digest, evaluation_stages

pytestmark = pytest.mark.usefixtures("ray_address")

TINY = "package://workflows/assets/tiny_base"
PLAN = "1:1/2,2:1/4"
QUICK = ["--max-new-tokens", "3", "--batch-size", "16"]


@lru_cache
def prepared() -> str:
    """A folder that passes for prepared data where nothing of it is read."""
    folder = Path(tempfile.mkdtemp(prefix="adsc-prepared-"))
    (folder / "test").mkdir()
    (folder / "test" / "00000.parquet").touch()
    return str(folder)


@pytest.fixture(scope="module")
def evaluated(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that --out fills, with the store beside it."""
    root = tmp_path_factory.mktemp("eval")
    code = main(
        ["eval", str(small.base), "--tasks", str(small.pictures / "test.json"), "--methods",
         "dense", f"plan:{PLAN}", "--root", str(root / "runs"), "--out", str(root / "out"), *QUICK]
    )  # fmt: skip
    assert code == 0
    return root / "out"


def test_out_holds_results_samples_and_report(evaluated: Path) -> None:
    results = json.loads((evaluated / "results.json").read_text())
    assert [arm["plan"] for arm in results["arms"]] == ["", PLAN]
    assert results["control_arm"] == "dense" and results["arms"][1]["difference"] is not None
    assert results["majority"]["source"] == "questions"
    assert pq.read_table(evaluated / "samples.parquet").num_rows == 2 * 48
    assert (evaluated / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_json_of_prepared_data_is_what_the_task_file_gave(
    small: Small, evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same questions from another source; and `own` is the plan in the checkpoint's config."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(small.base, checkpoint)
    adsc.attach(adsc.from_pretrained(small.base), PLAN).save_pretrained(checkpoint)
    code = main(
        ["eval", str(checkpoint), "--data", str(small.prepared), "--json",
         "--root", str(evaluated.parent / "runs"), *QUICK]
    )  # fmt: skip
    assert code == 0
    results = json.loads(capsys.readouterr().out)
    before = json.loads((evaluated / "results.json").read_text())
    (own,) = results["arms"]
    assert own["plan"] == PLAN
    assert own["by_kind"] == before["arms"][1]["by_kind"]


def test_the_same_command_again_only_prints(
    small: Small, evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = evaluated.parent
    words = ["eval", str(small.base), "--tasks", str(small.pictures / "test.json")]
    words += ["--methods", "dense", f"plan:{PLAN}", "--root", str(root / "runs"), *QUICK]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert printed.count("cached") == 5 and "48 questions" in printed
    assert f"{PLAN} " in printed and "report: " in printed


def vllm_is_here() -> bool:
    try:
        return bool(engine_python())
    except ValueError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not vllm_is_here(), reason="needs the environment of `make vllm`")
def test_vllm_answers_what_transformers_answers(small: Small, tmp_path: Path) -> None:
    """The same file but for times. The base that ships has the tower and heads that vLLM knows."""
    found = []
    for engine in ("transformers", "vllm"):
        out = tmp_path / engine
        code = main(
            ["eval", TINY, "--tasks", str(small.pictures / "test.json"), "--limit", "3",
             "--methods", "plan:2:1/4,4:1/4;pool=tiles", "--engine", engine,
             "--root", str(tmp_path / "runs"), "--out", str(out), *QUICK]
        )  # fmt: skip
        assert code == 0
        rows = pq.read_table(out / "samples.parquet").drop_columns("seconds").to_pylist()
        assert json.loads((out / "results.json").read_text())["config"]["evaluate"]["engine"] == (
            engine
        )
        found.append(rows)
    assert found[0] == found[1]
    assert len({row["answer"] for row in found[1]}) > 3


def test_vllm_is_refused_what_it_cannot_run(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    words = ["eval", str(small.base), "--tasks", str(small.pictures / "test.json")]
    words += ["--engine", "vllm", "--root", str(tmp_path), "--methods"]
    monkeypatch.setenv(VARIABLE, str(tmp_path / "python"))
    assert main([*words, "dense"]) == 2
    assert f"{VARIABLE} names {tmp_path / 'python'}" in capsys.readouterr().err
    monkeypatch.setenv(VARIABLE, sys.executable)
    for method, complaint in (
        ("fastv:40", "vLLM runs pruning plans and dense models only"),
        ("plan:1:1/2;positions=reindex", "positions=keep"),
    ):
        assert main([*words, method]) == 2
        assert complaint in capsys.readouterr().err


def test_task_files_may_repeat_and_share_questions(small: Small, tmp_path: Path) -> None:
    """As POPE's three files, which share the positive half."""
    first, second = json.loads((small.pictures / "test.json").read_text())[:2]
    shutil.copytree(small.pictures / "images", tmp_path / "images")
    for name, records in (("random", [first, first]), ("popular", [first, second])):
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    tasks = [str(tmp_path / "random.json"), str(tmp_path / "popular.json")]
    assert main(
        ["eval", str(small.base), "--tasks", *tasks, "--methods", "dense",
         "--root", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), *QUICK]
    ) == 0  # fmt: skip
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["num_questions"] == 2 * 8 + 2 * 8
    answers = pq.read_table(tmp_path / "out" / "samples.parquet").to_pylist()
    counts = Counter((row["split"], row["record"]) for row in answers)
    assert counts == {("random", first["id"]): 16} | {
        ("popular", record["id"]): 8 for record in (first, second)
    }
    by_task = {
        task: float(np.mean([row["score"] for row in answers if row["split"] == task]))
        for task in ("random", "popular")
    }
    (arm,) = results["arms"]
    assert {task: share["mean"] for task, share in arm["by_split"].items()} == by_task
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>By task</h2>" in page and "<th>random</th><th>popular</th>" in page


def test_public_benchmarks_are_scored_by_their_rules(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them, from files in the official formats, by one command."""
    tasks = []
    for name, write in WRITERS.items():
        write(tmp_path / name)
        tasks.append(f"{name}={tmp_path / name}")
    words = ["eval", str(small.base), "--tasks", *tasks, "--methods", "dense", f"plan:{PLAN}",
             "--root", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), *QUICK]  # fmt: skip
    assert main(words) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    answers = pq.read_table(tmp_path / "out" / "samples.parquet").to_pylist()
    assert Counter(row["split"] for row in answers if row["arm"] == "dense") == QUESTIONS
    for row in answers:
        rule = RULES[BENCHMARKS[row["split"]].rule]
        assert row["score"] == rule(row["answer"], row["expected"])
    dense, plan = results["arms"]
    pope = [row["score"] for row in answers if row["split"] == "pope" and row["arm"] == "dense"]
    assert dense["by_split"]["pope"]["mean"] == pytest.approx(np.mean(pope))
    own = [row["score"] for row in answers if row["split"] == "pope" and row["arm"] != "dense"]
    difference = plan["by_split"]["pope"]["difference"]
    assert difference["mean"] == pytest.approx(np.mean(own) - np.mean(pope))
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert plan["by_split"]["pope"]["retention"] == pytest.approx(np.mean(own) / np.mean(pope))
    assert plan["by_split"]["gqa"]["retention"] is None, "the control has nothing right there"
    assert "difference" not in dense["by_split"]["pope"]
    assert {name: list(found) for name, found in results["benchmarks"].items()} == {
        "pope": ["F1", "answers yes"],
        "mme": ["perception", "cognition"],
        "mmbench": ["circular"],
        "mmbench_cn": ["circular"],
    }
    assert results["benchmarks"]["pope"]["F1"].keys() == {dense["name"], plan["name"]}
    # A tiny model says no "no": of POPE's four questions a set it gets the one "yes" right.
    assert set(pope) == {0.0, 1.0}
    f1 = results["benchmarks"]["pope"]["F1"]
    assert f1["dense"]["mean"] == pytest.approx(2 / 5) and "difference" not in f1["dense"]
    assert f1["dense"]["low"] <= 2 / 5 <= f1["dense"]["high"]
    assert f1[plan["name"]]["difference"]["mean"] == pytest.approx(f1[plan["name"]]["mean"] - 2 / 5)
    printed = " ".join(capsys.readouterr().out.split())
    assert "by task, %" in printed and "POPE on COCO" in printed
    assert results["majority"]["by_kind"]["vqav2: yes/no"] == 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>POPE on COCO</h2>" in page and "<th>perception</th>" in page
    assert "<small>kept 100.0 %</small>" in page


def test_a_limit_takes_some_pictures_of_each_task(ray_address: str, tmp_path: Path) -> None:
    """The stages up to the questions, one after the other."""
    WRITERS["gqa"](tmp_path / "gqa")
    stages = evaluation_stages(TINY, ["dense"], tasks=[f"gqa={tmp_path / 'gqa'}"], limit=1)
    _, files, prepare, *_ = stages
    made = stage_context("files", tmp_path / "files", {})
    load_body(files.kind.body)(made, files.config)
    inputs = {"data": (made.out, {}), "base": (resolve(TINY), {})}
    load_body(prepare.kind.body)(
        stage_context("prepare", tmp_path / "prepared", inputs), prepare.config
    )
    (row,) = pq.read_table(tmp_path / "prepared" / "gqa").to_pylist()
    assert len(row["pictures"]) == 1 and len(json.loads(row["turns"])) in (2, 4)


@pytest.mark.slow
def test_a_limit_is_an_option(tmp_path: Path) -> None:
    WRITERS["gqa"](tmp_path / "gqa")
    words = ["eval", TINY, "--tasks", f"gqa={tmp_path / 'gqa'}", "--methods", "dense"]
    words += ["--root", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), *QUICK]
    assert main([*words, "--limit", "1"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["num_pictures"] == 1 and results["num_questions"] in (1, 2)


@pytest.mark.slow
def test_changed_files_are_other_inputs(small: Small, tmp_path: Path) -> None:
    shutil.copytree(small.base, tmp_path / "base")
    before = content_digest(str(tmp_path / "base"))
    assert before == content_digest(str(tmp_path / "base")) is not None
    (tmp_path / "base" / "config.json").touch()
    assert content_digest(str(tmp_path / "base")) != before
    assert content_digest(str(tmp_path / "absent")) is None


@pytest.mark.parametrize("manifest", [True, False])
def test_a_replaced_checkpoint_on_s3_is_fetched_again(
    s3_endpoint: str, tmp_path: Path, manifest: bool
) -> None:
    """By its manifest; without one, by the ETags of files that kept their names and sizes."""
    address = f"s3://lab/{uuid.uuid4().hex}"
    config = (resolve(TINY) / "config.json").read_bytes()

    def fetched(weights: str) -> tuple[str, str]:
        checkpoint = tmp_path / weights
        checkpoint.mkdir()
        (checkpoint / "config.json").write_bytes(config)
        (checkpoint / "model.safetensors").write_text(weights)
        if manifest:
            (checkpoint / "manifest.json").write_text(json.dumps(weights))
        for file in checkpoint.iterdir():
            open_store(address).put(file, file.name)
        stages = evaluation_stages(address, ["dense"], data=prepared())
        prints = fingerprints(stages)
        record = stages[0].finished(open_store(str(tmp_path)), prints["base"])
        assert record is not None
        copy = Input(record, cache=str(tmp_path / "cache")).folder
        return (copy / "model.safetensors").read_text(), prints["evaluate"]

    before, first = fetched("old")
    after, second = fetched("new")
    assert (before, after) == ("old", "new") and first != second


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere", "--tasks", "T"], "there is no checkpoint at 'nowhere'"),
        (["BASE", "--tasks", "absent.json"], "there are no task files absent.json"),
        (["BASE"], "no questions: give --tasks"),
        (["BASE", "--tasks", "docvqa=."], "no benchmarks docvqa: there are gqa, vqav2,"),
        (["BASE", "--tasks", "gqa=absent"], "absent should hold one testdev_balanced_questions"),
        (["BASE", "--tasks", "mme=absent"], "absent should hold one existence"),
        (["BASE", "--tasks", "gqa=.", "gqa=."], "name each benchmark once"),
        (["BASE", "--tasks", "gqa=.", "T"], "evaluate them separately"),
        (["BASE", "--data", "absent", "--limit", "3"], "--limit is for task files"),
        (["BASE", "--data", "absent"], "there is no prepared data at 'absent'"),
        (["BASE", "--tasks", "T", "--methods", "fastv"], "'fastv' is not a method"),
        (["BASE", "--tasks", "T", "--methods", "plan:2:1/4,2:1/2"], "2"),
        (["BASE", "--tasks", "T", "--methods", "dense", "plan:9:1/4"], "layers 0..3"),
        (["BASE", "--tasks", "T", "--methods", "dense", "fatsv:22"], "did you mean fastv?"),
        (["BASE", "--tasks", "T", "--methods", "dense", "fastv:2"], "fastv can't average 2 of"),
        (["BASE", "--tasks", "T", "--methods", "dense", "pool:1000"], "average 1000.0 must be"),
        (["BASE", "--tasks", "T", "--methods", "fastv:22,layer=["], "'fastv:22,layer=['"),
        (["BASE", "--tasks", "T", "--methods", "fastv:22,layers={a: 1}"], "can't be read: write"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_runs(
    small: Small,
    words: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"BASE": str(small.base), "T": str(small.pictures / "test.json")}
    given = [places.get(word, word) for word in words]
    assert main(["eval", *given, "--root", str(tmp_path / "runs")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_that_ships_in_a_package_is_a_base() -> None:
    stages = evaluation_stages(
        TINY,
        ["own", "fastv:22,layer=2"],
        data=prepared(),
    )
    evaluate = next(stage for stage in stages if stage.name == "evaluate")
    arms = evaluate.config.model_dump()["arms"]
    assert [arm["name"] for arm in arms] == ["dense", "fastv-22-layer-2"]
    assert arms[1]["method"] == {"name": "fastv", "average": 22, "options": {"layer": 2}}


NAMED = {"22": PLAN, "9": "0:1/4,2:1/2"}


@pytest.fixture
def elastic(small: Small, tmp_path: Path) -> str:
    """The address of a checkpoint with two named plans."""
    model = adsc.name_plans(adsc.from_pretrained(small.base), NAMED)
    adsc.attach(model, "22").save_pretrained(tmp_path / "small-elastic")
    return str(tmp_path / "small-elastic")


def arms_of(checkpoint: str, methods: list[str] | None) -> list[tuple[str, str, str, str]]:
    stages = evaluation_stages(checkpoint, methods, data=prepared())
    config = next(stage for stage in stages if stage.name == "evaluate").config
    assert isinstance(config, EvaluateConfig)
    assert config.control == next((a.name for a in config.arms if not a.plan), config.arms[0].name)
    return [(arm.name, arm.plan, arm.budget, arm.curve) for arm in config.arms]


def test_an_elastic_checkpoint_is_evaluated_with_every_plan_and_dense(elastic: str) -> None:
    curve = "small-elastic"
    dense = ("dense", "", "dense", curve)
    named = [(f"own-{name}", plan, name, curve) for name, plan in NAMED.items()]
    assert arms_of(elastic, None) == [dense, *named]
    assert arms_of(elastic, ["own:9", "dense"]) == [named[1], dense]
    assert arms_of(elastic, ["own:9", "plan:1:1/2"]) == [named[1], ("plan-1-1-2", "1:1/2", "", "")]
    # Its own plan is the default, as of any checkpoint; and no curve where no name is given.
    assert arms_of(elastic, ["own", "dense"]) == [
        ("plan-1-1-2-2-1-4", PLAN, "", ""),
        ("dense",) + 3 * ("",),
    ]


def test_names_that_a_checkpoint_lacks_are_refused(elastic: str, small: Small) -> None:
    with pytest.raises(ValueError, match="plan '8' is unknown: this model has 22, 9 and dense"):
        arms_of(elastic, ["own:8"])
    with pytest.raises(ValueError, match="plan '8': this model has no named plans"):
        arms_of(str(small.base), ["own:8"])
    assert arms_of(str(small.base), None) == [("dense", "", "", "")]


HUB_ID = "owner/compressed"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of HUB_ID in a local cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--owner--compressed"
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    return snapshot


def hub_arms(*methods: str) -> list[str]:
    stages = evaluation_stages(HUB_ID, methods, data=prepared())
    evaluate = next(stage for stage in stages if stage.name == "evaluate")
    return [arm["label"] for arm in evaluate.config.model_dump()["arms"]]


def test_own_is_the_plan_in_the_config_of_a_hub_id(hub: Path) -> None:
    config = json.loads((resolve(TINY) / "config.json").read_text())
    config["adsc"] = adsc.PruningPlan.parse(PLAN).to_dict()
    (hub / "config.json").write_text(json.dumps(config))
    assert hub_arms("own") == [PLAN]


def test_a_new_commit_of_a_hub_id_is_another_checkpoint(hub: Path) -> None:
    def prints() -> dict[str, str]:
        return fingerprints(evaluation_stages(HUB_ID, ["dense"], data=prepared()))

    shutil.copy(resolve(TINY) / "config.json", hub)
    before = prints()
    later = hub.with_name("1" * 40)
    shutil.copytree(hub, later)
    (hub.parent.parent / "refs" / "main").write_text(later.name)
    assert prints()["base"] != before["base"] and prints()["evaluate"] != before["evaluate"]


def test_own_of_a_hub_id_without_a_readable_config_is_refused(hub: Path) -> None:
    with pytest.raises(ValueError, match=r"'owner/compressed' can't be read from here.*--methods"):
        hub_arms("own")
    assert hub_arms("dense", "fastv:22") == ["dense", "fastv:22"]
    with pytest.raises(ValueError, match=r"did you mean fastv\?"):
        hub_arms("dense", "fatsv:22")


def test_no_prompt_offers_to_run_a_checkpoints_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask where a known config names a module for a model that it lacks."""
    prompts: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text: prompts.append(text) or "n")
    config = {"model_type": "llama", "auto_map": {"AutoModelForImageTextToText": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    evaluation_stages(str(tmp_path), ["dense"], data=prepared())
    assert not prompts
