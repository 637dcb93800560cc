"""Decoding with a plan: tokens a second and KV bytes, dense and plan, at several batch sizes.

    python -m benchmarks.decode                  # batch 1 and 32, minutes on two cores
    python -m benchmarks.decode --json out.json

Each case decodes greedily on a cache that its own prefill filled, and the cache is set back after
each turn. KV bytes are read from the cache's tensors after the prefill; a static cache's include
its room for the new tokens.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import adsc
from benchmarks.measure import Case, Row, report, speedup, take_turns
from benchmarks.models import (
    build,
    llava_config,
    parsed,
    parser,
    plans,
    prompts,
    twin,
    vision_tokens,
)


def new_cache(model: Any, columns: int, *, static: bool) -> DynamicCache | StaticCache:
    """An empty cache for prompts of one image; a static one for `columns` of a conversation."""
    config = model.config.get_text_config()
    if not static:
        return DynamicCache(config=config)
    if adsc.plan_of(model) is None:
        return StaticCache(config, max_cache_len=columns)
    return adsc.static_cache(model, columns, [vision_tokens(model.config)])


def kv_bytes(cache: Any) -> int:
    """Bytes of all tensors of keys and values."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Decoding:
    """A prompt in a cache, and the tokens that follow it, again and again.

    Args:
        model: with or without a plan.
        inputs: the prompt.
        steps: tokens of one turn.
        static: whether the cache is a static one, sized layer by layer where there is a plan.
        compiled: arguments of torch.compile for the step; None: it is not compiled.
    """

    def __init__(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        steps: int,
        *,
        static: bool = False,
        compiled: dict[str, Any] | None = None,
    ):
        rows, width = inputs["input_ids"].shape
        self.model, self.inputs, self.steps = model, inputs, steps
        self.step = model if compiled is None else torch.compile(model, **compiled)
        self.cache = new_cache(model, width + steps, static=static)
        numbers = torch.arange(width, width + steps, device=inputs["input_ids"].device)
        self.positions = [number.repeat(rows, 1) for number in numbers]
        self.decoded = False
        self._fill()
        self.kv_bytes = kv_bytes(self.cache)

    @torch.no_grad()
    def _fill(self) -> None:
        output = self.model(**self.inputs, past_key_values=self.cache, logits_to_keep=1)
        self.first = output.logits[:, -1:].argmax(-1)

    def set_back(self) -> None:
        """Make the cache hold the prompt and nothing else."""
        if not self.decoded:
            return
        if isinstance(self.cache, StaticCache):
            self.cache.reset()
            self._fill()
        else:
            self.cache.crop(-self.steps)
        self.decoded = False

    @torch.no_grad()
    def decode(self) -> list[Tensor]:
        """Logits (rows, vocabulary) of each of `steps` steps; call `set_back` before the next."""
        token, logits = self.first, []
        for position in self.positions:
            torch.compiler.cudagraph_mark_step_begin()
            output = self.step(
                input_ids=token, position_ids=position, past_key_values=self.cache, use_cache=True
            )
            logits.append(output.logits[:, -1].clone())  # the next step may write over it
            token = logits[-1].argmax(-1, keepdim=True)
        self.decoded = True
        return logits


def rows_of(
    times: dict[str, list[float]], runs: dict[str, Decoding], chosen: dict[str, adsc.PruningPlan]
) -> list[Row]:
    """Speed, tokens a second and KV bytes of each case."""
    rows = []
    for name, run in runs.items():
        batch = len(run.first)
        seconds = statistics.median(times[name])
        rows.append(
            {"batch": batch, "case": name, "plan": str(chosen.get(name, ""))}
            | speedup(times, name)
            | {"tokens/s": batch * run.steps / seconds, "KV MB": run.kv_bytes / 1e6}
            | {"KV share": run.kv_bytes / runs["dense"].kv_bytes}
        )
    return rows


def measure(options: argparse.Namespace, batch: int, *, static: bool = False) -> list[Row]:
    """A row for each plan at one batch size; `options` as `main` reads them."""
    config = llava_config(options.geometry)
    model = build(config, options.device, options.dtype)
    inputs = prompts(config, batch, options.text, options.device, options.dtype)
    chosen = plans(config)
    models = {"dense": model} | {name: twin(model, plan) for name, plan in chosen.items()}
    runs = {
        name: Decoding(one, inputs, options.steps, static=static) for name, one in models.items()
    }
    cases = [Case(name=name, call=run.decode, prepare=run.set_back) for name, run in runs.items()]
    times = take_turns(cases, options.rounds, options.device, warm=False)
    return rows_of(times, runs, chosen)


def main(arguments: list[str] | None = None) -> None:
    made = parser(__doc__, geometry_name="cpu-narrow", rows=1, rounds=5)
    made.set_defaults(batch=[1, 32])
    made.add_argument("--batches", dest="batch", type=int, nargs="+", help="batch sizes")
    made.add_argument("--steps", type=int, default=16, help="tokens of a turn")
    made.add_argument("--static", action="store_true", help="static caches")
    options = parsed(made, arguments)
    rows = [row for size in options.batch for row in measure(options, size, static=options.static)]
    report("decode", vars(options), rows, options.device, options.json)


if __name__ == "__main__":
    main()
