"""The pipeline's own training step on a GPU: compiled layers, Liger's kernels, a filled GPU,
self-distillation, and how often the host waits.

The adapter is fp32 over a bf16 base under autocast, the loss is the pipeline's objective. Each case
is a model of its own with its own optimizer, so cases are timed one after another: unlike most
ratios here, theirs are of times minutes apart. Parts of `benchmarks.gpu`; on a CPU they show that
they run.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import adsc
from adsc.attachment.kernels import use_liger
from benchmarks import capture, prefill, train
from benchmarks.agreement import GRADIENT_TOLERANCE, check, relative_error, skipped
from benchmarks.measure import Case, Row, take_turns
from benchmarks.models import batch, build, llava_config, plans, prompts, twin, vision_tokens
from pipeline.training.adapters import prepare_trainable
from pipeline.training.batches import RowShape
from pipeline.training.config import DistillSettings, LoraSettings, TrainConfig
from pipeline.training.memory import (
    Hardware,
    checkpoint_activations,
    chosen,
    fitted,
    memory_bytes,
)
from pipeline.training.objective import Objective
from pipeline.training.plans import StepPlans
from pipeline.training.throughput import PEAKS, TrainingCost, peak_flops

Change = Callable[[nn.Module], Any]
MILD = "4:1/2"
"""The milder teacher."""


def _config(options: argparse.Namespace, **changes: Any) -> TrainConfig:
    lora = LoraSettings(rank=options.rank, alpha=2 * options.rank)
    half = "bf16" if options.dtype == torch.bfloat16 else "fp32"
    return TrainConfig(
        **{"lora": lora, "precision": half, "batch_size": options.batch, "steps": 1} | changes
    )


class Step:
    """One optimizer step of a config, on equal rows.

    Args:
        model: the base, whose tensors are shared.
        config: of the training; its plan is attached to a twin of the model.
        inputs: a micro-batch.
    """

    def __init__(self, model: Any, config: TrainConfig, inputs: dict[str, Tensor]) -> None:
        own = twin(model)
        self.plans = StepPlans(config, own, 1)
        adsc.attach(own, self.plans.target)
        checkpoint_activations(own, config.activation_checkpointing)
        self.model = prepare_trainable(own, config.lora, config.tune).train()
        ids = inputs["input_ids"]
        self.objective = Objective(self.model, config.distill, ids.device, in_step=False)
        self.objective.install(half=config.precision == "bf16", compiled=config.compile == "layers")
        labels = ids.masked_fill(ids == own.config.image_token_id, -100)
        places = (labels != -100).flatten().nonzero().squeeze(1)
        self.inputs = inputs | {"labels": labels, "places": places}
        cuda = ids.device.type == "cuda"
        trained = [one for one in self.model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=cuda or None)

    def __call__(self) -> None:
        supervised = len(self.inputs["places"])
        with adsc.suspended(self.model):
            made = self.model(**self.inputs, plan=self.plans.target, supervised=supervised)
        made["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _seconds(step: Callable[[], Any], options: argparse.Namespace) -> float:
    """Median of the timed rounds; the first, which compiles, is not counted."""
    with _compiler(options.device):
        (times,) = take_turns([Case(name="", call=step)], options.rounds, options.device).values()
    return statistics.median(times)


def _compiler(device: torch.device) -> Any:
    """Without a GPU graphs are traced and run as they are."""
    if device.type == "cuda":
        return contextlib.nullcontext()
    return torch.compiler.set_stance("default", force_backend="eager")


def _hardware(device: torch.device) -> Hardware:
    if device.type != "cuda":
        return Hardware(1, 1e12)
    memory = torch.cuda.get_device_properties(device).total_memory
    return Hardware(memory / 2**30, peak_flops(device) or PEAKS["A100"])


def filled_rows(options: argparse.Namespace) -> list[Row]:
    """Compiled steps with the micro-batch and checkpointing that `memory = auto` chooses for this
    GPU: times of one row, MFU, and the memory that was forecast beside the peak."""
    geometry, hardware = llava_config(options.geometry), _hardware(options.device)
    model = build(geometry, options.device, options.dtype)
    full, rows = vision_tokens(geometry) + options.text, []
    dense: tuple[float, float] | None = None
    for name, plan in {"dense": "", **plans(geometry)}.items():
        config = _config(options, plan=str(plan), compile="layers", memory="auto")
        empty = prepare_trainable(twin(model), config.lora, config.tune)
        about = (StepPlans(config, empty, 1), hardware, 1, options.text)
        config = fitted(config, empty, geometry, *about)
        target, shape = (
            about[0].target,
            [RowShape(options.text, full - options.text, 1, options.text)],
        )
        wanted = memory_bytes(empty, geometry, config, target, 1, options.text)
        flops = TrainingCost(empty, geometry, target).step(shape).model
        del empty
        assert config.micro_tokens is not None
        count = min(options.batch, max(1, config.micro_tokens // full))
        inputs = prompts(geometry, count, options.text, options.device, options.dtype)
        step = Step(model, config, inputs)
        seconds = _seconds(step, options) / count
        peak = train.peak_bytes(step, options.device)
        dense = dense or (seconds, flops)
        ratio, bound = dense[0] / seconds, dense[1] / flops
        rows.append(
            {"case": name, "plan": str(plan), "chosen": chosen(config), "rows": count}
            | {"speed-up": ratio, "bound": bound, "share": ratio / bound}
            | {"ms a row": 1e3 * seconds, "MFU": flops / seconds / hardware.peak_flops}
            | {"forecast GB": sum(wanted.values()) / 1e9, "peak GB": peak and peak / 1e9}
        )
        del step
    return rows


def distilling_rows(options: argparse.Namespace) -> list[Row]:
    """A distilling step over a plain one of the same plan, beside the ratio of their FLOPs."""
    geometry = llava_config(options.geometry)
    model = build(geometry, options.device, options.dtype)
    inputs = prompts(geometry, options.batch, options.text, options.device, options.dtype)
    full = vision_tokens(geometry)
    rows = []
    for name, plan in plans(geometry).items():
        base = None
        for teacher in (None, "dense", MILD):
            distill = teacher and DistillSettings(teacher=teacher)
            config = _config(options, plan=str(plan), distill=distill, compile="layers")
            step = Step(model, config, inputs)
            cost = TrainingCost(step.model, geometry, step.plans.target, distill=config.distill)
            flops = cost.step([RowShape(options.text, full, 1, options.text)]).hardware
            seconds = _seconds(step, options)
            base = base or (seconds, flops)
            if teacher:
                rows.append(
                    {"case": name, "plan": str(plan), "teacher": teacher}
                    | {"over plain": seconds / base[0], "FLOPs over plain": flops / base[1]}
                    | {"ms": 1e3 * seconds}
                )
            del step
    return rows


def _agrees(what: str, change: Change, options: argparse.Namespace) -> list[Row]:
    """Loss and gradients after a change of the layers against those before, small and padded."""
    geometry = llava_config("tiny")
    model = build(geometry, options.device, options.dtype)
    size = (options.device, options.dtype)
    inputs = batch(geometry, [(5, 0, 20), (3, 0, 7, 0, 4), (12,)], *size, side="right")
    made = {}
    for name, plan in {"dense": "", "plan": "1:1/2,3:1/3", "pool": "2:1/4,6:0;pool=tiles"}.items():
        changed = train.with_adapters(twin(model, plan), 4)
        run = train.Training(changed, inputs, torch.optim.SGD([torch.zeros(1)]))
        made[name] = (run, _gradients(run))
    for run, _ in made.values():
        change(run.model)

    def error(name: str) -> Callable[[], float]:
        run, wanted = made[name]
        return lambda: relative_error(_gradients(run), wanted)

    tolerance = GRADIENT_TOLERANCE[options.dtype]
    return [check(what, name, tolerance, error(name)) for name in made]


def _gradients(run: train.Training) -> Tensor:
    torch.manual_seed(0)
    run.loss().backward()
    found = [one.grad.flatten().float() for one in run.model.parameters() if one.grad is not None]
    run.model.zero_grad()
    return torch.cat(found)


def compiled_rows(options: argparse.Namespace) -> list[Row]:
    """Compiled layers: equal to eager ones, and LoRA steps as `train.measure` has them."""
    with _compiler(options.device):
        checks = _agrees("compiled layers = eager", adsc.compile_layers, options)
        return [*checks, *train.measure(options, change=adsc.compile_layers)]


def liger_rows(options: argparse.Namespace) -> list[Row]:
    """The same for Liger's kernels."""
    if options.device.type != "cuda":
        return [skipped("Liger's kernels = torch's", "all", "no CUDA device")]
    try:
        checks = _agrees("Liger's kernels = torch's", use_liger, options)
    except adsc.UnsupportedModel as error:
        return [skipped("Liger's kernels = torch's", "all", str(error))]
    return [*checks, *train.measure(options, change=use_liger)]


def compiled_prefill_rows(options: argparse.Namespace) -> list[Row]:
    """Prefill into a cache through compiled layers, as `prefill.measure` has it."""
    with _compiler(options.device):
        return prefill.measure(options, overhead=False, change=adsc.compile_layers)


def waiting_rows(options: argparse.Namespace) -> list[Row]:
    """How often the host waits in a training step: as often for three drops as for one."""
    if options.device.type != "cuda":
        return [skipped("waits of a step", "all", "no CUDA device")]
    geometry = llava_config("tiny")
    model = build(geometry, options.device, options.dtype)
    inputs = prompts(geometry, 2, 20, options.device, options.dtype)
    waits = {
        name: capture.waits(Step(model, _config(options, plan=plan), inputs))
        for name, plan in {"dense": "", "one": "2:1/2", "three": "2:3/4,4:1/2,8:0"}.items()
    }

    def over(name: str, base: str) -> Callable[[], float]:
        return lambda: float(waits[name] - waits[base])

    what = "more waits of a step"
    return [
        *({"check": "waits of a step", "case": name, "waits": n} for name, n in waits.items()),
        check(what, "one drop over dense", 1.0, over("one", "dense")),
        check(what, "three drops over one", 0.0, over("three", "one")),
    ]
