"""What Ray Train itself does when its caller is cancelled by force, and why two runs of one name
need the lease above them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking.tracker import default_uri
from tests.faults.training import Disturbed, results, steps_taken_again
from tests.small import Small

pytestmark = pytest.mark.slow


def count(config: dict[str, Any]) -> None:
    """A loop that only counts, with a line in a file and a checkpoint at every step."""
    import tempfile

    import ray.train

    first = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            first = int((Path(folder) / "step").read_text())
    for step in range(first, config["steps"]):
        time.sleep(0.5)
        with Path(config["log"]).open("a") as log:
            log.write(f"{config['who']} {step + 1}\n")
        folder = tempfile.mkdtemp()
        (Path(folder) / "step").write_text(str(step + 1))
        ray.train.report(
            {"step": step + 1},
            checkpoint=ray.train.Checkpoint(folder),
            checkpoint_dir_name=f"step-{step + 1:03d}",
        )


def hold_a_run(root: str, who: str, steps: int) -> int:
    """What a stage's process does."""
    import ray.train
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        count,
        train_loop_config={"who": who, "steps": steps, "log": f"{root}/log"},
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(name="run", storage_path=root),
    )
    metrics: Any = trainer.fit().metrics
    return int(metrics["step"])


def test_a_task_cancelled_by_force_takes_its_train_run_along(
    ray_address: str, tmp_path: Path
) -> None:
    import ray

    task: Any = ray.remote(num_cpus=0.1, max_retries=0)(hold_a_run)
    log = tmp_path / "log"
    first = task.remote(str(tmp_path), "first", 1000)
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "step-003").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    ray.cancel(first, force=True)
    with pytest.raises(ray.exceptions.RayError):
        ray.get(first, timeout=60)
    time.sleep(15)
    stopped = log.read_text()
    time.sleep(5)
    assert log.read_text() == stopped, "its workers go on"
    reached = int(stopped.split()[-1])
    assert ray.get(task.remote(str(tmp_path), "second", reached + 3), timeout=300) == reached + 3
    started = next(line for line in log.read_text().splitlines() if line.startswith("second"))
    assert int(started.split()[1]) > 1, "the second run did not resume"


def test_two_commands_at_once_train_once(small: Small, tmp_path: Path) -> None:
    """Two Train runs of one name delete each other's checkpoints ("Path not found", seen when tried
    without the lease): only one of them may be there."""
    runs = [
        Disturbed(tmp_path, small.base, small.prepared, tracking_uri=default_uri(tmp_path))
        for _ in range(2)
    ]
    for run in runs:
        run.start()
    for run in runs:
        status, output = run.end()
        assert status == 0, output
    assert results(runs[0].record()) == results(runs[1].record())
    assert steps_taken_again(tmp_path / "mlflow.db") == []
