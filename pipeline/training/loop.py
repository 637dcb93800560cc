"""The training loop. It knows nothing of who launched it: a plain script, torchrun or Ray Train.

One call trains one stage of a curriculum: load the base, attach the stage's plan or peer, add or
continue the adapter, take optimizer steps, checkpoint on the way, and check at the end that exactly
the declared parameters moved. The loss of a step is the mean over all supervised tokens of the
global batch, so it depends neither on the number of workers, nor on micro-batches, nor on the
strategy (pipeline/training/strategy.py) by which workers share the model.
"""

import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText

import adsc
from adsc.attachment.kernels import best_attention, use_liger
from pipeline.data.conversations import IGNORED
from pipeline.training.adapters import (
    check_moved,
    checksums,
    prepare_trainable,
    read_trained,
    trained_parts,
)
from pipeline.training.batches import StepBatch, StepLoader, check_packing
from pipeline.training.checkpoints import Snapshot, read_moments, read_state
from pipeline.training.config import MOMENTS, TrainConfig
from pipeline.training.memory import checkpoint_activations, fitted_here
from pipeline.training.objective import Losses, Objective
from pipeline.training.plans import StepPlans
from pipeline.training.strategy import Strategy, strategy_for
from pipeline.training.throughput import Throughput, cost_of

NORMS = 50
"""Gradient norms that a new one is compared with."""
FEW = 20
"""With fewer norms than this there is nothing to compare with."""


class Diverged(ValueError):
    """The loss is no longer finite, or the gradient exploded; retrying won't help."""


