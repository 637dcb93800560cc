"""A disk that is full, and a store that refuses writes for a minute."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.config import Config
from pipeline.durable import graph
from pipeline.durable.failure import RunFailed
from pipeline.durable.stage import Kind, StageContext
from tests.faults.proxy import WRITES, Proxy
from tests.faults.training import Disturbed, results
from tests.pipeline.durable import toy
from tests.small import Small

pytestmark = pytest.mark.slow


SMALL_DISK = pytest.mark.parametrize("small_disk", ["40m"], indirect=True)


def fill(place: Path) -> Path:
    """Every free byte taken."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return filler


@SMALL_DISK
def test_training_goes_on_when_a_full_disk_has_room_again(
    undisturbed: dict[str, str], small: Small, small_disk: Path
) -> None:
    run = Disturbed(small_disk, small.base, small.prepared)
    run.start()
    run.wait_for_checkpoints(2)
    filler = fill(small_disk)
    assert os.statvfs(small_disk).f_bavail == 0
    time.sleep(40)
    assert run.driver and run.driver.poll() is None, run.driver.communicate()
    assert run.record() is None
    filler.unlink()
    status, output = run.end()
    assert status == 0, output
    assert results(run.record()) == undisturbed


class Megabytes(Config):
    """How much a stage writes."""

    size: int = 60


def write(context: StageContext, config: Megabytes) -> dict[str, Any]:
    (context.out / "large.bin").write_bytes(bytes(config.size << 20))
    return {}


@SMALL_DISK
def test_a_stage_that_does_not_fit_says_so(small_disk: Path, ray_address: str) -> None:
    kind = Kind(id="write", version=1, body=write, config=Megabytes)
    stage = kind.stage(name="write", title="write", config=Megabytes())
    with pytest.raises(RunFailed, match=r"the disk is full .*free some space") as caught:
        graph.run([stage], toy.context(small_disk, lease_seconds=10.0), Console(quiet=True))
    assert "rerun the same command to resume" in str(caught.value)
    assert not list(small_disk.rglob("large.bin"))


def test_a_store_that_refuses_writes_for_a_minute(
    undisturbed: dict[str, str], s3_endpoint: str, small: Small, tmp_path: Path
) -> None:
    proxy = Proxy(s3_endpoint)
    run = Disturbed(
        f"s3://lab/{uuid.uuid4().hex}", small.base, small.prepared, cache=str(tmp_path / "cache")
    )
    run.start({"AWS_ENDPOINT_URL": proxy.endpoint})
    run.wait_for_checkpoints(2)
    proxy.refused = WRITES
    time.sleep(60)
    assert proxy.refusals
    proxy.refused = set()
    status, output = run.end()
    proxy.close()
    assert status == 0, output
    assert results(run.record()) == undisturbed
