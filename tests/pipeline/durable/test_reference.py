"""References in configs: resolved before the body, text everywhere else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config
from pipeline.durable.attempt import execute
from pipeline.durable.graph import GraphError, fingerprints, topological_order
from pipeline.durable.identity import canonical
from pipeline.durable.progress import ProgressHandle
from pipeline.durable.record import Record
from pipeline.durable.reference import Reference, references, resolve
from pipeline.durable.stage import Kind, Stage, StageContext
from pipeline.tracking import tracker as tracking
from tests.pipeline.durable import toy


class Count(Reference):
    """How many numbers a stage made."""

    def __str__(self) -> str:
        return f"count of {self.stage}"

    def value(self, outputs: Mapping[str, Any]) -> int:
        return int(outputs["count"])


class Section(Config):
    count: int | Count = 0
    """A number, or a reference to one."""


class Adding(Section):
    sections: tuple[Section, ...] = ()
    """Further ones."""
    named: dict[str, int | Count] = {}
    """And by name."""


def add(context: StageContext, config: Adding) -> dict[str, Any]:
    numbers = [config.count, *(it.count for it in config.sections), *config.named.values()]
    assert all(isinstance(number, int) for number in numbers)
    return {"sum": sum(numbers), "inputs": sorted(context.inputs)}  # type: ignore[arg-type]


ADD = Kind(id="add", referring_id="add_found", version=1, body=add, config=Adding)
REFERRING = Adding(
    count=Count(stage="make"),
    sections=(Section(count=4), Section(count=Count(stage="square"))),
    named={"a": Count(stage="make"), "b": 1},
)


def stages(config: Adding = REFERRING) -> list[Stage]:
    *_, square, make = toy.stages("log")
    return [ADD.stage(name="add", title="", config=config, needs={"made": "make"}), square, make]


def test_all_references_of_a_config_are_found_and_resolved() -> None:
    assert [it.stage for it in references(REFERRING)] == ["make", "square", "make"]
    found = resolve(REFERRING, {"make": {"count": 3}, "square": {"count": 5}})
    sections = (Section(count=4), Section(count=5))
    assert found == Adding(count=3, sections=sections, named={"a": 3, "b": 1})
    assert not list(references(found)) and resolve(found, {}) is found
    assert canonical(REFERRING) == {
        "count": "count of make",
        "sections": [{"count": 4}, {"count": "count of square"}],
        "named": {"a": "count of make", "b": 1},
    }


def test_a_stage_needs_what_its_config_refers_to() -> None:
    add, *rest = stages()
    assert add.needs == {"made": "make", "make": "make", "square": "square"}
    lacking = dataclasses.replace(add, needs={"made": "make", "make": "make"})
    with pytest.raises(GraphError, match="add: its config refers to square, which isn't among"):
        topological_order([lacking, *rest])
    other = fingerprints(stages(REFERRING.model_copy(update={"count": 3})))["add"]
    assert fingerprints([add, *rest])["add"] != other


def test_the_body_gets_values_and_the_record_keeps_references(tmp_path: Path) -> None:
    """Without Ray: an attempt at a stage whose inputs are made up."""

    def made(stage: str, count: int) -> Record:
        return Record(
            stage=stage, fingerprint="0" * 64, attempt="1", outputs={"count": count}, uri="nowhere"
        )

    add, *_ = stages()
    inputs = {"made": made("make", 3), "make": made("make", 3), "square": made("square", 5)}
    context = toy.context(tmp_path, cache=str(tmp_path / "cache"))
    record = execute(add, "f" * 64, context, ProgressHandle(stage="add"), inputs)
    assert record.outputs == {"sum": 3 + 4 + 5 + 3 + 1, "inputs": ["made"]}
    assert record.config == canonical(REFERRING) and record.body == "add_found"
    assert record.inputs.keys() == inputs.keys()
    (plain, *_) = stages(Adding(count=1))
    only = {"made": inputs["made"]}
    record = execute(plain, "e" * 64, context, ProgressHandle(stage="add"), only)
    assert record.outputs["sum"] == 1 and record.body == "add"


def test_what_completes_a_stage_gets_what_its_body_got(tmp_path: Path) -> None:
    def body(context: StageContext, config: Adding) -> dict[str, Any]:
        return add(context, config) | {"undone": {"tell": "nothing listens"}}

    def complete(context: StageContext, config: Adding, record: Record) -> dict[str, Any]:
        return {"again": add(context, config), "undone": {}}

    kind = dataclasses.replace(ADD, body=body, complete=complete)
    stage = dataclasses.replace(stages()[0], kind=kind)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking.prepare(uri, "toy")
    context = toy.context(tmp_path, tracking_uri=uri, experiment="toy", parent_run_id="0" * 32)
    inputs = {
        need: Record(stage=need, fingerprint="0" * 64, attempt="1", outputs={"count": count})
        for need, count in (("made", 3), ("make", 3), ("square", 5))
    }
    first, second = (
        execute(stage, "d" * 64, context, ProgressHandle(stage="add"), inputs) for _ in range(2)
    )
    assert "again" not in first.outputs
    assert second.outputs["again"] == {name: first.outputs[name] for name in ("sum", "inputs")}
