"""A whole machine goes, without a word or announced, and another one comes."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline.tracking.tracker import default_uri
from tests.faults.training import EVERY, Disturbed, restarts, results, steps_taken_again
from tests.small import Small

pytestmark = pytest.mark.slow


class Nodes(NamedTuple):
    """A head that has no room for training workers, and a machine that has."""

    cluster: Any
    worker: Any
    environment: dict[str, str]


@pytest.fixture
def nodes(small: Small, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    from ray.cluster_utils import Cluster

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"}
    for name, value in {
        **environment,
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_timeout_ms": "5000",
        "RAY_health_check_failure_threshold": "4",
    }.items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": True, "dashboard_port": port},
    )
    yield Nodes(cluster, cluster.add_node(num_cpus=3), environment)
    cluster.shutdown()


def run_on(nodes: Nodes, root: Path, small: Small, **config: Any) -> Disturbed:
    run = Disturbed(
        root,
        small.base,
        small.prepared,
        config,
        address=nodes.cluster.address,
        cpus_per_worker=2,
        tracking_uri=default_uri(root),
    )
    run.start(nodes.environment)
    return run


def test_a_machine_lost_without_a_word(nodes: Nodes, small: Small, tmp_path: Path) -> None:
    run = run_on(nodes, tmp_path / "lost", small)
    run.wait_for_checkpoints(2)
    nodes.cluster.remove_node(nodes.worker, allow_graceful=False)
    nodes.cluster.add_node(num_cpus=3)
    status, output = run.end()
    assert status == 0, output
    whole = run_on(nodes, tmp_path / "whole", small)
    status, output = whole.end()
    assert status == 0, output
    assert results(run.record()) == results(whole.record())
    assert sum(steps_taken_again(tmp_path / "lost" / "mlflow.db")) <= 2 * EVERY


def test_a_machine_that_is_to_be_removed_leaves_a_checkpoint(
    nodes: Nodes, small: Small, tmp_path: Path
) -> None:
    """No checkpoint is due in this run: the only one is that of the notice."""
    run = run_on(nodes, tmp_path, small, steps=150, checkpoint_every=1000)
    run.wait(lambda: steps_logged(tmp_path) >= 5)
    drain = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address",
         nodes.cluster.address, "--node-id", nodes.worker.node_id, "--reason",
         "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds",
         "60"], capture_output=True, text=True,
    )  # fmt: skip
    assert drain.returncode == 0, drain.stdout + drain.stderr
    nodes.cluster.add_node(num_cpus=3)
    (saved,) = run.wait(run.checkpoints, 120)
    nodes.cluster.remove_node(nodes.worker, allow_graceful=False)
    status, output = run.end()
    assert status == 0, output
    at = int(saved.removeprefix("step-"))
    assert at < 150
    assert [again for _, again in restarts(tmp_path / "mlflow.db")] == [at + 1]


def steps_logged(root: Path) -> int:
    import sqlite3

    try:
        with sqlite3.connect(f"file:{root / 'mlflow.db'}?mode=ro", uri=True) as opened:
            found = opened.execute("select count(*) from metrics where key = 'loss'").fetchone()
            return int(found[0])
    except sqlite3.OperationalError:  # not made yet
        return 0
