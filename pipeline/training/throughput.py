"""What a training does per second: samples, tokens, FLOPs, and how much of that the device could.

FLOPs come from adsc's cost model (2 x MACs of every matmul, attention over all pairs), for the rows
that were trained, padding left out: padding shows as a lower rate. Of one step with a frozen base:

- forward: vision tower, projector, decoder with the plan's tokens, lm_head on the kept positions;
- backward: the gradient of activations through the decoder's linears and the lm_head, as much as
  their forward; attention twice its forward, since both factors of its products have gradients. No
  gradient of frozen weights, and none at all for a frozen tower and projector;
- the adapter's products: once forward, twice backward;
- parameters tuned in full: their weights' gradient, once more the forward of these parameters.

That is the work that training needs, and MFU is counted on it. Activation checkpointing runs the
decoder's forward again: with it, HFU counts that too. Kernels that compute attention scores again
on the way back (flash, sdpa) are not credited with that, nor peers with choosing. Nothing is
measured on the device here beyond time and memory, and a step costs an append.
"""

import re
import resource
import sys
import time
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn

from adsc.cost_error import CostError
from adsc.decoder_cost import Decoder
from adsc.method import Method
from adsc.plan import PruningPlan
from adsc.vision_cost import ImageInput, image_cost

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


class StepFlops(NamedTuple):
    """FLOPs of one step."""

    model: float
    """That training needs."""
    hardware: float
    """With what activation checkpointing computes again."""


class TrainingCost:
    """FLOPs of training steps, from shapes alone.

    Args:
        model: with its adapter, before or after it was wrapped or split; only names, sizes and what
            is trained are read.
        config: the model's, from transformers.
        plan: the pruning plan or the peer while training.
        checkpointing: whether the decoder's activations are computed again.

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
    ) -> None:
        text = config.get_text_config()  # type: ignore[attr-defined]
        decoder = Decoder.from_config(text)
        image = image_cost(config, ImageInput(size=None, images_in_row=1))
        self._plan, self._checkpointing = plan, checkpointing
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

    def vision_tokens(self, row: "RowShape") -> float:
        """Vision tokens of a row, averaged over the decoder's layers."""
        return float(np.mean(self._vision_per_layer(row))) if row.pictures else 0.0

    def _vision_per_layer(self, row: "RowShape") -> np.ndarray:
        each, rest = divmod(row.vision_tokens, row.pictures)
        if rest or each != self._image_tokens:
            raise CostError(
                f"{row.vision_tokens} vision tokens of {row.pictures} pictures: FLOPs are only "
                f"known where each has {self._image_tokens}"
            )
        return row.pictures * np.array(self._plan.tokens_per_layer(each, self.num_layers))

    def step(self, rows: "list[RowShape]") -> StepFlops:
        """FLOPs of forward and backward over these rows, each alone as if it were not padded."""
        texts: dict[RowShape, list[int]] = defaultdict(list)
        for row in rows:
            texts[row._replace(text_tokens=0)].append(row.text_tokens)
        needed = again = 0.0
        for kind, text in texts.items():
            vision = self._vision_per_layer(kind) if kind.pictures else np.zeros(self.num_layers)
            tokens = np.add.outer(np.array(text, dtype=float), vision)  # rows, layers
            linear, attention = tokens * self._linear, tokens**2 * self._square
            adapter = tokens * self._adapter
            logits = tokens[:, -1] * self._logits
            forward = (linear + attention + adapter).sum()
            needed += forward + (linear + 2 * attention + 2 * adapter).sum() + 2 * logits.sum()
            needed += (tokens * self._tuned).sum() + tokens[:, -1].sum() * self._tuned_head
            needed += len(text) * kind.pictures * self._picture
            again += forward if self._checkpointing else 0
        return StepFlops(needed, needed + again)


def cost_of(
    model: nn.Module, plan: PruningPlan | Method, *, checkpointing: bool
) -> TrainingCost | None:
    """The training cost of a model, however wrapped; None where it is not known."""
    configs = (getattr(module, "config", None) for module in model.modules())
    config = next((one for one in configs if hasattr(one, "get_text_config")), None)
    try:
        return TrainingCost(model, config, plan, checkpointing=checkpointing)
    except CostError:
        return None


class Throughput:
    """Rates over the steps since they were last asked for. `update` after each step.

    Args:
        cost: of this model; None where it is not known, and then there are no FLOPs.
        device: that trains.
        world_size: workers. Each is given like numbers of tokens, so this rank's stand for all.
    """

    def __init__(self, cost: TrainingCost | None, device: torch.device, world_size: int) -> None:
        self._cost, self._device, self._world_size = cost, device, world_size
        self._peak = peak_flops(device)
        self._rows: list[RowShape] = []
        self._text = self._vision = self._padding = 0
        self._waited, self._since = 0.0, time.monotonic()

    def update(self, batch: "StepBatch", waited: float = 0.0) -> None:
        """A step is done, before which the trainer waited so many seconds for its data."""
        self._rows += batch.rows
        self._text += batch.text_tokens
        self._vision += batch.vision_tokens
        self._padding += batch.padding
        self._waited += waited

    def metrics(self) -> dict[str, float]:
        """Rates since the last call, over all workers; a rate that isn't known is left out."""
        now, rows = time.monotonic(), self._rows
        seconds = now - self._since
        rate = self._world_size / seconds
        positions = self._text + self._vision + self._padding
        found = {
            "samples_per_second": len(rows) * rate,
            "text_tokens_per_second": self._text * rate,
            "vision_tokens_per_second": self._vision * rate,
            "padding_share": self._padding / max(1, positions),
            "data_wait_share": self._waited / seconds,
            "peak_memory_bytes": float(peak_memory(self._device)),
        }
        if self._cost is not None and rows:
            try:
                found |= self._flops(self._cost, rows, seconds)
            except CostError:  # pictures of other sizes than the model's own
                self._cost = None
        self._rows, self._text, self._vision, self._padding = [], 0, 0, 0
        self._waited, self._since = 0.0, now
        return found

    def _flops(
        self, cost: TrainingCost, rows: "list[RowShape]", seconds: float
    ) -> dict[str, float]:
        flops = cost.step(rows)
        found = {
            "average_vision_tokens": sum(map(cost.vision_tokens, rows)) / len(rows),
            "flops_per_second": flops.model * self._world_size / seconds,
        }
        if self._peak is not None:
            found["mfu"] = flops.model / seconds / self._peak
            found["hfu"] = flops.hardware / seconds / self._peak
        return found


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: the CUDA allocator's, on a CPU the process's resident ones."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
