"""What pooling adds to a prefill: schedules and means of pooled drops beside those of plain ones.

    python -m benchmarks.pooling                 # the geometry of benchmarks.prefill, a minute
    python -m benchmarks.pooling --json out.json

The whole prefill is the same but for two steps that pooling changes: working out the schedule of a
call, and making the hidden states at each drop. Both are timed alone, since one percent of a
prefill is below its noise; `added` is what a pooled plan spends in them beyond the plain plan, and
`share` is that over the pooled plan's own prefill. Goal: at most 1 %. `dense matrix` takes the same
means as a product with an averaging matrix, in place of the gather and sum.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import adsc
from adsc.attachment.attach import base_model
from adsc.dropping.call import Call, begin
from adsc.families.table import find_family
from benchmarks.measure import Case, Row, report, take_turns
from benchmarks.models import build, llava_config, parsed, parser, plans, prompts, twin
from benchmarks.prefill import prefill

REPEATS = 20  # of a step within one timed call: a step alone is near the clock's resolution


def steps(model: Any, inputs: dict[str, Tensor], hidden: Tensor) -> Call:
    """What a prefill spends on its drops: the schedule, then the states at each drop."""
    family, inner = find_family(base_model(model))
    with torch.inference_mode():
        call = begin(inner, family, adsc.plan_of(model), inputs)  # type: ignore[arg-type]
        states = hidden
        for drop in range(len(call.segments)):
            states = call.take(drop, states)
    return call


def by_matrix(call: Call, hidden: Tensor) -> Tensor:
    """The means of the first drop as a product with a dense averaging matrix, made beforehand."""
    (pooling,) = call.segments[0].pooling
    flat = hidden.flatten(0, 1)
    weights = call.once(("matrix",), lambda: _averaging(pooling, len(flat), hidden))
    return weights @ flat.float()


def _averaging(pooling: Any, tokens: int, hidden: Tensor) -> Tensor:
    groups = len(pooling.members)
    weights = torch.zeros(groups, tokens + 1, device=hidden.device)
    places = torch.where(pooling.members < 0, tokens, pooling.members)
    return weights.scatter_(1, places, 1.0)[:, :tokens] / pooling.sizes


def measure(options: argparse.Namespace) -> list[Row]:
    """A row for each plan with a pool; `options` as `main` reads them."""
    config = llava_config(options.geometry)
    model = build(config, options.device, options.dtype)
    inputs = prompts(config, options.batch, options.text, options.device, options.dtype)
    width = inputs["input_ids"].shape[1]
    size = (options.batch, width, config.text_config.hidden_size)
    hidden = torch.randn(size, device=options.device, dtype=options.dtype)
    each = (_rows(options, model, plan, inputs, hidden) for plan in plans(config).values())
    return [row for rows in each for row in rows]


def _rows(
    options: argparse.Namespace,
    model: Any,
    plan: adsc.PruningPlan,
    inputs: dict[str, Tensor],
    hidden: Tensor,
) -> list[Row]:
    pooled = [replace(plan, pool=pool) for pool in ("tiles", "runs")]
    models = {str(one): twin(model, one) for one in (plan, *pooled)}
    cases = [
        Case(name=name, call=lambda one=one: _times(steps, one, inputs, hidden))
        for name, one in models.items()
    ]
    last = models[str(pooled[0])]
    call, flat = steps(last, inputs, hidden), hidden.flatten(0, 1)
    left = flat.index_select(0, call.segments[0].take)
    cases += [
        Case(name="whole", call=lambda: prefill(last, inputs)),
        Case(name="sum", call=lambda: _times(call.segments[0].pooling[0].put, flat, left)),
        Case(name="matrix", call=lambda: _times(by_matrix, call, hidden)),
    ]
    times = take_turns(cases, options.rounds, options.device)
    seconds = {name: statistics.median(turns) for name, turns in times.items()}
    plain, rows = seconds[str(plan)] / REPEATS, []
    for one in pooled:
        added = seconds[str(one)] / REPEATS - plain
        rows.append(
            {"plan": str(one), "prefill ms": 1e3 * seconds["whole"], "plain ms": 1e3 * plain}
            | {"added ms": 1e3 * added, "share": added / seconds["whole"]}
            | {"sum ms": 1e3 * seconds["sum"] / REPEATS}
            | {"dense matrix ms": 1e3 * seconds["matrix"] / REPEATS}
        )
    return rows


def _times(step: Any, *what: Any) -> None:
    with torch.inference_mode():
        for _ in range(REPEATS):
            step(*what)


def main(arguments: list[str] | None = None) -> None:
    options = parsed(parser(__doc__, geometry_name="cpu", rows=1, rounds=5), arguments)
    report("pooling", vars(options), measure(options), options.device, options.json)


if __name__ == "__main__":
    main()
