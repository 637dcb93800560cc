"""An elastic checkpoint through merge, evaluate and export: every plan by its name, and dense."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

import adsc
from pipeline.evaluation.config import ArmConfig, EvaluateConfig
from pipeline.kinds.export import ExportConfig
from pipeline.kinds.merge import MergeConfig
from pipeline.publishing.manifest import ExportError, verify_folder
from pipeline.reporting.results import Results
from pipeline.stages.evaluate import evaluate
from pipeline.stages.export import compare_logits, export
from pipeline.stages.merge import merge
from pipeline.tracking import tracker as tracking
from pipeline.training.loop import train
from tests.pipeline.contexts import DATA, stage_context
from tests.pipeline.training.training_runs import CONFIG, Plain, sources
from tests.small import Small
from workflows.commands.main import main

pytestmark = pytest.mark.usefixtures("ray_address")

PLANS = {"28": "1:1/4", "13": "0:1/4,2:1/2", "5": "0:1/8,2:1/4"}
DEFAULT = "13"
BUDGETS = [*PLANS, "dense"]


class Elastic(NamedTuple):
    """Folders that the stages made, and where the export was tracked."""

    merged: Path
    evaluated: Path
    scored: Path
    """The same with scores that differ: the small model learns next to nothing."""
    exported: Path
    outputs: dict[str, Any]
    tracking_uri: str


@pytest.fixture(scope="module")
def elastic(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Elastic:
    root = tmp_path_factory.mktemp("elastic")
    train(CONFIG, sources(small), Plain(root))
    trained = root / f"step-{CONFIG.steps:07d}"
    given: dict[str, tuple[Path, dict[str, Any]]] = {
        "base": (small.base, {}),
        "data": (small.prepared, DATA),
        "trained": (trained, {}),
    }
    merging = stage_context("merge", root / "merge" / "out", given)
    carried = merge(merging, MergeConfig(plan=PLANS[DEFAULT], plans=PLANS))
    arms = [
        ArmConfig(name="dense_lora", label="control", checkpoint="base", trained=True),
        *(
            ArmConfig(
                name=f"elastic_{name}", label=name, checkpoint="merge", plan=PLANS.get(name, ""),
                trained=True, budget=name, curve="elastic checkpoint",
            )
            for name in BUDGETS
        ),
    ]  # fmt: skip
    given["merge"] = (merging.out, carried)
    asking = stage_context("evaluate", root / "evaluate" / "out", given)
    quick = {"prefill_rounds": 1, "decode_rounds": 1, "decode_tokens": 2, "max_new_tokens": 3}
    scores = evaluate(asking, EvaluateConfig(arms=tuple(arms), **quick))
    given["evaluate"] = (_as_if_learnt(asking.out, root / "scored", scores), scores)
    uri = tracking.prepare(tracking.default_uri(root / "tracking"), "adsc")
    with tracking.stage_run(uri, "adsc", None, "export", {}) as tracker:
        publishing = stage_context("export", root / "export" / "out", given, tracker)
        outputs = export(publishing, ExportConfig(name="elastic", tolerance=0))
    assert tracker.problems == []
    return Elastic(merging.out, asking.out, root / "scored", publishing.out, outputs, uri)


def _as_if_learnt(evaluated: Path, out: Path, outputs: dict[str, Any]) -> Path:
    shutil.copytree(evaluated, out)
    results = json.loads((out / "results.json").read_text())
    for place, arm in enumerate(results["arms"]):
        share = 0.9 - 0.07 * place
        arm["accuracy"] |= {"mean": share, "low": share - 0.02, "high": share + 0.02}
        arm["retention"] = outputs["arms"][arm["name"]]["retention"] = share / 0.9
        outputs["arms"][arm["name"]]["accuracy"] = share
    (out / "results.json").write_text(json.dumps(results))
    return out


def test_the_merged_checkpoint_carries_every_plan_and_its_logits(elastic: Elastic) -> None:
    model = adsc.from_pretrained(elastic.merged).eval()
    assert str(adsc.plan_of(model)) == PLANS[DEFAULT]
    assert {name: str(plan) for name, plan in adsc.plans_of(model).items()} == PLANS
    probe = load_file(elastic.merged / "probe.safetensors")
    default = probe.pop("logits")
    named = load_file(elastic.merged / "probe_plans.safetensors")
    assert named.keys() == PLANS.keys() and torch.equal(named[DEFAULT], default)
    for name in PLANS:
        with torch.inference_mode():
            got = adsc.from_pretrained(elastic.merged, plan=name).eval()(**probe).logits
        assert torch.equal(got, named[name])


def test_every_budget_is_scored_against_the_dense_control(elastic: Elastic) -> None:
    results = Results.read(elastic.evaluated / "results.json")
    (curve, places), *others = results.series.items()
    assert curve == "elastic checkpoint" and not others
    assert [results.arms[place].budget for place in places] == ["5", "13", "28", "dense"]
    for place in places:
        arm = results.arms[place]
        assert arm.difference is not None
    assert {arm.name: arm.average_vision_tokens for arm in results.arms} == {
        "dense_lora": 64,
        "elastic_28": 28,
        "elastic_13": 12,
        "elastic_5": 5,
        "elastic_dense": 64,
    }


def test_the_export_lists_every_budget_with_its_scores(elastic: Elastic) -> None:
    arms = {arm.name: arm for arm in Results.read(elastic.scored / "results.json").arms}
    measured = json.loads((elastic.exported / "evaluation.json").read_text())
    assert list(measured["budgets"]) == BUDGETS and measured["arm"] == f"elastic_{DEFAULT}"
    card = (elastic.exported / "README.md").read_text()
    assert "It has `28`, `13` (the default), `5` and `dense`." in card
    assert 'adsc.from_pretrained("FOLDER", plan="28")' in card
    tags = version(elastic).tags
    description = version(elastic).description
    for name in BUDGETS:
        own, arm = measured["budgets"][name], arms[f"elastic_{name}"]
        assert arm.retention is not None
        assert own["plan"] == PLANS.get(name, "") == arm.plan
        assert own["accuracy"] == arm.accuracy.mean and own["retention"] == arm.retention
        assert own["flops_of_control"] == arm.flops / arms["dense_lora"].flops
        assert f"| {name} | {f'`{arm.plan}`' if arm.plan else 'none'} |" in card
        assert f"| {100 * arm.accuracy.mean:.1f} % | {100 * arm.retention:.1f} % |" in card
        assert tags[f"adsc.plan.{name}"] == (arm.plan or "none")
        assert float(tags[f"adsc.accuracy.{name}"]) == pytest.approx(arm.accuracy.mean, rel=1e-5)
        shares = (arm.accuracy.mean, arm.retention, own["flops_of_control"])
        cells = [name, f"`{arm.plan or 'none'}`", f"{arm.average_vision_tokens:.1f}"]
        cells += [f"{100 * share:.1f} %" for share in shares]
        assert f"| {' | '.join(cells)} |" in description
    assert tags["adsc.plan"] == PLANS[DEFAULT]


def version(elastic: Elastic) -> Any:
    _, name, number = elastic.outputs["mlflow_version"].rsplit("/", 2)
    return MlflowClient(elastic.tracking_uri).get_model_version(name, number)


def test_a_promotion_can_be_judged_by_a_named_plan(
    elastic: Elastic, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["promote", "elastic", "--mlflow", elastic.tracking_uri, "--min-retention", "0"]
    found = json.loads((elastic.exported / "evaluation.json").read_text())["budgets"]
    for name in ("5", "dense"):
        client, number = MlflowClient(elastic.tracking_uri), version(elastic).version
        client.set_model_version_tag("elastic", number, f"adsc.retention_low.{name}", "0.5")
        cost = found[name]["flops_of_control"]
        assert main([*words, "--plan", name, "--max-cost", f"{cost - 0.01}"]) == 1
        assert main([*words, "--plan", name, "--max-cost", f"{cost + 0.01}"]) == 0
    assert main([*words, "--plan", "7"]) == 1
    assert "not measured" in capsys.readouterr().out


def test_a_copy_with_another_named_plan_is_not_the_checkpoint(
    elastic: Elastic, tmp_path: Path
) -> None:
    assert compare_logits(elastic.exported)["worst_difference"] == 0
    assert any(
        file.path == "probe/probe_plans.safetensors" for file in verify_folder(elastic.exported)
    )
    copy = shutil.copytree(elastic.exported, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    plans = config["adsc_plans"]
    plans["5"] = adsc.PruningPlan.parse("0:1/4,2:1/4").to_dict()
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"the plan named '5' in config\.json is not the one"):
        compare_logits(copy)
    del plans["5"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"config\.json names no plan 5"):
        compare_logits(copy)


def test_chat_takes_a_plan_by_its_name(
    elastic: Elastic, small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = str(next((small.pictures / "images" / "test").glob("*.png")))
    words = ["chat", str(elastic.exported), picture, "is there a bag?", "--max-new-tokens", "3"]
    for plan in ("5", "dense", "1:1/2"):
        assert main([*words, "--plan", plan]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3, "an answer each"
    assert main([*words, "--plan", "7"]) == 2
    assert "plan '7' is unknown: this model has 28, 13, 5 and dense" in capsys.readouterr().err


def test_the_mlflow_model_answers_with_the_plan_of_a_call(elastic: Elastic, small: Small) -> None:
    import base64

    import pandas as pd
    from mlflow.pyfunc import PythonModelContext

    from pipeline.tracking.mlflow_model import VisionLanguageModel

    model = VisionLanguageModel()
    model.load_context(PythonModelContext({"checkpoint": str(elastic.exported)}, None))
    picture = next((small.pictures / "images" / "test").glob("*.png"))
    image = base64.b64encode(picture.read_bytes()).decode()
    rows = pd.DataFrame([{"image": image, "question": "is there a bag?"}])
    ran = []
    for params in ({"plan": "5"}, {"plan": "dense"}, None, {"max_new_tokens": 2, "plan": ""}):
        model.predict(None, rows, params)
        ran.append(str(adsc.plan_of(model.model)))
    assert ran == [PLANS["5"], "", PLANS[DEFAULT], PLANS[DEFAULT]]
    with pytest.raises(adsc.PlanError, match="this model has 28, 13, 5 and dense"):
        model.predict(None, rows, {"plan": "6"})
