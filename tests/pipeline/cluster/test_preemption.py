"""Machines come and go: of one that is drained fewer workers go on, one that joins is used."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pipeline.durable.session import free_port
from pipeline.stages.train import train_stage
from pipeline.training.loop import train
from tests.pipeline.contexts import stage_context
from tests.pipeline.training.training_runs import (
    CONFIG,
    LORA,
    Plain,
    sources,
    trained,
    worst_difference,
)
from tests.small import Small

STEPS, EVERY = 400, 50
LONG = CONFIG.model_copy(
    update={
        "steps": STEPS,
        "learning_rate": 1e-3,
        "lora": LORA.model_copy(update={"dropout": 0.0}),
        "checkpoint_every": EVERY,
        "keep_checkpoints": 1000,
    }
)
# Ray Train looks once a minute whether it could have more workers.
EVERY_JOINED = 100
JOINED = LONG.model_copy(update={"steps": 3000, "checkpoint_every": EVERY_JOINED})


@pytest.mark.slow
def test_a_drained_node_is_left_with_a_checkpoint_and_fewer_workers_go_on(
    small: Small, tmp_path: Path
) -> None:
    found = run_apart("drained", small, tmp_path)
    # Written when the notice came, between two regular checkpoints, and gone on from.
    (early,) = [step for step in found["checkpoints"] if step % EVERY]
    assert found["begun_at"] < early < STEPS
    registered = (tmp_path / "run" / "checkpoint_manager_snapshot.json").read_text()
    assert f"step-{early:07d}" in registered
    assert found["outputs"]["steps"] == STEPS
    workers = workers_of(tmp_path, found["checkpoints"])
    assert workers[early] == 2 and workers[STEPS] == 1
    train(LONG, sources(small), Plain(tmp_path / "plain"))
    found = load_file(tmp_path / "stage" / "trained" / "adapter" / "adapter_model.safetensors")
    # Two workers up to there, one afterwards. Measured: 7e-7 in weights up to 0.3.
    assert worst_difference(found, trained(tmp_path / "plain", STEPS)) < 1e-4


@pytest.mark.slow
def test_a_node_that_joins_is_used(small: Small, tmp_path: Path) -> None:
    found = run_apart("grows", small, tmp_path)
    workers = workers_of(tmp_path, found["checkpoints"])
    before = max(step for step, count in workers.items() if count == 1)
    assert before < found["outputs"]["steps"] == JOINED.steps
    assert {count for step, count in workers.items() if step > before} == {2}
    train(JOINED, sources(small), Plain(tmp_path / "plain"))
    # The same to the last bit as long as one worker trains. Two add in another order, which three
    # thousand steps at this rate carry on: 2e-5 at the first checkpoint, 2e-2 at the end.
    for step, most in ((before, 0.0), (before + EVERY_JOINED, 5e-3)):
        found, plain = trained(tmp_path / "run", step), trained(tmp_path / "plain", step)
        assert worst_difference(found, plain) <= most


def run_apart(case: str, small: Small, folder: Path) -> Any:
    """What a case found, which ran in a process of its own."""
    command = [sys.executable, "-m", "tests.pipeline.cluster.test_preemption", case]
    done = subprocess.run(
        [*command, str(small.base), str(small.prepared), str(folder)],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


def workers_of(folder: Path, steps: list[int]) -> dict[int, int]:
    """Of each checkpoint, how many workers wrote it."""
    states = {step: folder / "run" / f"step-{step:07d}" / "state.json" for step in steps}
    return {step: json.loads(path.read_text())["workers"] for step, path in states.items()}


def main(case: str, base: str, prepared: str, folder: str) -> None:
    """A case on a cluster of one or two nodes with a core each; what it says goes into a file."""
    import ray
    from ray.cluster_utils import Cluster

    port = free_port(None)
    # Ray Train asks this cluster about its workers, and no other Ray on the machine.
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    spot = cluster.add_node(num_cpus=1) if case == "drained" else None
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    place = Path(folder)
    inputs = {"base": (Path(base), {}), "data": (Path(prepared), {"digest": "0" * 64})}
    ctx = stage_context("train-1", place / "stage", inputs)
    ctx.run = ctx.run.__class__(root=ctx.run.root, workflow="demo", num_workers=(1, 2))
    outputs: dict[str, object] = {}
    config = LONG if case == "drained" else JOINED
    thread = threading.Thread(target=lambda: outputs.update(train_stage(ctx, config)))
    thread.start()
    run = Path(ctx.train_storage[0]) / ctx.train_storage[1]

    def steps() -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in run.glob("step-*"))

    while not steps():
        assert thread.is_alive()
        time.sleep(0.2)
    found: dict[str, Any] = {"begun_at": steps()[-1]}
    if spot is None:
        cluster.add_node(num_cpus=1)
    else:
        drain(cluster, spot, steps)
    thread.join()
    found |= {"checkpoints": steps(), "outputs": outputs}
    (place / "result.json").write_text(json.dumps(found))
    ray.shutdown()
    cluster.shutdown()


def drain(cluster: Any, spot: Any, steps: Callable[[], list[int]]) -> None:
    """Announce that a node goes, wait for the checkpoint that this causes, remove it."""
    command = [str(Path(sys.executable).with_name("ray")), "drain-node"]
    command += ["--address", cluster.address, "--node-id", spot.node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    subprocess.run([*command, "--deadline-remaining-seconds", "20"], check=True)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not any(step % EVERY for step in steps()):
        time.sleep(0.1)
    time.sleep(1)  # it is registered after it is written
    cluster.remove_node(spot, allow_graceful=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
