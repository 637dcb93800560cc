"""Measured times and memory of methods on one model: prefill, decode, KV bytes, peak memory.

Methods take turns within each round, so that a machine's changing speed hits all alike. Counted
costs (FLOPs) are adsc.estimate_cost's, of the pictures that the batch holds; nothing here is
compared between runs.
"""

import ctypes
import gc
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import adsc
from adsc.families.family import Image
from adsc.families.table import find_family
from pipeline.evaluation.generation import generate_tokens

Size = tuple[int, int] | None
"""Height and width of a picture in pixels; None where the family's cost does not ask for them."""


class MeanCost(NamedTuple):
    """What a row of the batch costs by adsc.estimate_cost, mean over rows."""

    flops: int
    kv_cache_bytes: int
    tokens_per_layer: list[int]
    average_vision_tokens: float
    """Mean over layers of the vision tokens that enter each."""


def measure_and_count(
    model: Any, inputs: dict[str, torch.Tensor], methods: Sequence[Any], **rounds: int
) -> dict[str, Any]:
    """`measure`, each with the MeanCost of the same rows; and the prompts' shape."""
    measured = measure(model, inputs, methods, **rounds)
    rows = len(inputs["input_ids"])
    vision = int((inputs["input_ids"] == model.config.image_token_id).sum())
    text = round(float(inputs["attention_mask"].sum() - vision) / rows)
    pictures = pictures_of_rows(model, inputs)
    costs = [mean_cost(model.config, method, text, pictures) for method in methods]
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU"
    return {
        "batch": rows,
        "num_vision_tokens": round(vision / rows),
        "num_layers": model.config.get_text_config().num_hidden_layers,
        "text_tokens": text,
        "device": device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "dense": mean_cost(model.config, "", text, pictures),
        "methods": list(zip(measured, costs, strict=True)),
    }


def mean_cost(
    config: Any, method: Any, text_tokens: int, pictures: Sequence[Sequence[Size]]
) -> MeanCost:
    """Mean cost of rows with these pictures each and `text_tokens` other tokens.

    A row whose pictures differ in size is counted as the mean of rows that hold as many of each
    size: all is exact but attention between its pictures, which is counted a little too high.
    """
    shares: defaultdict[tuple[int, Size], Fraction] = defaultdict(Fraction)
    for row in pictures:
        for size in row or [None]:
            shares[len(row), size] += Fraction(1, max(1, len(row)) * len(pictures))
    costs = [
        adsc.estimate_cost(config, method, text_tokens, count, image_size=size)
        for count, size in shares
    ]

    def mean(values: Iterable[int]) -> Fraction:
        pairs = zip(shares.values(), values, strict=True)
        return sum((share * value for share, value in pairs), Fraction())

    layers = [
        mean(layer.vision_tokens for layer in same)
        for same in zip(*(cost.per_layer for cost in costs), strict=True)
    ]
    return MeanCost(
        flops=round(mean(cost.flops for cost in costs)),
        kv_cache_bytes=round(mean(cost.kv_cache_bytes for cost in costs)),
        tokens_per_layer=[round(tokens) for tokens in layers],
        average_vision_tokens=float(sum(layers) / len(layers)),
    )


