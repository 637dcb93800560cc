"""Imports go one way: adsc <- pipeline <- workflows, and never in a circle; a few packages are
imported in one file; tests mirror the tree.
"""

import ast
from collections.abc import Iterator, Mapping, Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import HEAVY

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

PACKAGES = tuple(FORBIDDEN)
"""The lowest first."""


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


def files_of(root: Path) -> dict[str, Path]:
    """Every module of ours, by its full name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def edges_of(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Which of our modules each imports: at the top, inside of functions, and for types alone."""
    edges: dict[str, set[str]] = {}
    for name, path in files.items():
        edges[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                edges[name] |= {alias.name for alias in node.names} & files.keys()
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    below = f"{node.module}.{alias.name}"
                    edges[name] |= {below if below in files else node.module} & files.keys()
        edges[name].discard(name)
    return edges


def between_folders(files: Mapping[str, Path], edges: Mapping[str, Set[str]]) -> dict:
    """The same from folder to folder; between a folder and one inside of it no edge is drawn."""
    found: dict[Path, set[Path]] = {path.parent: set() for path in files.values()}
    for name, others in edges.items():
        for one, other in ((files[name].parent, files[it].parent) for it in others):
            if not (one.is_relative_to(other) or other.is_relative_to(one)):
                found[one].add(other)
    return found


def circle(edges: Mapping) -> list[str]:
    """One circle, if there is any."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return [str(one) for one in error.args[1]]
    return []


def test_no_circle_between_files() -> None:
    edges = edges_of(files_of(ROOT))
    assert "pipeline.durable.stage" in edges["pipeline.durable.graph"]
    assert not circle(edges)


def test_no_circle_between_folders() -> None:
    files = files_of(ROOT)
    edges = between_folders(files, edges_of(files))
    assert ROOT / "pipeline/training" in edges[ROOT / "pipeline/stages"]
    assert not circle(edges)


def upward_names(package: str, path: Path) -> Iterator[str]:
    """Strings that name a module of a package above: an import that the others don't see."""
    above = PACKAGES[PACKAGES.index(package) + 1 :]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            first, _, rest = node.value.partition(".")
            if first in above and all(part.isidentifier() for part in rest.split(".") if rest):
                yield node.value


@pytest.mark.parametrize("package", PACKAGES)
def test_no_string_names_a_module_above(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert not {path: found for path in files if (found := list(upward_names(package, path)))}


def other_tests(path: Path) -> Iterator[str]:
    """Modules of tests that a file imports: what several need belongs beside them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests"):
            names = [node.module or "", *(alias.name for alias in node.names)]
            yield from (name for name in names if name.rpartition(".")[2].startswith("test_"))


def test_no_test_imports_another() -> None:
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert not {path: found for path in files if (found := list(other_tests(path)))}


@pytest.mark.parametrize("package", PACKAGES)
def test_tests_mirror_the_tree(package: str) -> None:
    """A folder of tests has the name of the folder that it tests; none holds too many."""
    tests = ROOT / "tests"
    folders = {path.parent for path in (tests / package).rglob("test_*.py")}
    assert folders
    assert not {path for path in folders if not (ROOT / path.relative_to(tests)).is_dir()}
    assert not {path for path in folders if len(list(path.glob("test_*.py"))) > 14}


def test_these_tests_see_what_they_refuse(tmp_path: Path) -> None:
    texts = {
        "pipeline/a/one.py": "def f():\n    from pipeline.b import two",
        "pipeline/b/two.py": "if TYPE_CHECKING:\n    from pipeline.b.three import Three",
        "pipeline/b/three.py": "from pipeline.a.one import f",
        "pipeline/a/four.py": "from pipeline.b import two",
        "pipeline/b/five.py": "import pipeline.a.four\nNAMES = ('workflows', 'workflows.x')",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    files = files_of(tmp_path)
    assert set(circle(edges_of(files))) == {"pipeline.a.one", "pipeline.b.two", "pipeline.b.three"}
    for name in ("pipeline.b.two", "pipeline.b.three"):
        del files[name]
    assert circle(edges_of(files)) == []
    assert len(
        circle(between_folders(files, {**edges_of(files), "pipeline.a.four": {"pipeline.b.five"}}))
    )
    assert list(upward_names("pipeline", files["pipeline.b.five"])) == ["workflows", "workflows.x"]
    assert list(upward_names("workflows", files["pipeline.b.five"])) == []
    shared = tmp_path / "test_six.py"
    shared.write_text("from tests.a.test_seven import made\nfrom tests.a.eight import test_nine")
    assert list(other_tests(shared)) == ["tests.a.test_seven", "test_nine"]


def test_files_that_are_left_out_of_the_unit_tests_exist() -> None:
    known = {f"{path.parent.name}/{path.stem}" for path in (ROOT / "tests").rglob("test_*.py")}
    assert known >= HEAVY
