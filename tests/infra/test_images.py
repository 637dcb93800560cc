"""Dockerfiles: hadolint, which a Python package brings, and what it doesn't ask."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.infra.documents import INFRA

ROOT = INFRA.parent
DOCKERFILES = [INFRA / folder / "Dockerfile" for folder in (".", "mlflow", "vllm")]


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, its arguments) in order, continued lines joined, comments left out."""
    lines = [it for it in path.read_text().splitlines() if not it.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [tuple(it.split(None, 1)) for it in joined.splitlines() if it.strip()]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, "--no-color", path], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_images_are_pinned_unprivileged_and_watched(path: Path) -> None:
    found = instructions(path)
    arguments = dict(text.split("=", 1) for name, text in found if name == "ARG" and "=" in text)
    for name, text in found:
        if name == "FROM":
            base = arguments[re.match(r"\$\{(\w+)\}", text)[1]]
            assert re.search(r":\d[\w.-]*$", base), base
    users = [text for name, text in found if name == "USER"]
    assert users and users[-1].split(":")[0].isdigit() and users[-1] != "0"
    after = [name for name, _ in found[found.index(("USER", users[-1])) :]]
    assert "HEALTHCHECK" in after and "RUN" not in after
    installs = [text for name, text in found if name == "RUN" and "pip install" in text]
    assert installs and all("--constraint" in it or "==" in it for it in installs)
    assert not [it for it in found if it[0] in ("ADD",)]


@pytest.mark.parametrize("folder", [INFRA, INFRA / "vllm"], ids=lambda path: path.name)
def test_the_image_gets_the_packages_and_nothing_else(folder: Path) -> None:
    """Whatever is copied exists, and the allow-list lets exactly that through."""
    lines = (folder / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source
        for name, text in instructions(folder / "Dockerfile")
        if name == "COPY" and "--from" not in text
        for source in text.split()[:-1]
    }
    assert copied == allowed and all((ROOT / name).exists() for name in copied)
    assert "*" in lines
