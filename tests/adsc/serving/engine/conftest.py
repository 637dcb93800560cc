"""Fixtures of the serving tests: `make test-vllm` runs them in vLLM's own environment, and they are
skipped where vLLM is not installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.adsc.serving.engine.cases import Answer, Prompt, Reference, prompts, random_checkpoint

Wanted = Callable[[str], list[Answer]]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA with random weights."""
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> Iterator[Reference]:
    yield Reference(checkpoint)


@pytest.fixture(scope="session")
def asked() -> list[Prompt]:
    return prompts()


@pytest.fixture(scope="session")
def wanted(reference: Reference, asked: list[Prompt]) -> Wanted:
    """What transformers answers to all prompts under a plan, worked out once."""
    known: dict[str, list[Answer]] = {}

    def answers(plan: str) -> list[Answer]:
        if plan not in known:
            known[plan] = reference.answers(plan, asked)
        return known[plan]

    return answers
