"""Stage `train`: one training stage of a curriculum as one Ray Train run.

The loop itself stands in pipeline/training.py and knows nothing of Ray. All attempts of a stage
share one Ray Train folder, so an attempt after a crash resumes from the last checkpoint.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.feed import from_thread
from pipeline.progress import ProgressHandle
from pipeline.stage import Input, StageContext
from pipeline.tracking import RunHandle
from pipeline.train_config import TrainConfig


class TrainingRefused(ValueError):
    """Training can't succeed with this config or these data, however often it is tried."""


class RayContext:
    """pipeline.training.TrainContext inside a Ray Train worker."""

    def __init__(self, steps: int, progress: ProgressHandle, run: RunHandle) -> None:
        import ray.train

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self._steps, self._progress = steps, progress
        self._tracker = run.tracker()

    @contextlib.contextmanager
    def latest(self) -> Iterator[Path | None]:
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def stream(self, load: Callable[[int], Any], steps: range) -> Iterator[Any]:
        return from_thread(load, steps)

    def report(self, step: int, metrics: dict[str, float], checkpoint: Path | None) -> None:
        import ray.train

        ray.train.report(
            {"step": step, **metrics},
            checkpoint=ray.train.Checkpoint(str(checkpoint)) if checkpoint else None,
            checkpoint_dir_name=f"step-{step:07d}",
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._tracker.metrics(metrics, step=step)
        self._progress(step, self._steps, f"steps, loss {metrics['loss']:.3f}")


def _worker(arguments: dict[str, Any]) -> str | None:
    """One worker's loop; returns why the config or the data can't be trained with, if so.

    An error that is raised makes Ray start the workers again, which helps where a machine was lost
    and never where the config is wrong.
    """
    from pipeline.training import Sources, train

    config: TrainConfig = arguments["config"]
    inputs: dict[str, Input] = arguments["inputs"]
    # Asked for here, since this can be another machine than the stage's.
    sources = Sources(
        base=inputs["base"].folder,
        data=inputs["data"].folder / "train",
        start=inputs["start"].folder / "trained" if "start" in inputs else None,
    )
    context = RayContext(config.steps, arguments["progress"], arguments["run"])
    try:
        train(config, sources, context)
    except ValueError as error:
        return str(error)
    return None


def train_stage(ctx: StageContext, config: TrainConfig) -> dict[str, Any]:
    """Stage body; inputs `base`, `data` and, from the second stage on, `start`.

    Raises:
        TrainingRefused: the config or the data can't be trained with, or the loss diverged.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import FailureConfig

    run = ctx.run
    if config.batch_size < run.num_workers:
        raise TrainingRefused(
            f"train.batch_size = {config.batch_size} leaves some of {run.num_workers} workers "
            "without a conversation; raise it, or use fewer workers"
        )
    # Two branches of a workflow may take turns on the same workers: wait for them, don't fail.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(7 * 24 * 3600))
    data = ctx.inputs["data"]
    ctx.track.dataset(data.uri, "prepared conversations", data.outputs.get("digest", "")[:12])
    storage_path, name = ctx.train_storage
    trainer = TorchTrainer(
        _worker,  # type: ignore[arg-type]  # v2 hands the return value on
        train_loop_config={
            "config": config,
            "inputs": dict(ctx.inputs),
            "progress": ctx.progress_handle,
            "run": ctx.track.handle,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=run.num_workers,
            use_gpu=run.gpus_per_worker > 0,
            resources_per_worker={"CPU": run.cpus_per_worker, "GPU": run.gpus_per_worker},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage_path,
            failure_config=FailureConfig(max_failures=3, controller_failure_limit=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
        torch_config=TorchConfig(backend="nccl" if run.gpus_per_worker > 0 else "gloo"),
    )
    result: Any = trainer.fit()  # typed as the Result of Ray Train v1, which has no return_value
    if isinstance(result.return_value, str):
        raise TrainingRefused(result.return_value)
    if result.checkpoint is None or result.metrics is None:
        raise RuntimeError(f"Ray Train ended without a checkpoint; look into {storage_path}/{name}")
    with result.checkpoint.as_directory() as folder:
        shutil.copytree(Path(folder) / "trained", ctx.out / "trained")
    return {"plan": config.plan, "steps": config.steps, "loss": result.metrics["loss"]}
