"""A LoRA training step with a plan over one without: speed, FLOPs and memory.

    python -m benchmarks.train_step              # a small geometry, minutes on two cores
    python -m benchmarks.train_step --json out.json

A step is forward, backward and AdamW on the adapters of all decoder linears; the base is frozen.
`bound` is the ratio of the FLOPs that torch counts in a real step without recomputation, so `MFU`
counts no work twice. `saved MB` is what the forward pass keeps for the backward pass beside
parameters, each storage once; `peak MB` is the CUDA allocator's, model and optimizer included.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.measure import Case, Row, peak_flops, report, speedup, take_turns
from benchmarks.models import build, llava_config, parsed, parser, plans, prompts, twin

TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
_ATEN = torch.ops.aten


def _cpu_forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# The counter knows the CUDA attention kernels, but not the CPU's, which do the same work.
_CPU_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _cpu_forward,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_backward,
}


class Training:
    """A model with adapters and one batch, to be stepped on.

    Args:
        model: a peft model, with or without a plan.
        inputs: the batch; all words are labels.
        optimizer: of the adapters, which twins share.
    """

    def __init__(self, model: Any, inputs: dict[str, Tensor], optimizer: torch.optim.Optimizer):
        self.model, self.optimizer = model, optimizer
        ids = inputs["input_ids"]
        labels = ids.masked_fill(ids == model.config.image_token_id, -100)
        self.inputs = inputs | {"labels": labels}

    def loss(self) -> Tensor:
        """The loss of the batch."""
        return self.model(**self.inputs, use_cache=False).loss

    def step(self) -> None:
        """Forward, backward, update."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def saved_bytes(self) -> int:
        """Bytes that a forward pass keeps for its backward pass, parameters left out."""
        parameters = {one.untyped_storage().data_ptr() for one in self.model.parameters()}
        kept: dict[int, tuple[int, Tensor]] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = (
                    storage.nbytes(),
                    tensor,
                )  # alive, so no address is reused
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.loss()
        return sum(size for size, _ in kept.values())

    def flops(self) -> int:
        """FLOPs of a forward and backward pass as torch counts them."""
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
            self.loss().backward()
        self.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops()


def with_adapters(model: nn.Module, rank: int) -> Any:
    """The model with LoRA on every linear of its decoder, in the model's own dtype."""
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
    return get_peft_model(model, lora, autocast_adapter_dtype=False).train()


def peak_bytes(run: Training, device: torch.device) -> int | None:
    """The most that the CUDA allocator held during a step; None elsewhere."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    run.step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def measure(options: argparse.Namespace, *, checkpointing: bool = False) -> list[Row]:
    """A row for each plan; `options` as `main` reads them."""
    config = llava_config(options.geometry)
    model = with_adapters(build(config, options.device, options.dtype), options.rank)
    chosen = plans(config)
    models = {"dense": model} | {name: twin(model, plan) for name, plan in chosen.items()}
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    size = (options.text, options.device, options.dtype)
    flops = {
        name: options.batch * Training(one, prompts(config, 1, *size), optimizer).flops()
        for name, one in models.items()
    }
    if checkpointing:
        for one in models.values():
            one.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = prompts(config, options.batch, *size)
    runs = {name: Training(one, inputs, optimizer) for name, one in models.items()}
    cases = [Case(name=name, call=run.step) for name, run in runs.items()]
    times = take_turns(cases, options.rounds, options.device, warm=False)
    peak = peak_flops(options.device)

    rows = []
    for name, run in runs.items():
        seconds = statistics.median(times[name])
        ratio, bound = speedup(times, name), flops["dense"] / flops[name]
        held = peak_bytes(run, options.device)
        rows.append(
            {"case": name, "plan": str(chosen.get(name, ""))}
            | ratio
            | {"bound": bound, "share": ratio["speed-up"] / bound, "ms": 1e3 * seconds}
            | {"TFLOP/s": flops[name] / seconds / 1e12}
            | {"MFU": flops[name] / seconds / peak if peak else None}
            | {"saved MB": run.saved_bytes() / 1e6}
            | {"peak MB": held / 1e6 if held else None}
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__, geometry_name="cpu-narrow", rows=2, rounds=7)
    made.add_argument("--rank", type=int, default=16, help="of the adapters")
    made.add_argument("--checkpointing", action="store_true", help="recompute each layer")
    options = parsed(made, arguments)
    rows = measure(options, checkpointing=options.checkpointing)
    report("train_step", vars(options), rows, options.device, options.json)


if __name__ == "__main__":
    main()
