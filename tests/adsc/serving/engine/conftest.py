"""Fixtures of the serving tests: `make test-vllm` runs them in vLLM's own environment, and they are
skipped where vLLM is not installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data.templates import begin_with_bos
from tests.adsc.serving.engine.cases import (
    Answer,
    Prompt,
    Reference,
    Wanted,
    all_prompts,
    as_dict,
    random_checkpoint,
)
from tests.adsc.serving.engine.chats import PLAN
from tests.documents import ROOT

# No tests: a script of the project's own environment, and what imports vLLM at its top.
collect_ignore = ["trained.py", "replays.py"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA with random weights."""
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a plan of its own and an export's template."""
    found = tmp_path_factory.mktemp("served") / "tiny"
    shutil.copytree(checkpoint, found)
    config = json.loads((found / "config.json").read_text())
    config["adsc"] = as_dict(PLAN)
    (found / "config.json").write_text(json.dumps(config))
    begin_with_bos(found)
    return found


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained and exported elastic checkpoint, made in the project's own environment."""
    folder = tmp_path_factory.mktemp("trained")
    python = os.environ.get("ADSC_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
    command = [python, "-m", "tests.adsc.serving.engine.trained", str(folder)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return folder / "trained"


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> Iterator[Reference]:
    yield Reference(checkpoint)


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    return all_prompts()


@pytest.fixture(scope="session")
def wanted(reference: Reference, prompts: list[Prompt]) -> Wanted:
    """What transformers answers to all prompts under a plan, worked out once."""
    known: dict[str, list[Answer]] = {}

    def answers(plan: str) -> list[Answer]:
        if plan not in known:
            known[plan] = reference.answers(plan, prompts)
        return known[plan]

    return answers
