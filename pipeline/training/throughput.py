"""What a training does per second: samples, tokens, FLOPs, and how much of that the device could.

FLOPs come from adsc's cost model (2 x MACs of every matmul, attention over all pairs), for the rows
that were trained, padding left out: padding shows as a lower rate. Of one step with a frozen base:

- forward: vision tower, projector, decoder with the plan's tokens, lm_head on the supervised
  positions (where their number is not known, on all that are left);
- backward: the gradient of activations through the decoder's linears and the lm_head, as much as
  their forward; attention twice its forward, since both factors of its products have gradients. No
  gradient of frozen weights, and none at all for a frozen tower and projector;
- the adapter's products: once forward, twice backward;
- parameters tuned in full: their weights' gradient, once more the forward of these parameters;
- a teacher: a forward of all, with its plan's tokens.

That is the work that training needs, and MFU is counted on it. Activation checkpointing runs the
decoder's forward again, and beside a teacher logits are made twice: HFU counts that too. Kernels
that recompute attention scores in the backward pass (flash, sdpa) are not credited with that, nor
peers with choosing. Nothing is measured on the device here beyond time and memory, and a step costs
an append.
"""

import copy
import re
import resource
import sys
import time
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn

from adsc.costs.decoder import Decoder
from adsc.errors import CostError
from adsc.families.family import ImageInput
from adsc.families.table import image_cost
from adsc.method import Method
from adsc.plan import PruningPlan
from pipeline.training.config import DistillSettings, teacher_plan

if TYPE_CHECKING:
    from pipeline.training.batches import RowShape, StepBatch

# Dense bf16 rates of data sheets, FLOP/s, by a part of the device's name; the first that fits.
PEAKS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "GH200": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
}
_LAYER = re.compile(r"(?:language_model|text_model)\.(?:model\.)?layers\.(\d+)\.")


def peak_flops(device: torch.device) -> float | None:
    """The device's rate on its data sheet in FLOP/s, dense bf16; None if it is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # As a word: L4 is in L40S, too.
    return next((rate for part, rate in PEAKS.items() if re.search(rf"{part}(?!\w)", name)), None)


class Stopwatch:
    """Seconds that blocks of code take on a device, summed; a GPU is waited for only when they are
    read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds = 0.0
        self._marks: list[torch.cuda.Event] = []

    def __enter__(self) -> None:
        self._mark(1)

    def __exit__(self, *raised: object) -> None:
        self._mark(-1)

    def _mark(self, sign: int) -> None:
        if self.device.type == "cuda":
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._seconds -= sign * time.monotonic()

    def seconds(self) -> float:
        """Since the last call of this method; not inside a block."""
        if self._marks:
            self._marks[-1].synchronize()
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        found = self._seconds + sum(begin.elapsed_time(end) for begin, end in pairs) / 1000
        self._seconds, self._marks = 0.0, []
        return found


class StepFlops(NamedTuple):
    """FLOPs of one step."""

    model: float
    """That training needs."""
    hardware: float
    """With what is computed again to save memory."""
    teacher: float = 0.0
    """The teacher's part of the former."""


