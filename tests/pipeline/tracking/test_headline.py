"""What a workflow's MLflow run shows of its stages, from records; test_graph.py has the run."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.durable.record import Record, workflow_run
from pipeline.kinds.evaluate import EVALUATE, main_arm
from pipeline.kinds.prepare import PREPARE
from pipeline.kinds.search import SEARCH
from pipeline.tracking.address import page_address
from workflows.registry import load_workflow


def record(**fields: Any) -> Record:
    return Record(stage="s", fingerprint="f" * 64, attempt="1", **fields)


def evaluated(*arms: tuple[str, str, bool, str, float], group: str = "") -> Record:
    """Arms as (name, checkpoint, trained, plan, average vision tokens); accuracy 0.9, 0.8, ..."""
    return record(
        config={
            "arms": [
                {"name": name, "checkpoint": checkpoint, "trained": trained, "group": group}
                for name, checkpoint, trained, *_ in arms
            ]
        },
        outputs={
            "arms": {
                group or name: {
                    "accuracy": 0.9 - place / 10,
                    "retention": None,
                    "average_vision_tokens": average,
                    "plan": plan,
                }
                for place, (name, _, _, plan, average) in enumerate(arms)
            }
        },
    )


DENSE = ("dense", "merge-control", True, "", 64.0)
UNTRAINED = ("untrained", "base", False, "1:1/4", 22.0)


@pytest.mark.parametrize(
    ("arms", "chosen"),
    [
        ([DENSE, UNTRAINED], None),
        ([DENSE, ("paper", "merge-paper", True, "2:1/4", 22.0)], "paper"),
        ([("own", "merge", True, "1:1/4", 22), ("paper", "merge-paper", True, "2:1/9", 9)], "own"),
        ([("a", "merge", True, "1:1/4", 22), ("b", "merge", True, "1:1/9", 9)], "b"),
        ([("a", "merge-a", True, "1:1/4", 22), ("b", "merge-b", True, "2:1/4", 22)], "b"),
    ],
)
def test_the_arm_that_a_workflow_is_about(
    arms: list[tuple[str, str, bool, str, float]], chosen: str | None
) -> None:
    assert main_arm(evaluated(*arms)) == chosen


def test_headlines_are_what_records_say() -> None:
    own = ("own", "merge", True, "1:1/4", 22.0)
    assert EVALUATE.headline and SEARCH.headline and PREPARE.headline
    shown = EVALUATE.headline(evaluated(DENSE, own))
    assert shown.params == {"arm": "own"}
    assert shown.metrics["accuracy"] == 0.8 and shown.metrics["average_vision_tokens"] == 22.0
    assert EVALUATE.headline(evaluated(own, group="seeds")).params == {"arm": "seeds"}
    found = SEARCH.headline(record(outputs={"value": 0.25, "cost": 22.0, "plan": "1:1/4"}))
    assert found.metrics == {"search.best": 0.25, "search.cost": 22.0}
    assert found.params == {"search.plan": "1:1/4"}
    data = PREPARE.headline(record(outputs={"digest": "0123456789abcdef"}, uri="s3://b/prepare"))
    assert data.data == ("s3://b/prepare", "prepared conversations", "0123456789ab")
    # A pinned folder of plain files has no outputs.
    for kind in (EVALUATE, SEARCH, PREPARE):
        assert kind.headline
        kind.headline(record())


def test_parameters_are_few_and_hold_every_change() -> None:
    changes = ["train.steps=7", "evaluate.batch_size=3"]
    parameters = load_workflow("demo", changes).parameters(changes)
    assert parameters["train.steps"] == "7" and parameters["evaluate.batch_size"] == "3"
    assert parameters["plan"] == "1:1/4;pool=tiles"
    assert len(parameters) < 15
    assert load_workflow("demo").parameters().keys() == parameters.keys() - {"evaluate.batch_size"}


def test_the_address_of_a_page() -> None:
    page = "experiments/1/runs/0a"
    assert page_address("http://mlflow:5000/", page) == f"http://mlflow:5000/#/{page}"
    assert page_address("https://ada:pw@mlflow", page).startswith("https://[redacted]@mlflow/#/")
    assert page_address("sqlite:////x/mlflow.db", page) == ""
    assert page_address("http://mlflow:5000", "") == ""


def test_the_latest_run_that_computed_something() -> None:
    old = record(workflow_run="experiments/1/runs/a", finished="2026-01-01T00:00:00+00:00")
    new = record(workflow_run="experiments/1/runs/b", finished="2026-02-01T00:00:00+00:00")
    untracked = record(finished="2026-03-01T00:00:00+00:00")
    assert workflow_run([new, untracked, old]) == "experiments/1/runs/b"
    assert workflow_run([untracked]) == workflow_run([]) == ""
