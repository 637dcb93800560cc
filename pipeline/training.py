"""The training loop. It knows nothing of who launched it: a plain script, torchrun or Ray Train.

One call trains one stage of a curriculum: load the base, attach the stage's plan, add or continue
the adapter, take `steps` optimizer steps, checkpoint on the way, and check at the end that exactly
the declared parameters moved. The loss of a step is the mean over all supervised tokens of the
global batch, so it does not depend on the number of workers or on accumulation.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForImageTextToText

import adsc
from pipeline.adapters import (
    load_state,
    prepare_trainable,
    save_trained,
    trained_state,
)
from pipeline.batches import StepBatch, StepLoader
from pipeline.train_config import TrainConfig


class Diverged(ValueError):
    """Loss or gradient is no longer finite; retrying won't help."""


class MovementError(ValueError):
    """Other parameters moved than the config declares."""


class TrainContext(Protocol):
    """What the loop needs from its launcher."""

    rank: int
    world_size: int

    def latest(self) -> AbstractContextManager[Path | None]:
        """The newest checkpoint folder of this stage, if there is one."""

    def stream(self, load: Callable[[int], StepBatch], steps: range) -> Iterator[StepBatch]:
        """load(step) for each step in order, made ahead: see pipeline/feed.py."""

    def report(self, step: int, metrics: dict[str, float], checkpoint: Path | None) -> None:
        """Called by every rank at the same steps; rank 0 brings a folder."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Called by rank 0 every few steps."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a stage's inputs are, as local folders."""

    base: Path
    data: Path
    start: Path | None = None
    """Trained weights of the stage before, or None."""


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Warm-up, then half a cosine to zero."""
    warmup = max(1, round(config.warmup * config.steps)) if config.warmup else 0
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def train(config: TrainConfig, sources: Sources, context: TrainContext) -> None:
    """Train one stage; the result is the last checkpoint that was reported.

    Raises:
        Diverged: naming the step and the ids of its conversations.
        MovementError: a parameter moved that should not, or did not move and should.
    """
    unready = [
        name
        for name in ("strategy", "activation_checkpointing", "carry_optimizer")
        if getattr(config, name) != TrainConfig.model_fields[name].default
    ]
    if unready or config.steps is None:
        raise ValueError(f"train.{(unready or ['epochs'])[0]} is not offered yet: leave it out")
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(sources.base, dtype=dtype)
    adsc.attach(model, adsc.PruningPlan.parse(config.plan))
    trainable = prepare_trainable(model, config.lora, config.tune, sources.start).to(device)
    before = _checksums(trainable)
    optimizer = torch.optim.AdamW(
        [p for p in trainable.parameters() if p.requires_grad],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
    )
    first = 0
    history: list[list[float]] = []
    with context.latest() as folder:
        if folder is not None:
            first, history = _load_checkpoint(folder, trainable, optimizer)
    trainable.train()
    wrapped: nn.Module = trainable
    if context.world_size > 1:
        wrapped = DistributedDataParallel(trainable)
    load = StepLoader(
        data=sources.data,
        processor=sources.base,
        config=config,
        rank=context.rank,
        world_size=context.world_size,
        pictures_everywhere=context.world_size > 1 and bool(config.tune),
    )
    run = _Run(config, context, wrapped, optimizer, load, device, history, before)
    run.steps_from(first)


@dataclass
class _Run:
    config: TrainConfig
    context: TrainContext
    model: nn.Module
    optimizer: torch.optim.Optimizer
    load: StepLoader
    device: torch.device
    history: list[list[float]]
    """[step, loss] as logged so far; it travels in the checkpoints."""
    before: dict[str, tuple[bool, float]]
    """Checksums of all parameters before the stage's first step."""

    def steps_from(self, first: int) -> None:
        config, context = self.config, self.context
        started = mark = time.monotonic()
        waited, losses = 0.0, []
        batches = context.stream(self.load, range(first, config.steps))
        for step in range(first, config.steps):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            loss, norm = self.take_step(step, batch)
            losses.append(loss)
            done = step + 1
            if context.rank == 0 and (done % config.log_every == 0 or done == config.steps):
                now = time.monotonic()
                self.history.append([done, float(np.mean(losses))])
                context.log(
                    done,
                    {
                        "loss": float(np.mean(losses)),
                        "learning_rate": learning_rate_at(step, config),
                        "gradient_norm": norm,
                        "samples_per_second": len(losses) * config.batch_size / (now - mark),
                        "data_wait_share": waited / (now - mark),
                    },
                )
                mark, waited, losses = now, 0.0, []
            if done % config.checkpoint_every == 0 or done == config.steps:
                self.checkpoint(done, {"loss": loss, "seconds": time.monotonic() - started})

    def take_step(self, step: int, batch: StepBatch) -> tuple[float, float]:
        config, context = self.config, self.context
        # Dropout follows from (seed, step, rank), so that a checkpoint needs no generator's state.
        torch.manual_seed((config.seed * 1_000_003 + step) * 4096 + context.rank)
        rate = learning_rate_at(step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.device)
        for i, micro in enumerate(batch.micro):
            # DDP need only exchange gradients once a step.
            hold = isinstance(self.model, DistributedDataParallel) and i < len(batch.micro) - 1
            inputs = {name: tensor.to(self.device) for name, tensor in micro.items()}
            cast = torch.autocast(
                self.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"
            )
            with self.model.no_sync() if hold else nullcontext(), cast:  # type: ignore[operator]
                loss = self.model(
                    **inputs, num_items_in_batch=batch.supervised, use_cache=False
                ).loss
            # DDP averages over workers what is to be summed.
            (loss * context.world_size).backward()
            total += loss.detach()
        if context.world_size > 1:
            dist.all_reduce(total)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        if not (torch.isfinite(total) and torch.isfinite(norm)):
            raise Diverged(
                f"step {step + 1}: loss {total.item()}, gradient norm {norm.item()}; lower "
                f"train.learning_rate ({config.learning_rate:g}) or look at these records: "
                f"{batch.ids}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total.item(), norm.item()

    def checkpoint(self, step: int, metrics: dict[str, float]) -> None:
        if self.context.rank != 0:
            self.context.report(step, metrics, None)
            return
        model = getattr(self.model, "module", self.model)
        if step == self.config.steps:
            # Before the last checkpoint, so that a retry can't slip past it.
            _check_moved(self.before, _checksums(model))
        with tempfile.TemporaryDirectory(prefix="adsc-checkpoint-") as name:
            save_trained(model, Path(name) / "trained")
            (Path(name) / "trained" / "history.json").write_text(json.dumps(self.history))
            state = {
                "step": step,
                "history": self.history,
                "trainable": trained_state(model),
                "optimizer": self.optimizer.state_dict(),
            }
            torch.save(state, Path(name) / "state.pt")
            self.context.report(step, metrics, Path(name))


def _load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, list[list[float]]]:
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    load_state(model, state["trainable"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["history"]


def _checksums(model: nn.Module) -> dict[str, tuple[bool, float]]:
    """Per parameter: whether it is to move, and a number that changes when it does."""
    sums = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weights = torch.arange(1, parameter.numel() + 1, device=parameter.device) % 8191 + 1
            value = (parameter.flatten().double() * weights).sum().item()
            sums[name] = (parameter.requires_grad, value)
    return sums


def _check_moved(
    before: dict[str, tuple[bool, float]], after: dict[str, tuple[bool, float]]
) -> None:
    moved = {name for name, (_, was) in before.items() if after[name][1] != was}
    leaked = [name for name, (trained, _) in before.items() if not trained and name in moved]
    if leaked:
        raise MovementError(
            f"{len(leaked)} frozen parameters moved, such as {leaked[:3]}: a defect of the code"
        )
    still = [name for name, (trained, _) in before.items() if trained and name not in moved]
    # In a fresh adapter's first step B is zero, and so is the gradient of A.
    still = [name for name in still if ".lora_A." not in name]
    if still:
        raise MovementError(
            f"{len(still)} parameters were to be trained but did not move, such as {still[:3]}: "
            "the model does not use them; leave them out of train.tune or train.lora.targets"
        )
