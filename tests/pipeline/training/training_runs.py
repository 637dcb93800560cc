"""Small trainings without a launcher: the config, what notes their course, what they left."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline.training.config import DistillSettings, LoraSettings, TrainConfig
from pipeline.training.loop import Sources
from pipeline.training.torchrun import FolderContext
from tests.small import Small

LORA = LoraSettings(rank=4, alpha=8, dropout=0.1)
CONFIG = TrainConfig(
    plan="1:1/2,2:1/4",
    steps=6,
    batch_size=4,
    learning_rate=1e-2,
    lora=LORA,
    checkpoint_every=2,
    log_every=1,
)


class Plain(FolderContext):
    """A launcher without any framework, which keeps every checkpoint and can be struck down."""

    def __init__(self, folder: Path, rank: int = 0, world_size: int = 1, die_at: int = 0) -> None:
        super().__init__(folder, keep=10**6, rank=rank, world_size=world_size)
        self.die_at = die_at
        self.losses: dict[int, float] = {}

    def report(
        self,
        step: int,
        metrics: dict[str, float],
        write: Callable[[Path], None] | None,
        wait: bool = False,
    ) -> None:
        super().report(step, metrics, write, wait=True)
        if step == self.die_at:
            raise InterruptedError("the machine is removed")

    def log(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        self.losses[step] = metrics["loss"]


def sources(small: Small, start: Path | None = None) -> Sources:
    return Sources(base=small.base, data=small.prepared / "train", start=start)


def trained(folder: Path, step: int = CONFIG.steps) -> dict[str, torch.Tensor]:
    return load_file(folder / f"step-{step:07d}/trained/adapter/adapter_model.safetensors")


def worst_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def in_two_processes(script: str, *arguments: object) -> None:
    """Run `script` as a module under torchrun, with two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


DISTILL = DistillSettings(weight=0.7, temperature=2.0)


class Logged(Plain):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.metrics: list[dict[str, float]] = []

    def log(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        self.metrics.append(metrics)
