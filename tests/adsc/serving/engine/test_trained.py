"""A checkpoint that was trained, merged and exported, under each of its plans by name and under
those that its requests name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import adsc
from tests.adsc.serving.engine.cases import BASE, TRAINED, Prompt, Reference, tokens
from tests.adsc.serving.engine.engines import engine

DEFAULT, *OTHERS = TRAINED


@pytest.fixture(scope="module")
def taught(trained: Path) -> Iterator[Reference]:
    yield Reference(trained)


@pytest.fixture(scope="module")
def answers(taught: Reference, prompts: list[Prompt]) -> dict[str, list[tuple[int, ...]]]:
    """What transformers answers, by the name of the plan."""
    plans = TRAINED | {"dense": ""}
    return {name: tokens(taught.answers(plan, prompts)) for name, plan in plans.items()}


def test_its_own_plan_and_those_that_requests_name(
    trained: Path,
    taught: Reference,
    prompts: list[Prompt],
    answers: dict[str, list[tuple[int, ...]]],
) -> None:
    """Its plan comes from its config. Training changed its answers."""
    with engine(trained) as served:
        assert served.answers(taught, prompts) == answers[DEFAULT]
        for name in ("32", "dense"):  # drops where the default does
            assert served.answers(taught, prompts, plans=[name]) == answers[name]
        for name in ("7", "9"):  # other layers
            with pytest.raises(ValueError, match="may choose dense, 32, 16;"):
                served.answers(taught, prompts[:1], plans=[name])
    assert answers[DEFAULT] != tokens(Reference(BASE).answers(TRAINED[DEFAULT], prompts))
    model = adsc.from_pretrained(trained)
    assert {name: str(plan) for name, plan in adsc.plans_of(model).items()} == TRAINED


@pytest.mark.parametrize("name", [*OTHERS, "dense"])
def test_a_name_chooses_its_plan(
    name: str,
    trained: Path,
    taught: Reference,
    prompts: list[Prompt],
    answers: dict[str, list[tuple[int, ...]]],
) -> None:
    with engine(trained, name) as served:
        assert served.answers(taught, prompts) == answers[name]