def pictures_of_rows(model: Any, inputs: dict[str, torch.Tensor]) -> list[list[Size]]:
    """For each row its pictures as the model takes them: tiles where those are pictures to it."""
    found = find_family(model)[0].vision(model, inputs)
    if not found:
        return [[] for _ in inputs["input_ids"]]
    ((columns, images),) = found
    counts = columns.sum(dim=1).tolist()
    if isinstance(images, Image):  # all alike
        return [[None] * (count // images.tokens) for count in counts]
    sized = zip(images, _sizes(model.config, inputs, len(images)), strict=True)
    rows: list[list[Size]] = []
    for count in counts:
        rows.append([])
        while count > 0:
            image, size = next(sized)
            rows[-1].append(size)
            count -= image.tokens
    return rows


def _sizes(config: Any, inputs: dict[str, torch.Tensor], count: int) -> list[Size]:
    """What the processor tells of each picture's size."""
    if (sizes := inputs.get("image_sizes")) is not None:
        return [(height, width) for height, width in sizes.tolist()]
    if (grids := inputs.get("image_grid_thw")) is not None:
        patch = config.vision_config.patch_size
        return [(height * patch, width * patch) for _, height, width in grids.tolist()]
    return [None] * count


def measure(
    model: Any,
    inputs: dict[str, torch.Tensor],
    methods: Sequence[Any],
    rounds: int,
    decode_rounds: int,
    decode_tokens: int,
) -> list[dict[str, Any]]:
    """For each method (what adsc.attach takes): times of a batch, and its memory.

    Args:
        inputs: one batch of prompts, on the model's device.
        rounds: timed prefills of each method.
        decode_rounds: timed generations of `decode_tokens` tokens each, of which all but the first
            come from decode steps.

    Returns:
        prefill_ms and decode_tokens_per_s (median and quartiles over rounds), kv_measured_bytes
        (keys and values that the prefill of the batch leaves), peak_memory_bytes (the most that
        generating takes: of the process on a CPU, allocated on a GPU) and working_memory_bytes
        (the part of it that was not there before). Memory is None where the system doesn't tell.
    """
    prefills: list[list[float]] = [[] for _ in methods]
    rates: list[list[float]] = [[] for _ in methods]
    kv: list[int] = [0] * len(methods)
    memory: list[tuple[int, int] | None] = [None] * len(methods)
    batch = len(inputs["input_ids"])
    for turn in range(rounds + 1):  # the first round warms up
        for number, method in enumerate(methods):
            adsc.attach(model, method)
            seconds, kv[number] = _prefill(model, inputs)
            if turn:
                prefills[number].append(1000 * seconds)
    for turn in range(decode_rounds + 1):
        for number, method in enumerate(methods):
            adsc.attach(model, method)
            if not turn:
                memory[number] = _peak_memory(model, inputs, decode_tokens)
                continue
            rates[number].append(
                batch * (decode_tokens - 1) / _decode(model, inputs, decode_tokens)
            )
    adsc.detach(model)
    return [
        {
            "prefill_ms": _quartiles(times),
            "decode_tokens_per_s": _quartiles(speeds),
            "kv_measured_bytes": size,
            "peak_memory_bytes": peak and peak[0],
            "working_memory_bytes": peak and peak[1],
        }
        for times, speeds, size, peak in zip(prefills, rates, kv, memory, strict=True)
    ]


def _prefill(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[float, int]:
    """Seconds of one prefill, and bytes of its keys and values."""
    with torch.inference_mode():
        _synchronize(model)
        start = time.perf_counter()
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        _synchronize(model)
        seconds = time.perf_counter() - start
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return seconds, sum(tensor.nbytes for tensor in tensors)


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes the time after each token; stops nothing."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        _synchronize(self._model)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _decode(model: Any, inputs: dict[str, torch.Tensor], tokens: int) -> float:
    """Seconds from the first token to the last, all rows decoding to the end."""
    clock = _Clock(model)
    generate_tokens(
        model,
        inputs,
        tokens,
        min_new_tokens=tokens,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return clock.times[-1] - clock.times[0]


def _peak_memory(
    model: Any, inputs: dict[str, torch.Tensor], tokens: int
) -> tuple[int, int] | None:
    """Most bytes while generating, and how many more that is than before it."""
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _decode(model, inputs, tokens)
        most = torch.cuda.max_memory_allocated()
        return most, most - before
    if not _reset_peak():
        return None
    before = psutil.Process().memory_info().rss
    _decode(model, inputs, tokens)
    peak = _peak_of_process()
    return peak, max(0, peak - before)


def _reset_peak() -> bool:
    """Give freed memory back and start the process's high-water mark anew; Linux can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory, which would hide the peak
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return False
    return True


def _peak_of_process() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    median, low, high = np.quantile(values, [0.5, 0.25, 0.75])
    return {"median": float(median), "low": float(low), "high": float(high)}
