"""The memory of a training step, and a micro-batch and a checkpointing that fit a GPU.

Closed forms on a config, no weights. An estimate (tests compare the part of a layer with what
autograd really saves), good enough to see what can't fit and to choose among what can. Nothing is
measured: workers with equal GPUs choose alike, and so does a resumed run.

Legend: d hidden width, m MLP width.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModelForImageTextToText

import adsc
from adsc.costs.decoder import Decoder
from adsc.method import Method
from adsc.plan import PruningPlan
from pipeline.training.adapters import prepare_trainable
from pipeline.training.batches import RowShape
from pipeline.training.config import Checkpointing, LoraSettings, TrainConfig
from pipeline.training.objective import CHUNK
from pipeline.training.plans import StepPlans
from pipeline.training.throughput import PEAKS, TrainingCost, peak_flops

log = logging.getLogger(__name__)

USABLE = 0.92
"""Share of a GPU's memory usable for training: the rest is the context and fragmentation."""
LAUNCHES = 0.14 / 32
"""Seconds that the host takes to launch the kernels of one decoder layer with adapters, forward and
backward: a floor of a micro-batch's time (docs/performance.md: 140 ms of 32 layers on an H100)."""
CHECKPOINTING: dict[Checkpointing, float] = {False: 1.0, "selective": 1.05, True: 1.0}
"""Kinds of checkpointing, and how much slower each is beside its matrix products: selective runs
through all activations once more."""
_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm.default: 1, _ATEN.addmm.default: 2}
"""Matrix products, and the place of their weight."""
_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
}


class Hardware(NamedTuple):
    """A GPU: its memory, and its peak in dense bf16 FLOP/s."""

    memory_gib: float
    peak_flops: float


