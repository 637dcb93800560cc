"""Stage `train`: one training stage of a curriculum as one Ray Train run.

The loop itself is in pipeline/training/loop.py and knows nothing of Ray. All attempts of a
stage share one Ray Train folder, so an attempt after a crash resumes from the last checkpoint.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.durable.progress import ProgressHandle
from pipeline.durable.stage import Input, StageContext
from pipeline.retry import every, retried
from pipeline.tracking import gauges
from pipeline.tracking.tracker import RunHandle, Tracker
from pipeline.training.config import MOMENTS, TrainConfig
from pipeline.training.feed import from_ray_data, from_thread

log = logging.getLogger(__name__)

ASK_SECONDS = 2.0
"""Seconds between two checks for preemption."""
WAIT_SECONDS, ELASTIC_SECONDS = 7 * 24 * 3600, 60
"""Seconds that a stage waits for its workers; with an elastic number, for more than the minimum."""
PATIENCE_SECONDS = 300.0
"""Seconds that a store may refuse a checkpoint before the workers are restarted."""


class TrainingRefused(ValueError):
    """Training can't succeed with this config or this data; a retry would not help."""


@dataclass(frozen=True)
class Anywhere:
    """A pipeline.training.batches.StepLoader for machines that may not have this one's folders."""

    load: Any
    inputs: dict[str, Input]

    @functools.cached_property
    def _here(self) -> Callable[[int], Any]:
        folders = {
            "data": self.inputs["data"].folder / "train",
            "processor": self.inputs["base"].folder,
        }
        return dataclasses.replace(self.load, **folders)  # type: ignore[no-any-return]

    def __call__(self, step: int) -> Any:
        return self._here(step)