class TrainingCost:
    """FLOPs of training steps, from shapes alone.

    Args:
        model: with its adapter, before or after it was wrapped or split; only names, sizes and what
            is trained are read.
        config: the model's, from transformers.
        plan: the pruning plan or the peer while training.
        checkpointing: whether the decoder's activations are computed again.
        distill: what a teacher adds; None where there is none.

    Raises:
        CostError: a model whose FLOPs are not known.
    """

    def __init__(
        self,
        model: nn.Module,
        config: object,
        plan: PruningPlan | Method,
        *,
        checkpointing: bool = False,
        distill: DistillSettings | None = None,
    ) -> None:
        text = config.get_text_config()  # type: ignore[attr-defined]
        decoder = Decoder.from_config(text)
        image = image_cost(config, ImageInput(size=None, images_in_row=1))
        self._plan, self._checkpointing, self._distill = plan, checkpointing, distill
        self._image_tokens, self._tower = image.tokens, 2 * image.tower_macs
        self._projector = 2 * image.projector_macs
        self.num_layers = decoder.num_layers
        self._linear = 2 * decoder.layer_macs(1, 0)
        self._square = 2 * decoder.layer_macs(0, 1)
        self._logits = 2 * decoder.hidden * decoder.vocabulary
        self._adapter, self._tuned = np.zeros((2, self.num_layers))
        self._tuned_projector = self._tuned_head = self._tuned_tower = 0  # FLOPs for each token
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:  # of a parameter that ZeRO has split, the whole's shape
                self._count(name, getattr(parameter, "ds_shape", parameter.shape))
        self._picture = self._tower + self._projector
        if self._tuned_tower or self._tuned_projector:
            self._picture += self._projector + self._image_tokens * self._tuned_projector
        if self._tuned_tower:
            self._picture += 2 * self._tower

    def _count(self, name: str, shape: torch.Size) -> None:
        if len(shape) < 2:  # biases and norms have no matmul
            return
        size = 2 * int(np.prod(shape))
        if layer := _LAYER.search(name):
            (self._adapter if ".lora_" in name else self._tuned)[int(layer[1])] += size
        elif "lm_head" in name:
            self._tuned_head += size
        elif "projector" in name:
            self._tuned_projector += size
        elif "vision" in name:
            self._tuned_tower += size

    def under(self, plan: PruningPlan | Method) -> "TrainingCost":
        """The same training with another plan."""
        other = copy.copy(self)
        other._plan = plan
        return other

    def vision_tokens(self, row: "RowShape") -> float:
        """Vision tokens of a row, averaged over the decoder's layers."""
        return float(np.mean(self._vision_per_layer(row, self._plan))) if row.pictures else 0.0

    def _vision_per_layer(self, row: "RowShape", plan: PruningPlan | Method) -> np.ndarray:
        each, rest = divmod(row.vision_tokens, row.pictures)
        if rest or each != self._image_tokens:
            raise CostError(
                f"{row.vision_tokens} vision tokens of {row.pictures} pictures: FLOPs are only "
                f"known where each has {self._image_tokens}"
            )
        return row.pictures * np.array(plan.tokens_per_layer(each, self.num_layers))

    def step(self, rows: "list[RowShape]") -> StepFlops:
        """FLOPs of forward and backward over these rows, each alone as if it were not padded."""
        alike: dict[RowShape, list[RowShape]] = defaultdict(list)
        for row in rows:
            alike[row._replace(text_tokens=0, supervised=None)].append(row)
        needed = again = taught = 0.0
        for kind, those in alike.items():
            tokens = self._tokens(kind, those, self._plan)  # rows, layers
            linear, attention = tokens * self._linear, tokens**2 * self._square
            adapter = tokens * self._adapter
            given = zip(those, tokens[:, -1], strict=True)
            positions = sum(end if row.supervised is None else row.supervised for row, end in given)
            logits = positions * self._logits
            forward = (linear + attention + adapter).sum()
            needed += forward + (linear + 2 * attention + 2 * adapter).sum() + 2 * logits
            needed += (tokens * self._tuned).sum() + positions * self._tuned_head
            needed += len(those) * kind.pictures * self._picture
            again += forward if self._checkpointing else 0
            if self._distill is not None and self._plan.stages:
                taught += self._teacher(kind, those, self._distill) + logits
                again += 2 * logits
        needed += taught
        return StepFlops(needed, needed + again, taught)

    def _tokens(
        self, kind: "RowShape", rows: "list[RowShape]", plan: PruningPlan | Method
    ) -> np.ndarray:
        """(rows, layers) tokens of rows with as many pictures and vision tokens."""
        vision = np.zeros(self.num_layers)
        if kind.pictures:
            vision = self._vision_per_layer(kind, plan)
        return np.add.outer(np.array([row.text_tokens for row in rows], dtype=float), vision)

    def _teacher(self, kind: "RowShape", rows: "list[RowShape]", distill: DistillSettings) -> float:
        """A teacher's forward without its logits."""
        plan = teacher_plan(distill)
        tokens = self._tokens(kind, rows, plan)
        decoder = tokens * self._linear + tokens**2 * self._square
        if plan.stages:
            decoder = decoder + tokens * self._adapter
        pictures = len(rows) * kind.pictures * (self._tower + self._projector)
        return float(decoder.sum()) + pictures


