"""Fingerprints are the same everywhere, and change with whatever changes the result."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import subprocess
import sys
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from pipeline.config import ADDED, OPERATIONAL, Config
from pipeline.durable.graph import GraphError, fingerprints, topological_order
from pipeline.durable.identity import IdentityError, body_name, canonical, digest, load_body
from pipeline.durable.stage import Stage
from pipeline.training.config import OffloadSettings, TrainConfig
from tests.pipeline.durable import toy


class Kind(Enum):
    FIRST = "first"


@dataclasses.dataclass(frozen=True)
class Plan:
    stages: tuple[tuple[int, Fraction], ...]


class Loose(Config):
    value: Any = None
    """Anything."""


class Batched(Config):
    rate: float = 1.0
    """Decides what is computed."""
    batch: int = Field(8, json_schema_extra=OPERATIONAL)
    """Decides how."""


def test_operational_fields_are_no_part_of_an_identity() -> None:
    assert digest(Batched(batch=8)) == digest(Batched(batch=64)) != digest(Batched(rate=2.0))
    assert canonical(Loose(value=Batched())) == {"value": {"rate": 1.0}}


class Older(Config):
    rate: float = 1.0
    """As it was."""


class Newer(Older):
    window: int | None = Field(None, json_schema_extra=ADDED)
    """What came later."""


def test_a_field_that_came_later_changes_no_older_identity() -> None:
    assert digest(Newer()) == digest(Older()) != digest(Newer(window=3))
    assert digest(Newer(window=3)) != digest(Newer(window=4))


def test_how_a_stage_is_trained_is_no_part_of_its_identity() -> None:
    """Strategy, memory and checkpoints may change in the middle of a run: it goes on."""
    how = {
        "strategy": "zero3",
        "offload": OffloadSettings(optimizer="cpu", parameters="cpu"),
        "accumulate": 4,
        "activation_checkpointing": True,
        "attention": "eager",
        "checkpoint_every": 7,
        "keep_checkpoints": 9,
        "log_every": 3,
        "diverged_norm": 5.0,
    }
    assert digest(TrainConfig.model_validate(how)) == digest(TrainConfig())
    for what in ({"seed": 1}, {"batch_size": 8}, {"data_share": 0.5}, {"precision": "bf16"}):
        assert digest(TrainConfig.model_validate(what)) != digest(TrainConfig())


def test_literals() -> None:
    value = {
        "b": (1, 2.5, None, True),
        "a": {"y", "x"},
        "kind": Kind.FIRST,
        "plan": Plan(((2, Fraction(1, 2)),)),
        "path": Path("a/b"),
        "config": Loose(value=1),
    }
    assert canonical(value) == {
        "a": ["x", "y"],
        "b": [1, 2.5, None, True],
        "config": {"value": 1},
        "kind": "first",
        "path": "a/b",
        "plan": {"stages": [[2, "1/2"]]},
    }
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(1) != digest(1.0) != digest("1.0")


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (object(), "config.value"),
        ({"deep": [0, math.nan]}, "config.value.deep.1"),
        (print, "config.value"),
        ({1: 2}, "config.value"),
        (b"bytes", "config.value"),
    ],
)
def test_what_cannot_be_hashed_is_named(value: object, field: str) -> None:
    with pytest.raises(IdentityError, match=rf"^{field} "):
        canonical(Loose(value=value))
    stage = dataclasses.replace(toy.stages("log")[-1], config=Loose(value=value))
    with pytest.raises(GraphError, match=rf"make: make\.{field} "):
        topological_order([stage])


def test_bodies_need_a_name() -> None:
    assert body_name(toy.make) == "tests.pipeline.durable.toy.make"
    for body in (lambda context, config: {}, functools.partial(toy.make), toy.Toy(log="x")):
        with pytest.raises(IdentityError, match="function at the top of a module"):
            body_name(body)


def changed(stages: list[Stage]) -> set[str]:
    before, after = fingerprints(toy.stages("log")), fingerprints(stages)
    return {name for name in before if before[name] != after[name]}


def test_an_edit_changes_what_is_below_it() -> None:
    assert changed(toy.stages("log")) == set()
    assert changed(toy.stages("log", make={"value": 4})) == {"make", "double", "square", "total"}
    assert changed(toy.stages("log", double={"value": 4})) == {"double", "total"}
    assert changed(toy.stages("log", total={"value": 4})) == {"total"}


def test_id_and_version_count_and_the_title_does_not() -> None:
    total, *rest = toy.stages("log")
    assert changed([toy.with_kind(total, version=2), *rest]) == {"total"}
    assert changed([toy.with_kind(total, id="another"), *rest]) == {"total"}
    assert changed([dataclasses.replace(total, title="Other words"), *rest]) == set()


def test_a_body_that_moves_to_another_file_changes_no_fingerprint(tmp_path: Path) -> None:
    """The module of all toy bodies, in another place under another name."""
    moved = tmp_path / "elsewhere.py"
    moved.write_text(Path(toy.__file__).read_text())
    spec = importlib.util.spec_from_file_location("elsewhere", moved)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stages = module.stages("log")
    assert body_name(stages[0].kind.body) == "elsewhere.total"
    assert changed(stages) == set()


def test_a_body_may_be_given_by_its_full_name() -> None:
    """Nothing is imported before it runs, and the identity is the same."""
    *rest, make = toy.stages("log")
    named = toy.with_kind(make, body=f"tests.pipeline.durable.toy.{make.kind.body.__name__}")
    assert fingerprints([*rest, named]) == fingerprints([*rest, make])
    assert load_body(named.kind.body) is make.kind.body
    assert fingerprints([*rest, toy.with_kind(make, body="no.such.module")])
    for wrong in ("make", "tests.pipeline.durable.toy:make", "tests..make"):
        with pytest.raises(GraphError, match="is not a function's full name"):
            topological_order([*rest, toy.with_kind(make, body=wrong)])


def test_a_script_has_the_fingerprints_of_its_module() -> None:
    """Run as `__main__`, where classes and functions have other names."""
    code = (
        "import runpy; from pipeline.durable.graph import fingerprints;"
        "names = runpy.run_module('tests.pipeline.durable.toy', run_name='__main__');"
        "made = names['stages']('log');"
        "assert made[0].kind.body.__module__ == '__main__'; print(fingerprints(made)['total'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    assert done.stdout.strip() == fingerprints(toy.stages("log"))["total"]


def test_two_kinds_cannot_share_an_id() -> None:
    """Else each would take the other's results for its own."""
    total, double, *rest = toy.stages("log")
    for other in (
        toy.with_kind(total, id=double.kind.id),
        toy.with_kind(double, version=2, body=toy.total),
    ):
        stages = [dataclasses.replace(other, name="other", needs={}), total, double, *rest]
        with pytest.raises(GraphError, match=r"2 kinds have the id tests\.pipeline\.toy\.double"):
            fingerprints(stages)
    for wrong in ("", "two words", "1st"):
        with pytest.raises(IdentityError, match="is not a kind's id: use letters"):
            toy.with_kind(total, id=wrong)


def test_a_kind_takes_configs_of_its_own() -> None:
    total, *rest = toy.stages("log")
    with pytest.raises(
        GraphError,
        match=r"total: stages of the kind tests\.pipeline\.toy\.total take a Toy, not Batched",
    ):
        topological_order([dataclasses.replace(total, config=Batched()), *rest])


def test_a_pin_is_an_identity_of_its_own() -> None:
    *rest, make = toy.stages("log")
    pinned = [*rest, dataclasses.replace(make, pinned="/data/made")]
    assert changed(pinned) == {"make", "double", "square", "total"}
    edited = dataclasses.replace(pinned[-1], config=toy.Toy(log="other"), pinned="/data/made/")
    assert fingerprints(pinned) == fingerprints([*rest, edited])
    other = [*rest, dataclasses.replace(edited, digest="of other files")]
    assert fingerprints(pinned)["total"] != fingerprints(other)["total"]


def test_the_same_in_another_process() -> None:
    code = (
        "from tests.pipeline.durable import toy; from pipeline.durable.graph import fingerprints;"
        "print(fingerprints(toy.stages('log'))['total'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    assert done.stdout.strip() == fingerprints(toy.stages("log"))["total"]
