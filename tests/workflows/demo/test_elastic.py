"""An elastic workflow through Ray, small: one training, one checkpoint, every budget in one run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import adsc
from pipeline.durable import record as records
from pipeline.durable.graph import fingerprints
from pipeline.durable.record import Record
from pipeline.reporting.results import Results
from pipeline.store import open_store
from tests.small import SMALL_DEMO, Small
from workflows.commands.main import main
from workflows.registry import load_workflow

# A whole workflow; tests/pipeline/stages/test_elastic.py has its bodies.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_address")]

PLANS = {"28": "1:1/4", "13": "0:1/4,2:1/2"}
CHANGES = (
    *SMALL_DEMO,
    "plan=0:1/4,2:1/2",
    "curriculum.order=elastic",
    f"curriculum.elastic={json.dumps(PLANS)}",
    "curriculum.weights={dense: 1}",
    "evaluate.decode_rounds=1",
)


@pytest.fixture(scope="module")
def found(small: Small, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """Records of all stages."""
    root = str(tmp_path_factory.mktemp("elastic") / "runs")
    changes = [*CHANGES, f"base.source={small.base}"]
    assert main(["run", "demo", "--root", root, *(f"--set={change}" for change in changes)]) == 0
    prints = fingerprints(load_workflow("demo", changes).stages())
    made = {name: records.load(open_store(root), name, print_) for name, print_ in prints.items()}
    return {name: record for name, record in made.items() if record is not None}


def test_one_training_gives_a_checkpoint_for_every_budget(found: dict[str, Record]) -> None:
    assert {"train-1", "control-1", "merge", "export", "report"} <= found.keys()
    assert "train-2" not in found
    exported = Path(found["export"].uri)
    for name, plan in [*PLANS.items(), ("dense", "")]:
        assert str(adsc.plan_of(adsc.from_pretrained(exported, plan=name))) == plan
    assert str(adsc.plan_of(adsc.from_pretrained(exported))) == PLANS["13"]


def test_every_budget_is_evaluated_and_reported(found: dict[str, Record]) -> None:
    arms = found["evaluate"].outputs["arms"]
    named = {"elastic_28": "28", "elastic_13": "13", "elastic_dense": "dense"}
    assert arms.keys() == {"dense", "dense_lora", "plan_untrained", *named}
    assert {name: arms[name]["budget"] for name in named} == named
    results = Results.read(Path(found["evaluate"].uri) / "results.json")
    assert [results.arms[place].name for place in results.series["elastic checkpoint"]] == [
        "elastic_13",
        "elastic_28",
        "elastic_dense",
    ]
    page = (Path(found["report"].uri) / "report.html").read_text()
    assert "One checkpoint, 3 budgets (elastic checkpoint): dense (64.0 vision tokens)" in page
    measured = json.loads((Path(found["export"].uri) / "evaluation.json").read_text())
    assert list(measured["budgets"]) == ["28", "13", "dense"]
    assert measured["arm"] == "elastic_13" and measured["control"] == "dense_lora"


def test_eval_asks_the_exported_checkpoint_with_all_of_them(
    found: dict[str, Record], small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", found["export"].uri, "--data", str(small.prepared), "--json"]
    words += ["--max-new-tokens", "2", "--root", str(tmp_path / "runs")]
    assert main(words) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["control_arm"] == "dense"
    assert [(arm["label"], arm["budget"]) for arm in results["arms"]] == [
        ("dense", "dense"),
        ("own:28", "28"),
        ("own:13", "13"),
    ]
    assert [arm["average_vision_tokens"] for arm in results["arms"]] == [64, 28, 12]
    assert len({arm["curve"] for arm in results["arms"]}) == 1