def cost_of(
    model: nn.Module, distill: DistillSettings | None, *, checkpointing: bool
) -> TrainingCost | None:
    """The training cost of a model, however wrapped, without a plan; None where it is not known."""
    configs = (getattr(module, "config", None) for module in model.modules())
    config = next((one for one in configs if hasattr(one, "get_text_config")), None)
    try:
        return TrainingCost(
            model, config, PruningPlan(), checkpointing=checkpointing, distill=distill
        )
    except CostError:
        return None


class Throughput:
    """Rates over the steps since they were last read. `update` after each step.

    Args:
        cost: of this model, whatever its plan; None where it is not known: then there are no FLOPs.
        device: that trains.
        world_size: workers. Each is given like numbers of tokens, so this rank's stand for all.
        teaching: time that teachers take; None where there are none.
    """

    def __init__(
        self,
        cost: TrainingCost | None,
        device: torch.device,
        world_size: int,
        teaching: Stopwatch | None = None,
    ) -> None:
        self._cost, self._device, self._world_size = cost, device, world_size
        self._teaching = teaching
        self._peak = peak_flops(device)
        self._rows: list[tuple[PruningPlan | Method, list[RowShape]]] = []
        self._text = self._vision = self._padding = 0
        self._waited, self._since = 0.0, time.monotonic()

    def update(self, batch: "StepBatch", plan: PruningPlan | Method, waited: float = 0.0) -> None:
        """A step is done under a plan, before which the trainer waited so many seconds for its
        data."""
        self._rows.append((plan, batch.rows))
        self._text += batch.text_tokens
        self._vision += batch.vision_tokens
        self._padding += batch.padding
        self._waited += waited

    def metrics(self) -> dict[str, float]:
        """Rates since the last call, over all workers; a rate that isn't known is left out."""
        now, steps = time.monotonic(), self._rows
        rows = sum(len(each) for _, each in steps)
        seconds = now - self._since
        rate = self._world_size / seconds
        positions = self._text + self._vision + self._padding
        found = {
            "samples_per_second": rows * rate,
            "text_tokens_per_second": self._text * rate,
            "vision_tokens_per_second": self._vision * rate,
            "padding_share": self._padding / max(1, positions),
            "data_wait_share": self._waited / seconds,
            "step_seconds": seconds / max(1, len(steps)),
            "peak_memory_bytes": float(peak_memory(self._device)),
        }
        if self._teaching is not None:
            found["teacher_share"] = self._teaching.seconds() / seconds
        if self._cost is not None and rows:
            try:
                found |= self._flops(self._cost, steps, seconds)
            except CostError:  # pictures of other sizes than the model's own
                self._cost = None
        self._rows, self._text, self._vision, self._padding = [], 0, 0, 0
        self._waited, self._since = 0.0, now
        return found

    def _flops(
        self,
        cost: TrainingCost,
        steps: "list[tuple[PruningPlan | Method, list[RowShape]]]",
        seconds: float,
    ) -> dict[str, float]:
        each = [(cost.under(plan), rows) for plan, rows in steps]
        flops = [one.step(rows) for one, rows in each]
        model = sum(one.model for one in flops)
        averages = [one.vision_tokens(row) for one, rows in each for row in rows]
        found = {
            "average_vision_tokens": sum(averages) / len(averages),
            "flops_per_second": model * self._world_size / seconds,
        }
        if self._peak is not None:
            found["mfu"] = model / seconds / self._peak
            found["hfu"] = sum(one.hardware for one in flops) / seconds / self._peak
        return found


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: the CUDA allocator's, on a CPU the process's resident ones."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
