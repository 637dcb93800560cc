"""A Ray cluster of several nodes on this machine, started as people start one: `ray start`.

Each node is a process of its own with its own ports. Only what is
started here is stopped here; other Rays on the machine are left alone.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A running cluster, and what a client needs to use it."""

    address: str
    """Of the job server."""
    token: str
    environment: dict[str, str]
    """A client's environment: the token's file, nothing that gives access to the store."""
    metrics: str
    """The head's metrics page."""
    folder: Path
    """Ray's own files, logs among them."""
    head: subprocess.Popen[bytes]


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextmanager
def started(nodes_only: Mapping[str, str], *, mode: str, workers: int) -> Iterator[Cluster]:
    """A head and workers, with two CPUs each.

    Args:
        nodes_only: environment of the nodes that clients don't have, such as credentials.
        mode: Ray's authentication, token or disabled.
    """
    # Sockets lie below it, and their paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="adsc-ray-", dir="/tmp"))
    token = secrets.token_hex(24)
    (folder / "token").write_text(token)
    gcs, dashboard, client, metrics = free_ports(4)
    address = f"http://127.0.0.1:{dashboard}"
    outside = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "AWS_", "ADSC_", "MLFLOW_"))
    }
    outside |= {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    # Ray Train asks the dashboard about its workers, and must not ask another Ray of this machine.
    inside = {**outside, **nodes_only, "RAY_API_SERVER_ADDRESS": address}
    inside |= {
        "RAY_num_workers_soft_limit": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "300",  # a busy machine takes its time
    }
    head = [
        "--head", f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
        f"--ray-client-server-port={client}",
        f"--metrics-export-port={metrics}", f"--temp-dir={folder}/ray",
    ]  # fmt: skip
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        processes: list[subprocess.Popen[bytes]] = []
        nodes = [("head", head)]
        nodes += [
            (f"worker-{n}", [f"--address=127.0.0.1:{gcs}", "--metrics-export-port=0"])
            for n in range(workers)
        ]
        for name, words in nodes:
            processes.append(_start(name, words, inside, folder))
            stack.callback(kill, processes[-1])
            _wait_for(address, token, len(processes), processes[-1], folder / f"{name}.log")
            _forget(gcs)
        yield Cluster(
            address=address,
            token=token,
            environment=outside,
            metrics=f"http://127.0.0.1:{metrics}/metrics",
            folder=folder,
            head=processes[0],
        )


def _forget(gcs: int) -> None:
    """A worker writes down its cluster's address where any `ray.init` of this machine looks."""
    noted = Path("/tmp/ray/ray_current_cluster")
    with suppress(FileNotFoundError):
        if noted.read_text().endswith(f":{gcs}"):
            noted.unlink()


def _start(
    name: str, words: list[str], environment: dict[str, str], folder: Path
) -> subprocess.Popen[bytes]:
    listen, grpc, runtime = free_ports(3)
    command = [
        str(Path(sys.executable).parent / "ray"), "start", *words, "--block", "--num-cpus=2",
        "--node-ip-address=127.0.0.1", "--object-store-memory=100000000",
        f"--dashboard-agent-listen-port={listen}", f"--dashboard-agent-grpc-port={grpc}",
        f"--runtime-env-agent-port={runtime}",
    ]  # fmt: skip
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _wait_for(
    address: str, token: str, nodes: int, process: subprocess.Popen[bytes], log: Path
) -> None:
    """Until the dashboard knows so many nodes."""
    import requests

    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            answer = requests.get(
                f"{address}/nodes?view=summary",
                headers={"Authorization": f"Bearer {token}"},
                timeout=5,
            )
            alive = [
                node
                for node in answer.json()["data"]["summary"]
                if node["raylet"].get("state") == "ALIVE"
            ]
            if len(alive) >= nodes:
                return
        except (requests.RequestException, ValueError, KeyError):
            pass
        time.sleep(0.3)
    raise AssertionError(f"{nodes} nodes did not come up: {log.read_text()}")


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a node as a lost machine ends; draining it would take half a minute."""
    if process.poll() is not None:
        return
    below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in below:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(below, timeout=10)
