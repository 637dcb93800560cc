"""The package as pip installs it, away from the checkout: modules, assets and every command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small import SMALL_DEMO

ROOT = Path(__file__).parent.parent
COMMIT = "f" * 40


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but what the wheel holds, built from the files that git knows."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("docs/", "tests/")):
            copy = folder / "source" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    known = os.environ | {"ADSC_COMMIT": COMMIT}  # the copy has no git around it
    subprocess.run([*build, str(folder / "source")], check=True, env=known)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


def adsc(site: Path, cwd: Path, *words: str) -> str:
    """What the installed command prints."""
    done = subprocess.run(
        [sys.executable, "-P", str(site / "bin" / "adsc"), *words],
        cwd=cwd, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def files_of(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


@pytest.mark.parametrize("package", ["adsc", "pipeline", "workflows"])
def test_the_wheel_has_every_module_and_asset(site: Path, package: str) -> None:
    assert files_of(site / package) - {"COMMIT"} == files_of(ROOT / package)
    assert (site / package / "py.typed").is_file()


def test_commands_work_away_from_the_checkout(site: Path, tmp_path: Path) -> None:
    printed = adsc(site, tmp_path, "--version")
    assert printed.startswith("adsc 0.") and COMMIT[:7] in printed
    assert "llava15_7b" in adsc(site, tmp_path, "ls")
    assert "train.steps" in adsc(site, tmp_path, "show", "demo", "--config")
    assert "to run" in adsc(site, tmp_path, "ls", "demo")
    assert "FLOPs" in adsc(site, tmp_path, "cost", "llava-1.5-7b", "--plan", "8:1/2")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_address")
def test_the_small_demo_runs_from_the_wheel(site: Path, tmp_path: Path) -> None:
    """The shipped base, a few pictures and steps."""
    changes = [f"--set={change}" for change in SMALL_DEMO]
    assert "of control" in adsc(site, tmp_path, "run", "demo", "--mlflow", "off", *changes)
    (export,) = (tmp_path / "runs").glob("export-*")
    assert list(export.glob("attempts/*/model.safetensors"))
