"""The view of MLflow's list of runs that is saved with an experiment, on a real database."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.tracking.address import default_uri
from pipeline.tracking.mlflow_calls import prepare
from pipeline.tracking.view import COLUMNS, KEY, TAG, saved_view

pytestmark = pytest.mark.heavy


def test_an_experiment_has_the_view_once(tmp_path: Path) -> None:
    """A new one, and one made by something else; a view that somebody changed stays."""
    uri = default_uri(tmp_path)
    prepare(uri, "new")
    client = MlflowClient(uri)
    client.create_experiment("older", artifact_location=tmp_path.as_uri())
    for name in ("new", "older"):
        prepare(uri, name)
        found = client.get_experiment_by_name(name)
        assert json.loads(found.tags[TAG])["name"] == "Workflows"
        client.set_experiment_tag(found.experiment_id, TAG, "changed")
        prepare(uri, name)
        assert client.get_experiment_by_name(name).tags[TAG] == "changed"


def test_the_view_finds_workflows_and_shows_columns_that_they_have(tmp_path: Path) -> None:
    """The filter is one that MLflow's search takes, and finds a workflow's run alone."""
    uri = default_uri(tmp_path)
    prepare(uri, "adsc")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("adsc").experiment_id
    workflow, stage = client.create_run(experiment), client.create_run(experiment)
    client.log_metric(workflow.info.run_id, "gpu_hours", 0.0)
    client.log_metric(stage.info.run_id, "loss", 1.0)
    state = json.loads(json.loads(saved_view())["state"])
    (found,) = client.search_runs([experiment], state["searchFilter"])
    assert found.info.run_id == workflow.info.run_id
    assert TAG.endswith(KEY) and state["selectedColumns"] == list(COLUMNS)
