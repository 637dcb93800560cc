"""Forecast of a compression before anything runs: GPU memory, GPU-hours, money.

Closed forms on a config: no weights are loaded. FLOPs come from the cost model and are exact up to
two assumptions of the caller, the length of the text and the achieved share of a GPU's peak. Memory
is pipeline/training/memory.py's estimate. The config is changed where it says so itself
(`memory = auto`), as training would change it on that GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

import adsc
from adsc.costs.geometries import HUB_IDS, geometry
from pipeline.packaged import resolve
from pipeline.training.adapters import prepare_trainable
from pipeline.training.batches import RowShape
from pipeline.training.config import TrainConfig
from pipeline.training.memory import Hardware, chosen, fitted, memory_bytes
from pipeline.training.plans import StepPlans
from pipeline.training.throughput import PEAKS, TrainingCost

HARDWARE = {
    "a100-40gb": Hardware(40, PEAKS["A100"]),
    "a100-80gb": Hardware(80, PEAKS["A100"]),
    "h100": Hardware(80, PEAKS["H100"]),
    "h200": Hardware(141, PEAKS["H200"]),
    "l40s": Hardware(48, PEAKS["L40S"]),
}
"""From the vendors' data sheets, for SXM if there is a choice."""


class Assumptions(NamedTuple):
    """Assumptions that the config does not contain."""

    gpu: str = "h100"
    """A key of HARDWARE."""
    workers: int = 1
    """GPUs, one per worker."""
    hfu: float = 0.4
    """Achieved share of the peak FLOP/s, including recomputed activations."""
    text_tokens: int = 200
    """Positions of a conversation that are not vision tokens, on average."""
    price: float | None = None
    """Price of a GPU-hour, in any currency."""

    @property
    def hardware(self) -> Hardware:
        """Raises ValueError: an unknown GPU, or a share outside (0, 1]."""
        if self.gpu not in HARDWARE:
            raise ValueError(f"GPU {self.gpu!r} is unknown; there are {', '.join(HARDWARE)}")
        if not 0 < self.hfu <= 1:
            raise ValueError(f"hfu = {self.hfu} is not a share of the peak, such as 0.4")
        return HARDWARE[self.gpu]


class StageForecast(NamedTuple):
    """One training stage."""

    name: str
    plan: str
    steps: int
    average_vision_tokens: float
    """Averaged over the decoder's layers, and over steps if these have different plans."""
    flops: float
    teacher_share: float
    """The teacher's share of the FLOPs computed."""
    gpu_hours: float
    memory_gib: float
    """Per GPU, with a micro-batch of conversations of average length."""
    chosen: str = ""
    """Micro-batch and checkpointing that `memory = auto` chooses."""


def model_config(source: str) -> Any | None:
    """The base's transformers config, from a folder or a known hub id; else None."""
    if source in HUB_IDS:
        return geometry(source)
    if (resolve(source) / "config.json").is_file():
        return AutoConfig.from_pretrained(resolve(source), local_files_only=True)
    return None


def forecast(
    model: Any,
    stages: Sequence[tuple[str, TrainConfig]],
    records: int | None,
    assumed: Assumptions,
) -> list[StageForecast]:
    """The forecast of each training stage.

    Args:
        model: the base's transformers config.
        stages: name and config of each.
        records: conversations in the training split; needed if a stage counts epochs.

    Raises:
        ValueError: an unknown GPU, a share outside (0, 1], epochs of an unknown number of records.
    """
    hardware = assumed.hardware
    rows = []
    prepared_for: dict[str, nn.Module] = {}
    for name, config in stages:
        key = f"{config.lora} {config.tune}"
        if key not in prepared_for:
            with torch.device("meta"):
                empty = AutoModelForImageTextToText.from_config(model)
                prepared_for[key] = prepare_trainable(empty, config.lora, config.tune)
        prepared = prepared_for[key]
        if config.steps is None and records is None:
            raise ValueError(
                f"{name} counts epochs of a data set whose size is unknown before it is prepared; "
                "set train.steps for a forecast"
            )
        steps = config.steps_for(records or 0)
        plans = StepPlans(config, prepared, steps)
        size = (assumed.workers, assumed.text_tokens)
        config = fitted(config, prepared, model, plans, hardware, *size)
        cost = TrainingCost(
            prepared,
            model,
            plans.target,
            checkpointing=config.activation_checkpointing is True,
            distill=config.distill,
        )
        dense = adsc.estimate_cost(model, "", assumed.text_tokens).per_layer[0].vision_tokens
        row = [RowShape(assumed.text_tokens, dense, 1)]
        # FLOPs per conversation, averaged over steps: of training, of the GPU, of the teacher.
        each = [(np.array(cost.under(plan).step(row)), share) for plan, share in plans.shares()]
        needed, computed, taught = np.sum([flops * share for flops, share in each], axis=0)
        conversations = config.batch_size * steps
        seconds = computed * conversations / (hardware.peak_flops * assumed.hfu)
        rows.append(
            StageForecast(
                name=name,
                plan=_written(config),
                steps=steps,
                average_vision_tokens=sum(
                    share * plan.average_tokens(dense, cost.num_layers)
                    for plan, share in plans.shares()
                ),
                flops=float(needed * conversations),
                teacher_share=float(taught / computed),
                gpu_hours=float(seconds / 3600),
                memory_gib=max(
                    sum(memory_bytes(prepared, model, config, plan, *size).values())
                    for plan, _ in plans.shares()
                )
                / 2**30,
                chosen=chosen(config) if config.memory else "",
            )
        )
    return rows


def _written(config: TrainConfig) -> str:
    if config.plans:
        return f"one of {', '.join(config.plans)} a step"
    return f"up to {config.plan}" if config.grow else config.runs_with
