"""Prefill with a plan over prefill without, beside the ratio that the FLOPs allow; CPU or GPU.

    python -m benchmarks.prefill                 # a small geometry, minutes on two cores
    python -m benchmarks.prefill --json out.json

`bound` is dense FLOPs over the plan's by `adsc.estimate_cost`, tower and lm_head included; `share`
is how much of it the clock shows. Two rows are no plan of use: `dense again` is the same model
once more, so its range is the noise, and `hooks only` runs all hooks and drops nothing.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import adsc
from benchmarks.measure import Case, Row, report, speedup, take_turns
from benchmarks.models import build, llava_config, parsed, parser, plans, prompts, twin


def prefill(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """What `generate` does first: the whole prompt into a new cache, logits of the last column."""
    with torch.inference_mode():
        return model(**inputs, use_cache=True, logits_to_keep=1)


def overhead_plans(layers: int) -> dict[str, adsc.PruningPlan | None]:
    """What drops nothing: the model itself, an empty plan, and hooks that keep every token."""
    return {
        "dense again": None,
        "empty plan": adsc.PruningPlan(),
        "hooks only": adsc.PruningPlan(stages=((1, 1), (layers // 2, 1))),
    }


def measure(
    options: argparse.Namespace,
    *,
    budgets: bool = True,
    overhead: bool = True,
    change: Callable[[nn.Module], Any] | None = None,
) -> list[Row]:
    """A row for each plan; `options` as `main` reads them.

    Args:
        budgets: whether plans are measured.
        overhead: whether what drops nothing is.
        change: what is done to each model before it is timed.
    """
    config = llava_config(options.geometry)
    model = build(config, options.device, options.dtype)
    inputs = prompts(config, options.batch, options.text, options.device, options.dtype)
    chosen = overhead_plans(config.text_config.num_hidden_layers) if overhead else {}
    chosen |= plans(config) if budgets else {}
    models = {"dense": model} | {name: twin(model, plan) for name, plan in chosen.items()}
    for one in models.values() if change else ():
        change(one)
    cases = [
        Case(name=name, call=lambda one=one: prefill(one, inputs)) for name, one in models.items()
    ]
    times = take_turns(cases, options.rounds, options.device)

    size = {"text_tokens": options.text, "batch_size": options.batch}
    dense, rows = adsc.estimate_cost(config, None, **size), []
    for name in models:
        plan = chosen.get(name) or adsc.PruningPlan()
        cost = adsc.estimate_cost(config, plan, **size)
        seconds = statistics.median(times[name])
        ratio, bound = speedup(times, name), dense.flops / cost.flops
        rows.append(
            {"case": name, "plan": str(plan)}
            | ratio
            | {"bound": bound, "share": ratio["speed-up"] / bound}
            | {"ms": 1e3 * seconds, "TFLOP/s": cost.flops / seconds / 1e12}
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    options = parsed(parser(__doc__, geometry_name="cpu", rows=1, rounds=9), arguments)
    report("prefill", vars(options), measure(options), options.device, options.json)


if __name__ == "__main__":
    main()
