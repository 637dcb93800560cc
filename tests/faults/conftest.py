"""The undisturbed run, with which every fault test compares; and small disks."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.training import Disturbed, results
from tests.small import Small


@pytest.fixture(scope="session")
def undisturbed(small: Small, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    run = Disturbed(tmp_path_factory.mktemp("undisturbed"), small.base, small.prepared)
    run.start()
    status, output = run.end()
    assert status == 0, output
    return results(run.record())


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of the size that the test names, as `mount` writes it: 40m."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(place)],
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs the superuser")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)