def worth_keeping(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy of selective checkpointing: keep the results of attention and of the base's matrix
    products, and make again what is cheap: norms, activations, dropout, casts, and the adapters'
    second products, which add few terms for each number that would be kept."""
    if operator in _ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    if operator in _PRODUCTS:
        terms, columns = args[_PRODUCTS[operator]].shape
        if 4 * terms >= columns:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_activations(model: Any, how: Checkpointing) -> None:
    """Have a transformers model recompute the activations of its layers, if so."""
    if not how:
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, worth_keeping)
    # transformers before 5.23 knows the old name only.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)(settings)


def memory_bytes(
    trainable: nn.Module,
    model: Any,
    config: TrainConfig,
    plan: PruningPlan | Method,
    workers: int,
    text_tokens: int,
) -> dict[str, float]:
    """Memory of each GPU at the end of a forward pass, by kind, in bytes.

    Args:
        trainable: the base with its adapter; only names, sizes and what is trained are read.
        model: the base's transformers config.
        config: the training stage.
        plan: the plan of a step.
        workers: GPUs, one for each worker.
        text_tokens: positions of a conversation that are not vision tokens, on average.
    """

    def shards(stage: int) -> int:
        """Number of GPUs that share what ZeRO shards from `stage` on."""
        return workers if config.zero_stage >= stage else 1

    sizes = [
        (math.prod(getattr(p, "ds_shape", p.shape)), p.requires_grad)
        for p in trainable.parameters()
    ]
    trained = sum(size for size, moves in sizes if moves)
    frozen = sum(size for size, moves in sizes if not moves)
    width = 2 if config.precision == "bf16" else 4
    memory = {
        "base": width * frozen / shards(3),
        "trained": 4 * trained / shards(3),
        "gradients": 4 * trained / shards(2),
        "moments": 8 * trained / shards(1),
    }
    if config.offload.optimizer:
        memory["moments"] = 0.0
    if config.offload.parameters:
        memory["base"] = memory["trained"] = 0.0
    decoder = Decoder.from_config(model.get_text_config())
    cost = adsc.estimate_cost(model, plan, text_tokens)
    rows: float = math.ceil(config.batch_size / workers / config.accumulate)
    if config.micro_tokens is not None:
        full = cost.per_layer[0].vision_tokens + text_tokens
        rows = max(1, min(rows, config.micro_tokens / full))
    tokens = [rows * layer.tokens for layer in cost.per_layer]
    each = layer_bytes(decoder, config.lora) * width / 2
    if config.activation_checkpointing:
        # Each layer's input or what is kept of it, and all of the layer being computed again.
        left: float = width * decoder.hidden
        if config.activation_checkpointing == "selective":
            left += selective_bytes(decoder, config.lora) * width / 2
        memory["activations"] = left * sum(tokens) + each * max(tokens)
    else:
        memory["activations"] = each * sum(tokens)
    # Logits in the model's type, in fp32 for the loss, and their gradient; a teacher's in fp32.
    logits = min(decoder.vocabulary * tokens[-1], CHUNK)
    memory["logits"] = (width + 8) * logits
    if config.distill is not None and plan.stages:
        memory["logits"] += 8 * logits
        memory["teacher"] = width * decoder.hidden * rows * text_tokens
    return memory


def layer_bytes(decoder: Decoder, lora: LoraSettings | None) -> float:
    """Bytes that autograd saves per position of one decoder layer: with bf16 autocast, LoRA on all
    its linear layers, and an attention kernel that saves no scores.

    Counted from what a LLaMA layer saves: inputs and outputs of its matrix products in bf16, those
    of norms and activation in fp32; dropout saves a mask and its output for each input.
    """
    d, m, kv = decoder.hidden, decoder.mlp, decoder.kv_heads * decoder.head_dim
    kept = 30 * d + 6 * kv + 9 * m
    if lora is not None:
        kept += 14 * lora.rank + (24 * d + 4 * m if lora.dropout else 0)
    return kept


def selective_bytes(decoder: Decoder, lora: LoraSettings | None) -> float:
    """Bytes that selective checkpointing keeps per position of one decoder layer beside its input:
    in bf16 the results of the seven products, of attention, and of the adapter's first products."""
    d, m, kv = decoder.hidden, decoder.mlp, decoder.kv_heads * decoder.head_dim
    return 2 * (4 * d + 2 * kv + 2 * m) + (14 * lora.rank if lora is not None else 0)


def fitted(
    config: TrainConfig,
    trainable: nn.Module,
    model: Any,
    plans: StepPlans,
    hardware: Hardware,
    workers: int,
    text_tokens: int,
    long_text: int | None = None,
) -> TrainConfig:
    """The config with `memory = auto` made good: the micro-batch and the checkpointing by which a
    step should be fastest of those that fit; where none does, those that need least.

    A step's time is taken to be that of its FLOPs at 0.4 of the GPU's peak, what is computed again
    included, and no less than the kernels of its micro-batches take to launch. Of equal times the
    fewest micro-batches win.

    Args:
        config: of the training; returned as it is where `memory` is not `auto`.
        trainable: as `memory_bytes` takes it.
        model: the base's transformers config.
        plans: of the training's steps; the heaviest one must fit.
        hardware: of each worker.
        workers: GPUs.
        text_tokens: of a conversation, on average.
        long_text: of the longest conversations, which make up the largest micro-batches: text is
            never dropped. None: all are alike.
    """
    if config.memory != "auto":
        return config
    long_text = text_tokens if long_text is None else long_text

    def needed(tried: TrainConfig, plan: PruningPlan | Method) -> float:
        return sum(memory_bytes(trainable, model, tried, plan, workers, long_text).values())

    each = plans.shares()
    vision = adsc.estimate_cost(model, "", text_tokens).per_layer[0].vision_tokens
    one_row = config.model_copy(update={"micro_tokens": vision + text_tokens})
    heaviest = max((plan for plan, _ in each), key=partial(needed, one_row))
    room = USABLE * hardware.memory_gib * 2**30
    row = [RowShape(text_tokens, vision, 1)]
    most = math.ceil(config.batch_size / workers)
    found = []
    for checkpointing, slower in CHECKPOINTING.items():
        if config.compile and checkpointing == "selective":
            continue
        again = checkpointing is True
        cost = TrainingCost(
            trainable, model, plans.target, checkpointing=again, distill=config.distill
        )
        flops = sum(share * cost.under(plan).step(row).hardware for plan, share in each)
        computing = slower * most * flops / (0.4 * hardware.peak_flops)
        launching = LAUNCHES * cost.num_layers * (4 / 3 if checkpointing else 1)
        for count in sorted({math.ceil(most / rows) for rows in range(1, most + 1)}):
            tried = config.model_copy(
                update={
                    "accumulate": 1,
                    "micro_tokens": math.ceil(most / count) * (vision + text_tokens),
                    "activation_checkpointing": checkpointing,
                }
            )
            memory = needed(tried, heaviest)
            seconds = max(computing, count * launching)
            fits = memory <= room
            found.append(((not fits, seconds if fits else memory, count), tried))
    return min(found, key=lambda one: one[0])[1]


def chosen(config: TrainConfig) -> str:
    """What `fitted` chose, in a config's words."""
    checkpointing = str(config.activation_checkpointing).lower()
    return f"micro_tokens = {config.micro_tokens}, activation_checkpointing = {checkpointing}"


def fitted_here(
    config: TrainConfig,
    base: Path,
    steps: int,
    text_tokens: tuple[int, int],
    device: torch.device,
) -> TrainConfig:
    """`fitted` to the smallest of the workers' GPUs; every worker calls it. On a CPU the config as
    it is.

    Args:
        config: of the training, with `memory = auto`.
        base: folder of the base.
        steps: of the training.
        text_tokens: of a conversation, on average and of the longest.
        device: of this worker.
    """
    if device.type != "cuda":
        return config
    room = torch.tensor(torch.cuda.get_device_properties(device).total_memory, device=device)
    workers = dist.get_world_size() if dist.is_initialized() else 1
    if workers > 1:
        dist.all_reduce(room, dist.ReduceOp.MIN)
    hardware = Hardware(room.item() / 2**30, peak_flops(device) or PEAKS["A100"])
    model = AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(model)
        trainable = prepare_trainable(empty, config.lora, config.tune)
    plans = StepPlans(config, trainable, steps)
    found = fitted(config, trainable, model, plans, hardware, workers, *text_tokens)
    log.info("train.memory = auto: %s for %.0f GiB", chosen(found), hardware.memory_gib)
    return found