class TrainContext(Protocol):
    """What the loop needs from its launcher."""

    rank: int
    world_size: int

    def latest(self) -> AbstractContextManager[Path | None]:
        """The newest checkpoint folder of this stage, if there is one."""

    def stream(self, load: Callable[[int], StepBatch], steps: range) -> Iterator[StepBatch]:
        """load(step) for each step in order, made ahead: see pipeline/training/feed.py."""

    def report(
        self,
        step: int,
        metrics: dict[str, float],
        write: Callable[[Path], None] | None,
        wait: bool = False,
    ) -> None:
        """Called by every rank at the same steps.

        Args:
            step: steps done.
            metrics: what belongs to the checkpoint.
            write: of rank 0 only: writes the checkpoint into an empty folder, from any thread and
                as often as needed; the context publishes the folder at once or not at all.
            wait: return only when the checkpoint would survive this process.
        """

    def log(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        """Called by rank 0 every few steps: step of steps is done."""

    def due(self) -> bool:
        """Whether this rank wants all ranks to check for preemption; cheap, after every step."""

    def leaving(self) -> Literal["stay", "save", "leave"]:
        """Called on all ranks when it is due on one: on preemption of the machine, write a
        checkpoint and continue, or write one and end."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a stage's inputs are, as local folders."""

    base: Path
    data: Path
    start: Path | None = None
    """Trained weights of the previous stage, or None; AdamW's moments are beside that folder."""
    model: Any = None
    """The base if the caller has loaded it as this config requires; it is changed in place."""


def train(config: TrainConfig, sources: Sources, context: TrainContext) -> bool:
    """Train one stage; the result is the last checkpoint that was reported.

    Returns:
        True when the stage is finished, False when it left early because it had to.

    Raises:
        Diverged: naming the step and the ids of its conversations.
        MovementError: a parameter moved that should not, or did not move and should.
        ValueError: nothing to train, or a start or checkpoint that doesn't fit.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        _let_segments_grow()
    strategy = strategy_for(config, device)
    load = StepLoader(
        data=sources.data,
        processor=sources.base,
        config=config,
        rank=context.rank,
        world_size=context.world_size,
        pictures_everywhere=context.world_size > 1
        and (bool(config.tune) or config.strategy == "zero3"),
    )
    steps = config.steps or load.steps
    if load.supervised == 0:
        raise ValueError(
            f"{sources.data} has no supervised token, so there is nothing to train or to distil "
            "on: prepare conversations with answers"
        )
    if config.memory == "auto":
        config = fitted_here(config, sources.base, steps, load.text_tokens, device)
        load = replace(load, config=config)
    objective, plans = _prepare(config, sources, strategy, device, steps)
    try:
        run = _Run(config, steps, context, strategy, load, objective, plans)
        return _train(run, sources)
    finally:
        objective.remove()  # the model may be the caller's


def _train(run: "_Run", sources: Sources) -> bool:
    config, context, strategy = run.config, run.context, run.strategy
    if sources.start is not None:
        _start_from(sources.start, config, strategy)
    run.before = checksums(strategy.parts())
    with context.latest() as folder:
        first = run.restore(folder) if folder is not None else 0
    _agree(first, context.world_size)
    strategy.model.train()
    return run.steps_from(first)


def _prepare(
    config: TrainConfig, sources: Sources, strategy: Strategy, device: torch.device, steps: int
) -> tuple[Objective, StepPlans]:
    """Load the base, attach the plan, add the adapter, put the objective in the place of its
    forward, and hand all of it to the strategy."""
    if config.distill is not None and not config.runs_with:
        raise ValueError(
            "train.distill without a plan or a peer: there is no compressed model to teach; set "
            "train.plan, or leave train.distill out"
        )
    config.check_teacher()  # of a plan that a search found, too
    model = sources.model
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    attention = best_attention(config.attention, device, dtype)
    with strategy.loading():
        model = model or AutoModelForImageTextToText.from_pretrained(
            sources.base, dtype=dtype, attn_implementation=attention
        )
    if config.packing:
        check_packing(model.config.model_type, attention)
    plans = StepPlans(config, model, steps)
    adsc.attach(model, plans.target)
    if config.kernels == "liger":
        use_liger(model)
    checkpoint_activations(model, config.activation_checkpointing)
    # Here, so that the adapter's initial values don't depend on how the base was loaded.
    torch.manual_seed(config.seed)
    trainable: Any = prepare_trainable(model, config.lora, config.tune)
    in_step = config.strategy == "zero3"
    objective = Objective(trainable, config.distill, device, in_step)
    objective.install(half=config.precision == "bf16", compiled=config.compile == "layers")
    groups = [
        [p for n, p in trainable.named_parameters() if p.requires_grad and (".lora_" in n) is lora]
        for lora in (True, False)
    ]
    try:
        strategy.prepare(trainable, [{"params": group} for group in groups if group])
    except BaseException:
        objective.remove()
        raise
    return objective, plans


def _agree(first: int, world_size: int) -> None:
    seen: list[Any] = [first]
    if world_size > 1:
        seen = [None] * world_size
        dist.all_gather_object(seen, first)
    if len(set(seen)) > 1:
        raise ValueError(
            f"the workers see checkpoints of different steps {seen}: give them one folder that "
            "all machines share"
        )


def _start_from(start: Path, config: TrainConfig, strategy: Strategy) -> None:
    own = {name for name, parameter, _ in strategy.parts() if parameter.requires_grad}
    moments = {}
    if config.carry_optimizer:
        file = start.parent / MOMENTS
        if not file.exists():
            raise ValueError(
                "train.carry_optimizer needs the optimizer of the previous stage, which saved "
                "none: set it there too"
            )
        moments = read_moments(file)
    strategy.restore(read_trained(start, own, config.lora), moments)


@dataclass
class _Run:
    config: TrainConfig
    steps: int
    context: TrainContext
    strategy: Strategy
    load: StepLoader
    objective: Objective
    plans: StepPlans
    before: dict[str, tuple[bool, float]] = field(default_factory=dict)
    """Checksums of all parameters before the stage's first step."""
    history: list[list[float]] = field(default_factory=list)
    """[step, loss] as logged so far; it travels in the checkpoints."""
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=NORMS))
    """The last gradient norms; they travel likewise."""

    def rates(self, step: int) -> dict[str, float]:
        """Learning rate of each group of parameters."""
        config, rates = self.config, {}
        factor = rate_factor(step, self.steps, config.warmup)
        if config.lora is not None:
            rates["learning_rate"] = factor * config.learning_rate
        if config.tune:
            name = "learning_rate_tuned" if rates else "learning_rate"
            rates[name] = factor * (config.tune_learning_rate or config.learning_rate)
        return rates

    def steps_from(self, first: int) -> bool:
        config, context = self.config, self.context
        started = time.monotonic()
        losses: list[np.ndarray] = []
        again = config.activation_checkpointing is True
        cost = cost_of(self.strategy.model, config.distill, checkpointing=again)
        teaching = self.objective.teaching
        throughput = Throughput(
            cost, teaching.device, context.world_size, teaching if config.distill else None
        )
        batches = context.stream(self.load, range(first, self.steps))
        for step in range(first, self.steps):
            checked_at = time.monotonic()
            batch = next(batches)
            waited = time.monotonic() - checked_at
            parts, norm, due = self.take_step(step, batch)
            losses.append(parts)
            if context.rank == 0:
                throughput.update(batch, self.plans(step), waited)
            done = step + 1
            if context.rank == 0 and (done % config.log_every == 0 or done == self.steps):
                mean = dict(zip(Losses._fields, np.mean(losses, axis=0).tolist(), strict=True))
                self.history.append([done, mean["loss"]])
                context.log(
                    done,
                    self.steps,
                    {
                        **(mean if config.distill is not None else {"loss": mean["loss"]}),
                        "gradient_norm": norm,
                        **self.rates(step),
                        **throughput.metrics(),
                    },
                )
                losses = []
            verdict = context.leaving() if due else "stay"
            metrics = {"loss": float(parts[0]), "seconds": time.monotonic() - started}
            if verdict != "stay" or done % config.checkpoint_every == 0 or done == self.steps:
                self.checkpoint(done, metrics, wait=verdict != "stay")
            if verdict == "leave" and done < self.steps:
                return False
        return True

    def take_step(self, step: int, batch: StepBatch) -> tuple[np.ndarray, float, bool]:
        """Losses (as `Losses` has them), gradient norm, and whether it is due to ask about
        leaving."""
        config, context, strategy = self.config, self.context, self.strategy
        # Dropout follows from (seed, step, rank), so that a checkpoint needs no generator's state.
        # torch takes seeds of 64 bits.
        torch.manual_seed(((config.seed * 1_000_003 + step) * 4096 + context.rank) % 2**64)
        if batch.supervised == 0:
            raise ValueError(
                f"step {step + 1}: none of its {config.batch_size} conversations has a supervised "
                f"token, such as {batch.ids[:3]}; raise train.batch_size or leave them out"
            )
        device, plan = self.objective.teaching.device, self.plans(step)
        own = torch.zeros(len(Losses._fields), device=device)
        for i, micro in enumerate(batch.micro):
            # Found here, where it makes nobody wait.
            places = np.flatnonzero(micro["labels"].numpy() != IGNORED)
            inputs = _on(device, micro | {"places": torch.from_numpy(places)})
            with strategy.micro_batch(last=i == len(batch.micro) - 1):
                # The objective makes calls of its own, each under its plan.
                with adsc.suspended(strategy.model):
                    made = strategy.model(**inputs, plan=plan, supervised=batch.supervised)
                strategy.backward(made["loss"])
            own += torch.stack([made[name].detach() for name in Losses._fields])
        seen = torch.cat([own, torch.full((1,), float(context.due()), device=device)])
        if context.world_size > 1:
            dist.all_reduce(seen)
        found = torch.as_tensor(strategy.step(list(self.rates(step).values())), device=device)
        # The one time in a step that the loop waits for the device.
        *losses, due, norm = torch.cat([seen, found.to(seen.dtype).view(1)]).tolist()
        total = losses[0]
        usual = statistics.median(self.norms) if len(self.norms) >= FEW else float("inf")
        if not (np.isfinite(total) and np.isfinite(norm)) or norm > config.diverged_norm * usual:
            ids = _blamed(own[0].item(), batch.ids, context.world_size)
            raise Diverged(
                f"step {step + 1}: loss {total}, gradient norm {norm:g} (usually {usual:g}); lower "
                f"train.learning_rate ({config.learning_rate:g}) or look at these records: {ids}"
            )
        self.norms.append(norm)
        return np.array(losses), norm, due > 0

    def checkpoint(self, step: int, metrics: dict[str, float], wait: bool) -> None:
        if step == self.steps:
            # Before the last checkpoint, so that a retry can't slip past it.
            check_moved(self.before, checksums(self.strategy.parts()))
        # All ranks take part in gathering what ZeRO has split.
        weights, moments = self.strategy.weights(), self.strategy.moments()
        if self.context.rank != 0:
            self.context.report(step, metrics, None, wait)
            return
        state = {
            "step": step,
            "conversations": step * self.config.batch_size,
            "seed": self.config.seed,
            "rates": self.rates(step - 1),
            "norms": list(self.norms),
            "strategy": self.config.strategy,
            "workers": self.context.world_size,
        }
        snapshot = Snapshot(
            state=state,
            history=[list(entry) for entry in self.history],
            trained=trained_parts(weights, self.config.lora),
            moments=moments,
        )
        self.context.report(step, metrics, snapshot.write, wait)

    def restore(self, folder: Path) -> int:
        """Take a checkpoint's state; returns the steps done."""
        state, self.history = read_state(folder)
        own = {name for name, parameter, _ in self.strategy.parts() if parameter.requires_grad}
        weights = read_trained(folder / "trained", own, self.config.lora, whole=True)
        self.strategy.restore(weights, read_moments(folder / MOMENTS))
        self.norms.extend(state["norms"])
        return int(state["step"])


def _on(device: torch.device, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the host on a device; a GPU copies from pinned memory while the host goes on."""
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    pinned = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in pinned.items()}


def _let_segments_grow() -> None:
    """Let CUDA's allocator grow its segments, since the lengths of batches change: less is lost to
    fragments. Somebody's own setting stays."""
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def _blamed(loss: float, ids: list[str], world_size: int) -> list[str]:
    """The conversations of the ranks whose own loss isn't finite, or else of all ranks."""
    parts: list[Any] = [(loss, ids)]
    if world_size > 1:
        parts = [None] * world_size
        dist.all_gather_object(parts, (loss, ids))
    blamed = [part for part in parts if not np.isfinite(part[0])] or parts
    return [one for _, part in blamed for one in part]


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """The learning rate as a share of its peak: a linear rise over `warmup`, a share of the steps,
    then half a cosine to zero.

    >>> [round(rate_factor(step, 10, 0.2), 2) for step in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.04]
    """
    rising = max(1, round(warmup * steps)) if warmup else 0
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
