"""What a finished stage could not do stands in its summary, and the next run does just that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.config import Config, ConfigError, edit
from pipeline.durable import completion, graph
from pipeline.durable import record as records
from pipeline.durable.record import Record
from pipeline.durable.stage import Kind, RunContext, Stage, StageContext
from pipeline.kinds.export import ExportConfig
from pipeline.store import open_store
from pipeline.tracking.names import model_name
from tests.pipeline.durable import toy
from workflows.registry import WORKFLOWS, load_workflow


class Register(Config):
    """A stage that can't do the second half of its work while a file is missing."""

    log: str
    """A line here for each call."""
    needed: str
    """The file."""


def _try(context: StageContext, config: Register, what: str) -> dict[str, Any]:
    with Path(config.log).open("a") as file:
        file.write(f"{what}\n")
    if Path(config.needed).exists():
        return {"registered": "models:/toy/1", "undone": {}}
    return {"registered": None, "undone": {"register the toy": f"{config.needed} is missing"}}


def register(context: StageContext, config: Register) -> dict[str, Any]:
    (context.out / "weights").write_text("1")
    return {"size": 1, **_try(context, config, "body")}


def register_again(context: StageContext, config: Register, record: Record) -> dict[str, Any]:
    assert record.outputs["size"] == 1
    assert (context.out / "weights").read_text() == "1"
    assert context.inputs["made"].outputs == {"count": 3}
    return _try(context, config, "complete")


REGISTER = Kind(
    id="tests.register", version=1, body=register, config=Register, complete=register_again
)


def stages(tmp_path: Path) -> list[Stage]:
    return [
        *(it for it in toy.stages(tmp_path / "log") if it.name == "make"),
        REGISTER.stage(
            name="register",
            title="register",
            config=Register(log=str(tmp_path / "calls"), needed=str(tmp_path / "needed")),
            needs={"made": "make"},
        ),
    ]


def test_what_is_left_is_reported_and_done_by_the_next_run(
    ray_address: str, tmp_path: Path
) -> None:
    root, uri = str(tmp_path / "store"), f"sqlite:///{tmp_path}/mlflow.db"
    context = toy.context(root, tracking_uri=uri)

    def run(context: RunContext = context) -> tuple[str, Record]:
        with (tmp_path / "output").open("w") as file:
            made = graph.run(stages(tmp_path), context, Console(file=file, width=200))
        return (tmp_path / "output").read_text(), made["register"]

    def states() -> dict[str, str]:
        found = graph.state(open_store(root), stages(tmp_path))
        return {state.name: state.state for state in found}

    output, record = run()
    left = f"register: not done: register the toy ({tmp_path / 'needed'} is missing)"
    assert left in output and record.outputs["registered"] is None
    assert states() == {"make": "cached", "register": "incomplete"}
    output, _ = run()  # still missing
    assert "to complete: register" in output and left in output
    output, _ = run(toy.context(root, tracking_uri=None))  # not wanted without MLflow
    assert left in output
    assert (tmp_path / "calls").read_text().split() == ["body", "complete"]
    (tmp_path / "needed").touch()
    output, record = run()
    assert "not done" not in output
    assert record.outputs == {"size": 1, "registered": "models:/toy/1", "undone": {}}
    assert states() == {"make": "cached", "register": "cached"}
    output, record = run()
    assert record.outputs["registered"] == "models:/toy/1"
    assert (tmp_path / "calls").read_text().split() == ["body", "complete", "complete"]
    assert (tmp_path / "log").read_text().split() == ["make"]


def test_exports_of_versions_that_did_not_say_so_are_completed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    old = Record(
        stage="export",
        fingerprint="e" * 64,
        attempt="1",
        outputs={"files": 9, "mlflow_model": None, "mlflow_version": None},
        config={"log_model": True, "name": "llava-1.5-7b-adsc-192"},
        run_id="0123",
    )
    found = records.publish(store, old)
    assert list(completion.undone(found)) == ["register the model in MLflow"]
    home = records.folder("export", old.fingerprint)
    completion.publish(store, home, found, {"mlflow_version": "models:/x/1", "undone": {}})
    later = records.load(store, "export", old.fingerprint)
    assert later is not None and completion.undone(later) == {}
    assert later.outputs["mlflow_version"] == "models:/x/1" and later.outputs["files"] == 9
    for change in (
        {"outputs": {**old.outputs, "mlflow_version": "models:/x/1"}},
        {"config": {"log_model": False}},
        {"run_id": None},
    ):
        assert completion.undone(old.model_copy(update=change)) == {}


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_every_shipped_name_can_be_registered(workflow: str) -> None:
    """By MLflow's own rules, both of them."""
    from mlflow.utils.validation import _validate_logged_model_name, _validate_model_name

    config = load_workflow(workflow).config
    if hasattr(config, "export"):
        name = model_name(config.export.name)
        _validate_logged_model_name(name)
        _validate_model_name(name)


def test_every_name_that_a_config_takes_can_be_registered() -> None:
    from mlflow.utils.validation import _validate_logged_model_name, _validate_model_name

    for character in [chr(code) for code in range(32, 127)] + ["é", "日"]:
        for name in (f"a{character}b", f"{character}b", f"a{character}", character * 2):
            try:
                config = ExportConfig(name=name)
            except ValueError:
                assert not any(it.isalnum() or it == "_" for it in name)
                continue
            _validate_logged_model_name(model_name(config.name))
            _validate_model_name(model_name(config.name))
    for kept in ("tiny-llava-compressed", "my model", "a_b", "a+b", "é"):
        assert model_name(kept) == kept


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "''"}, "can't name a model"),
        ({"name": "..."}, "can't name a model"),
        ({"name": "x" * 300}, "can't name a model"),
        ({"to": "file://data/x"}, "write file:///data/x"),
        ({"to": "https://host/x"}, "publish to a folder or s3://"),
        ({"to": "models/x", "encryption": "AES256"}, "is not on S3"),
        ({"tags": {"aws:x": "1"}}, "S3 does not take the tags aws:x=1"),
        ({"tags": {f"k{i}": "v" for i in range(11)}}, "11 of them"),
        ({"tags": {"a": "b;c"}}, "S3 does not take the tags a=b;c"),
    ],
)
def test_what_export_would_fail_at_is_refused_with_the_config(
    changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        edit(ExportConfig(), changes)
    assert says in str(caught.value)
