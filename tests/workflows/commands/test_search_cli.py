"""`adsc search` as people call it: the dry run, what is refused, a search, and the run after it."""

import json
import re
from pathlib import Path

import pytest

from tests.small import SMALL_DEMO, Small
from workflows.commands.main import main
from workflows.commands.search import search_stages

pytestmark = pytest.mark.usefixtures("ray_address")


def test_dry_run_lists_the_space_and_the_first_trials(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "demo", "--average", "22", "--dry-run", "--trials", "7"]) == 0
    printed = capsys.readouterr().out
    assert "345 plans (115 placements, anchors last, first, center)" in printed
    lines = [line.split() for line in printed.splitlines() if line.strip()]
    table = lines[lines.index(["trial", "from", "plan", "average", "GFLOPs", "KV", "MiB"]) + 1 :]
    assert [row[1] for row in table] == [
        "thirds", "pyramiddrop", "early", "middle", "late", "random", "random",
    ]  # fmt: skip
    assert all(21 < float(row[3]) < 23 for row in table)
    assert main(["search", "llava15_7b", "--average", "64", "--dry-run"]) == 0
    assert "left out: pyramiddrop" in capsys.readouterr().out


def test_dry_run_lists_the_settings_of_trials(capsys: pytest.CaptureFixture[str]) -> None:
    over = ["lora.rank=8,16", "train.distill.weight=0..1"]
    assert main(["search", "demo", "--over", *over, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "plan 1:1/4;pool=tiles: 8 layers, 64 vision tokens; 64 trials, lora" in printed
    assert "training keys: train.lora.rank=8,16 train.distill.weight=0..1" in printed
    drawn = re.findall(r"train\.lora\.rank=(8|16) train\.distill\.weight=([\d.e-]+)", printed)
    assert len(drawn) == 5 and len({weight for _, weight in drawn}) == 5


def test_a_run_with_a_found_plan_has_a_forecast(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--set=plan=search", "--set=search.average=192"]
    assert main(["run", "llava15_7b", "--dry-run", "--workers", "8", *changes]) == 0
    printed = capsys.readouterr().out
    assert "plan = search: costs and training are shown for" in printed and "GPU-hours" in printed


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "a search needs a budget: set one of average"),
        (["--average", "22", "--kv-mib", "1"], "average = 22.0 and kv_mib = 1.0 contradict"),
        (["--over", "lora.rank=8,16", "lora.rank=4"], "give each key once"),
        (["--average", "63.9"], "the nearest is average = 62 with plan '7:3/4'"),
        (["--average", "1", "2", "3"], "takes one number, or a minimum and a maximum"),
        (["--prefill-ms", "5"], "needs times measured on a worker"),
        (["--average", "22", "--set", "search.keeps=[3/2]"], "keep ratio 3/2"),
        (["--average", "22", "--set", "search.trails=3"], "did you mean search.trials"),
    ],
)
def test_what_is_refused(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "demo", "--dry-run", *words]) == 2
    assert says in capsys.readouterr().err
    assert main(["search", "tiny_base", "--average", "22", "--dry-run"]) == 2
    assert "compresses nothing" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    assert "adsc search demo --average 22 --trials 64" in capsys.readouterr().out


SEARCH = ("search.average=32", "search.tolerance=0.1", "search.rows=8", "search.confirm_rows=8")


@pytest.mark.slow
def test_a_run_goes_on_from_the_search(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was found is trained, merged and evaluated; MLflow has a run a trial below one."""
    from mlflow import MlflowClient

    from pipeline.durable import graph
    from pipeline.durable import record as records
    from pipeline.store import open_store
    from workflows.registry import load_workflow

    own = [change for change in SMALL_DEMO if not change.startswith("plan=")]
    changes = [*own, f"base.source={small.base}", *SEARCH]
    words = ["--root", str(tmp_path), *(f"--set={change}" for change in changes)]
    assert main(["search", "demo", "--trials", "7", "--json", *words]) == 0
    results = json.loads(capsys.readouterr().out)
    assert len(results["trials"]) == 7
    again = ["--set=plan=search", "--set=search.trials=7", *words]
    assert main(["run", "demo", *again]) == 0
    workflow = load_workflow("demo", [*changes, "plan=search", "search.trials=7"])
    prints = graph.fingerprints(workflow.stages())
    store = open_store(str(tmp_path))
    found = {name: records.load(store, name, prints[name]) for name in prints}
    assert all(found.values())
    merged, searched = found["merge"], found["search"]
    assert merged is not None and searched is not None
    assert merged.outputs["plan"] == results["plan"] == searched.outputs["plan"]
    evaluated = found["evaluate"]
    assert evaluated is not None
    plans = {name: arm["plan"] for name, arm in evaluated.outputs["arms"].items()}
    assert plans["plan_trained"] == plans["plan_untrained"] == results["plan"]
    report = found["report"]
    assert report is not None
    page = (Path(report.uri) / "report.html").read_text()
    assert "How the plan was found" in page and f"{searched.uri}/search.html" in page
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("adsc")
    assert experiment is not None
    below = client.search_runs(
        [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{searched.run_id}'"
    )
    assert {run.data.params["plan"] for run in below} == {it["plan"] for it in results["trials"]}
    assert all(run.info.status == "FINISHED" for run in below)
    best = next(run for run in below if run.data.params["plan"] == results["plan"])
    assert best.data.metrics["objective"] == pytest.approx(results["value"])


def test_only_what_the_search_needs_is_run() -> None:
    from workflows.demo.workflow import demo

    workflow = demo().edit({"plan": "search", "search.average": 22})
    names = [stage.name for stage in search_stages(workflow)]
    assert sorted(names) == ["base", "pictures", "prepare", "search", "search-data"]
