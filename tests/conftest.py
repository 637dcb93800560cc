"""Fixtures with real parts: an S3 endpoint over HTTP, and one Ray for the whole session."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports ray or torch: one thread a process, no network, one authentication mode.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")

# A shell starts what it puts into the background with interrupts ignored, and processes that tests
# start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

BUCKET = "lab"


LONGEST = ("workflows", "pipeline")
"""Folders of `tests`, the longest files first; the others follow."""


HEAVY = frozenset(
    [
        "attachment/test_adapters",
        "attachment/test_after_import",
        "attachment/test_compiled",
        "attachment/test_compiled_layers",
        "attachment/test_processes",
        "attachment/test_running",
        "attachment/test_trainers",
        "attachment/test_trl",
        "benchmarks/test_benchmarks",
        "benchmarks/test_table",
        "commands/test_startup",
        "durable/test_lease",
        "evaluation/test_generation",
        "infra/test_store_policy",
        "reporting/test_report",
        "search/test_search",
        "stages/test_export",
        "store/test_store",
        "tests/test_wheel",
        "tracking/test_moved",
        "tracking/test_tracking",
        "training/test_compiled_training",
        "training/test_distill",
        "training/test_strategies",
        "training/test_throughput",
        "training/test_training",
    ]
)
"""Files whose tests start processes, servers or compilers, or train: seconds each. So do those of
tests/faults."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts Ray and what takes seconds, and run the files with Ray first.

    They take minutes: of two processes, none should be left with one of them at the end.
    """
    for item in items:
        if "ray_address" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)
        folder = item.path.parent.name
        if folder == "faults" or f"{folder}/{item.path.stem}" in HEAVY:
            item.add_marker(pytest.mark.heavy)
    starts_ray = {
        item.path
        for item in items
        if item.get_closest_marker("ray") and not item.get_closest_marker("slow")
    }
    items.sort(key=lambda item: (item.path not in starts_ray, _rank(item.path)))


def _rank(path: Path) -> int:
    tests = Path(__file__).parent
    folder = path.relative_to(tests).parts[0] if path.is_relative_to(tests) else ""
    return LONGEST.index(folder) if folder in LONGEST else len(LONGEST)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A moto server over HTTP with the bucket `lab`; the environment points to it.

    Request it before `ray_address`: Ray's workers inherit the environment.
    """
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "test-key-id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret-value")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield endpoint
    server.stop()


@pytest.fixture(scope="session")
def ray_address(s3_endpoint: str) -> Iterator[str]:
    """One Ray for all tests, also for driver processes that a test starts: its address.

    A test that uses Ray requests it: no other Ray is started.
    """
    import ray

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        # Ray Train must not ask another Ray on this machine about its workers.
        patch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{port}")
        yield _started(port)
        ray.shutdown()


def _started(port: int, attempts: int = 3) -> str:
    """A Ray of its own, whatever else runs on this machine: its address.

    Ray gives a node 30 seconds to come up, which no setting changes and a busy machine may need
    more than once.
    """
    import ray

    while True:
        attempts -= 1
        try:
            context = ray.init(
                address="local",
                num_cpus=4,
                dashboard_port=port,
                log_to_driver=False,
                logging_level="ERROR",
            )
        except Exception as error:
            ray.shutdown()
            if not attempts or "timed out during startup" not in str(error):
                raise
        else:
            return str(context.address_info["address"])


# A fixture for every folder; imported below the environment's settings on purpose.
from tests.small import small  # noqa: E402, F401