class RayContext:
    """pipeline.training.loop.TrainContext inside a Ray Train worker."""

    def __init__(
        self,
        progress: ProgressHandle,
        run: RunHandle,
        inputs: dict[str, Input],
        data_workers: int = 0,
    ) -> None:
        import ray.train

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self._progress = progress
        self._inputs, self._data_workers = inputs, data_workers
        self._tracker = Tracker(run)
        self._note = "steps"
        self._one_write = threading.Semaphore()
        self._ask_at = time.monotonic()
        self._answered: set[str] = set()

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
        if self._data_workers:
            batches = from_ray_data(Anywhere(load, self._inputs), steps, self._data_workers)
        else:
            batches = from_thread(load, steps)
        for step, batch in zip(steps, batches, strict=True):
            if self.rank == 0:
                self._progress(step, steps.stop, self._note)
            yield batch

    def report(
        self,
        step: int,
        metrics: dict[str, float],
        write: Callable[[Path], None] | None,
        wait: bool = False,
    ) -> None:
        import ray.train

        checkpoint = None
        if write is not None:
            # At most one snapshot waits to be written: memory stays bounded where the store is
            # slower than training. Ray Train drops a report while workers are lost, hence a limit.
            self._one_write.acquire(timeout=2 * PATIENCE_SECONDS)
            scratch = tempfile.mkdtemp(prefix="adsc-checkpoint-")
            checkpoint = ray.train.Checkpoint(scratch)
        ray.train.report(
            {"step": step, **metrics},
            checkpoint=checkpoint,
            checkpoint_dir_name=f"step-{step:07d}",
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=functools.partial(self._upload, write) if write else None,
        )
        if wait:
            # Reported is not registered: without this a machine that goes now takes it along.
            ray.train.get_all_reported_checkpoints(
                consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED,
                timeout_s=PATIENCE_SECONDS,
            )

    def _upload(self, write: Callable[[Path], None], checkpoint: Any, name: str) -> Any:
        """In Ray Train's thread: write the snapshot and bring it to the store.

        Ray Train registers the folder afterwards; one that is half there is never resumed from,
        and is written over when its step is reached again.
        """
        import ray.train

        storage: Any = ray.train.get_context().get_storage()

        def stored() -> Any:
            write(Path(checkpoint.path))
            return storage.persist_current_checkpoint(checkpoint, name)

        try:
            return retried(
                stored,
                lambda error: isinstance(error, OSError),
                every(5.0, PATIENCE_SECONDS),
                lambda error: log.warning("can't store checkpoint %s, retrying: %s", name, error),
            )
        except OSError as error:
            raise OSError(
                f"checkpoint {name} could not be stored for {PATIENCE_SECONDS:.0f} s: {error}; "
                f"check free space and permissions at {storage.experiment_fs_path} and "
                f"{checkpoint.path}, then rerun: training resumes from the previous checkpoint"
            ) from error
        finally:
            self._one_write.release()

    def log(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        self._tracker.metrics(metrics, step=step)
        gauges.training(self._progress.stage, step, steps, metrics)
        self._note = f"steps, loss {metrics['loss']:.3f}"
        self._progress(step, steps, self._note)

    def close(self) -> None:
        """Send pending tracking data if MLflow answers."""
        self._tracker.close()

    def due(self) -> bool:
        """From time to time, on one rank: the check is a barrier of all workers, which costs."""
        if self.rank != 0 or time.monotonic() < self._ask_at:
            return False
        self._ask_at = time.monotonic() + ASK_SECONDS
        return True

    def leaving(self) -> Literal["stay", "save", "leave"]:
        """Whether Ray drains a node. Training continues until the node is gone; Ray Train
        then starts again from the checkpoint."""
        import ray.train

        info = ray.train.get_preemption_info()
        nodes = set(info.preempted_node_ids) if info is not None else set()
        if nodes <= self._answered:
            return "stay"
        self._answered |= nodes
        return "save"


def _worker(arguments: dict[str, Any]) -> str | None:
    """One worker's loop; returns the reason if the config or the data can't be trained with.

    An error that is raised makes Ray start the workers again, which helps where a machine was lost
    and never where the config is wrong.
    """
    import torch
    from ray.train.torch import get_device

    from pipeline.training.loop import Sources, train

    if torch.cuda.is_available():
        torch.cuda.set_device(get_device())
    config: TrainConfig = arguments["config"]
    inputs: dict[str, Input] = arguments["inputs"]
    # Imported here because this can be another machine than the stage's.
    sources = Sources(
        base=inputs["base"].folder,
        data=inputs["data"].folder / "train",
        start=inputs["start"].folder / "trained" if "start" in inputs else None,
    )
    context = RayContext(arguments["progress"], arguments["run"], inputs, arguments["data_workers"])
    try:
        train(config, sources, context)
    except ValueError as error:
        return str(error)
    finally:
        context.close()
    return None


def train_stage(ctx: StageContext, config: TrainConfig) -> dict[str, Any]:
    """Stage body; inputs `base`, `data` and, from the second stage on, `start`.

    Raises:
        TrainingRefused: the config or the data can't be trained with, or the loss diverged.
    """
    import ray.train
    from ray.train.v2.api.config import FailureConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from pipeline.stages.process_group import ProcessGroup

    run = ctx.run
    if config.batch_size < run.most_workers:
        raise TrainingRefused(
            f"train.batch_size = {config.batch_size} leaves some of {run.most_workers} workers "
            "without a conversation; raise it, or use fewer workers"
        )
    # Two branches of a workflow may take turns on the same workers: wait for them, don't fail.
    # With an elastic number, Ray Train waits so long for lost machines before it does with fewer.
    elastic = not isinstance(run.num_workers, int)
    seconds = ELASTIC_SECONDS if elastic else WAIT_SECONDS
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(seconds)
    data = ctx.inputs["data"]
    ctx.track.dataset(data.uri, "prepared conversations", data.outputs.get("digest", "")[:12])
    storage_path, name = ctx.train_storage
    trainer = DataParallelTrainer(
        _worker,  # type: ignore[arg-type]  # v2 hands the return value on
        train_loop_config={
            "config": config,
            "inputs": dict(ctx.inputs),
            "progress": ctx.progress_handle,
            "run": ctx.track.handle,
            "data_workers": run.data_workers,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=run.num_workers,  # type: ignore[arg-type]  # typed as that of Train v1
            use_gpu=run.gpus_per_worker > 0,
            resources_per_worker={"CPU": run.cpus_per_worker, "GPU": run.gpus_per_worker},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage_path,
            failure_config=FailureConfig(
                max_failures=3,
                # Too few workers count as the controller's failure: others may be using them.
                controller_failure_limit=WAIT_SECONDS // ELASTIC_SECONDS if elastic else 3,
                relax_collectives_on_preemption=True,
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.keep_checkpoints),
        ),
        backend_config=ProcessGroup(backend="nccl" if run.gpus_per_worker > 0 else "gloo"),
    )
    ctx.progress(0, 0, "starting workers")
    result: Any = trainer.fit()  # typed as the Result of Ray Train v1, which has no return_value
    if isinstance(result.return_value, str):
        raise TrainingRefused(result.return_value)
    if result.checkpoint is None or result.metrics is None:
        raise RuntimeError(
            f"Ray Train ended without a checkpoint; see its logs in {storage_path}/{name}"
        )
    with result.checkpoint.as_directory() as folder:
        shutil.copytree(Path(folder) / "trained", ctx.out / "trained")
        if config.carry_optimizer:
            shutil.copyfile(Path(folder) / MOMENTS, ctx.out / MOMENTS)
    metrics = result.metrics
    return {"plan": config.runs_with, "steps": metrics["step"], "loss": metrics["loss"]}
