"""Imports go one way: adsc <- pipeline <- workflows; a few packages are imported in one file."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "adsc": {"pipeline", "workflows", "infra", "ray", "mlflow", "boto3", "pydantic"},
    "pipeline": {"workflows", "infra"},
    "workflows": {"infra"},
}
ONE_FILE = {
    "boto3": {"pipeline/store/s3.py"},
    "botocore": {"pipeline/store/s3.py"},
    "deepspeed": {"pipeline/training/strategy.py"},
    "mlflow": {
        "pipeline/tracking/mlflow_calls.py",
        "pipeline/tracking/mlflow_model.py",
        "pipeline/tracking/mlflow_registry.py",
    },
}


def imported(path: Path) -> Iterator[str]:
    """Top-level names of everything that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imported(path)
        if name in FORBIDDEN[package]
    }
    assert not wrong


@pytest.mark.parametrize("name", ONE_FILE)
def test_some_packages_are_imported_in_one_file(name: str) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for package in FORBIDDEN
        for path in (ROOT / package).rglob("*.py")
        if name in imported(path)
    }
    assert files <= ONE_FILE[name]
