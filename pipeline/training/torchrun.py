"""One training stage without Ray: as a plain process, or under torchrun on one or many machines.

    torchrun --nproc-per-node 2 -m pipeline.training.torchrun CONFIG.json \\
        --base DIR --data DIR --out DIR

CONFIG.json holds fields of TrainConfig; others keep their defaults. Checkpoints are written to
OUT, a folder that all machines share; rerun the same command to resume from the newest. The losses
equal those of the same stage in Ray Train. On SIGTERM (preemption, a scheduler's time limit) it
writes a checkpoint and exits with status 75, "try again"; it doesn't detect machines that die
without notice, which the pipeline does.
"""

import argparse
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Literal

import torch
import torch.distributed as dist

from pipeline.training.batches import StepBatch
from pipeline.training.config import TrainConfig
from pipeline.training.feed import from_processes, from_thread
from pipeline.training.loop import Sources, train

log = logging.getLogger(__name__)

TRY_AGAIN = 75
"""Exit status of a run that left because it had to (EX_TEMPFAIL)."""


class FolderContext:
    """pipeline.training.loop.TrainContext with checkpoints in a folder.

    Args:
        folder: one folder for each checkpoint comes here.
        keep: how many stay.
        rank: of this process.
        world_size: how many processes there are.
        data_workers: processes that make batches for this one; 0 makes them in a thread.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        rank: int = 0,
        world_size: int = 1,
        data_workers: int = 0,
    ) -> None:
        self.folder, self.keep, self.rank, self.world_size = folder, keep, rank, world_size
        self.data_workers = data_workers
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._leave_requested = threading.Event()

    def leave(self, number: int = 0, frame: FrameType | None = None) -> None:
        """Have training end after the current step; a signal's handler."""
        self._leave_requested.set()

    def close(self) -> None:
        """Wait for the last checkpoint; an error in writing it is raised here."""
        if self._writing is not None:
            self._writing.result()
        self._writer.shutdown()

    def checkpoints(self) -> list[Path]:
        """Finished checkpoints, the newest last."""
        return sorted(self.folder.glob("step-*"))

    @contextlib.contextmanager
    def latest(self) -> Iterator[Path | None]:
        yield max(self.checkpoints(), default=None)

    def stream(self, load: Callable[[int], StepBatch], steps: range) -> Iterator[StepBatch]:
        if self.data_workers:
            return from_processes(load, steps, self.data_workers)
        return from_thread(load, steps)

    def report(
        self,
        step: int,
        metrics: dict[str, float],
        write: Callable[[Path], None] | None,
        wait: bool = False,
    ) -> None:
        if write is None:
            return
        if self._writing is not None:
            self._writing.result()  # one snapshot at a time: memory stays bounded
        self._writing = self._writer.submit(self._publish, step, write)
        if wait:
            self._writing.result()

    def _publish(self, step: int, write: Callable[[Path], None]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / f".writing-{step:07d}"
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that died
        scratch.mkdir()
        write(scratch)
        target = self.folder / f"step-{step:07d}"
        if target.exists():  # written by a run that was continued from an older one
            target.rename(self.folder / f".writing-{step:07d}-old")
        scratch.rename(target)
        for old in (*self.folder.glob(".writing-*-old"), *self.checkpoints()[: -self.keep]):
            shutil.rmtree(old)

    def log(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        values = {name: round(value, 6) for name, value in metrics.items()}
        log.info("step %d of %d %s", step, steps, json.dumps(values))

    def due(self) -> bool:
        return self._leave_requested.is_set()

    def leaving(self) -> Literal["stay", "save", "leave"]:
        return "leave"


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pipeline.training.torchrun", description=__doc__.split("\n")[0]
    )
    parser.add_argument("config", type=Path, help="JSON with fields of TrainConfig")
    parser.add_argument("--base", type=Path, required=True, help="the checkpoint to train")
    parser.add_argument("--data", type=Path, required=True, help="one split of prepared data")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--start", type=Path, help="trained weights of the stage before")
    parser.add_argument(
        "--data-workers", type=int, default=0, help="processes that make batches for each rank"
    )
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """The command: 0 when the stage is finished, TRY_AGAIN when it had to leave."""
    arguments = _arguments(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    config = TrainConfig.model_validate_json(arguments.config.read_text())
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if size > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    context = FolderContext(
        arguments.out, config.keep_checkpoints, rank, size, arguments.data_workers
    )
    signal.signal(signal.SIGTERM, context.leave)
    sources = Sources(base=arguments.base, data=arguments.data, start=arguments.start)
    finished = train(config, sources, context)
    context.close()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0 and (newest := max(context.checkpoints(), default=None)):
        log.info("%s: %s", "finished" if finished else "left early", newest / "trained")
    return 0 if finished else TRY_AGAIN


if __name__ == "__main__":
    sys.exit(main())
