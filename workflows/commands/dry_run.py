"""`adsc run --dry-run`: what a compression costs at run time, and what its training takes.

The forecast's assumptions are printed with it; see pipeline/forecast.py for its formulas.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workflows.commands import terminal

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.forecast import Assumptions, StageForecast
    from pipeline.training.config import TrainConfig


def add_options(run: argparse.ArgumentParser) -> None:
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="only print stages, plans, costs, GPU-hours and memory",
    )
    group = run.add_argument_group("assumptions of --dry-run")
    group.add_argument("--gpu-type", metavar="GPU", help="h100 (default), h200, a100-80gb, ...")
    group.add_argument(
        "--gpu-price",
        type=terminal.number(float, least=0),
        help="price of a GPU-hour, in any currency",
    )
    group.add_argument(
        "--hfu",
        type=terminal.number(float, above=0, most=1),
        help="achieved share of the GPU's peak FLOP/s (0.4)",
    )
    group.add_argument(
        "--text-tokens",
        type=terminal.number(int, least=0),
        help="text tokens in an average conversation (200)",
    )


def show(console: Console, config: Any, options: argparse.Namespace) -> int:
    """Print both tables; returns 1 if a training stage doesn't fit in a GPU's memory."""
    from pipeline.forecast import Assumptions, forecast, model_config
    from pipeline.recipe import CompressConfig, branches
    from pipeline.training.memory import USABLE

    if not isinstance(config, CompressConfig):
        return 0
    model = model_config(config.base.source)
    if model is None:
        console.print(
            f"no costs: {config.base.source} is neither a folder on this machine nor a hub id "
            "whose geometry is known",
            markup=False,
        )
        return 0
    if config.searched:
        from pipeline.search.space import Costs, Space

        plan = Space(Costs(model, config.search), config.search).known()["middle"].plan
        config = config.model_copy(update={"plan": plan})
        console.print(
            f"plan = search: costs and training are shown for {plan}, one of the plans that meet "
            "the budget; `adsc search --dry-run` lists more",
            markup=False,
            soft_wrap=True,
        )
    trainings = {
        f"{branch}-{number}": train
        for branch, each in branches(config).items()
        for number, train in enumerate(each, 1)
    }
    _show_costs(console, model, _named(config, trainings))
    given = {"gpu": options.gpu_type, "hfu": options.hfu, "text_tokens": options.text_tokens}
    assumed = Assumptions(
        workers=options.workers if isinstance(options.workers, int) else options.workers[1],
        price=options.gpu_price,
        **{name: value for name, value in given.items() if value is not None},
    )
    records = getattr(getattr(config, "data", None), "size", None)
    rows = forecast(model, list(trainings.items()), records, assumed)
    _show_forecast(console, rows, records, assumed)
    most = max(rows, key=lambda row: row.memory_gib)
    room = USABLE * assumed.hardware.memory_gib
    if most.memory_gib <= room:
        return 0
    console.print(
        f"{most.name} needs about {most.memory_gib:.0f} GiB, but training can use only "
        f"{room:.0f} GiB on {assumed.gpu}: set train.memory=auto (or lower train.micro_tokens, set "
        "train.activation_checkpointing=true), or shard the weights with train.strategy=zero3",
        style="red",
        markup=False,
    )
    return 1


def _named(config: Any, trainings: Mapping[str, TrainConfig]) -> dict[str, str]:
    """The plans of a compression by name: those of an elastic checkpoint, otherwise those of each
    training stage; and those of compared recipes."""
    stages = {name: train.runs_with for name, train in trainings.items() if train.runs_with}
    if config.curriculum.elastic:
        elastic = config.curriculum.elastic
        stages = elastic | {n: plan for n, plan in stages.items() if not n.startswith("train-")}
    return {"dense": "", **stages}


def _show_costs(console: Console, model: Any, plans: Mapping[str, str]) -> None:
    import adsc

    table = terminal.table(
        "plan of", "plan", "tokens per layer", "average", "GFLOPs", "KV KiB",
        title="One picture with 101 text tokens",
    )  # fmt: skip
    for name, plan in plans.items():
        cost = adsc.estimate_cost(model, plan)
        table.add_row(
            name,
            plan or "-",
            _runs([layer.vision_tokens for layer in cost.per_layer]),
            f"{cost.average_vision_tokens:.1f}",
            f"{cost.flops / 1e9:,.3f}",
            f"{cost.kv_cache_bytes / 1024:,.0f}",
        )
    console.print(table)


def _runs(tokens: Sequence[int]) -> str:
    """Each count once, with its number of layers: `576 x 4, 288 x 6`."""
    counts: list[tuple[int, int]] = []
    for count in tokens:
        if counts and counts[-1][0] == count:
            counts[-1] = (count, counts[-1][1] + 1)
        else:
            counts.append((count, 1))
    return ", ".join(f"{count} x {layers}" for count, layers in counts)


def _show_forecast(
    console: Console, rows: Sequence[StageForecast], records: int | None, assumed: Assumptions
) -> None:
    taught = any(row.teacher_share for row in rows)
    table = terminal.table(
        "stage", "plan", "steps", "PFLOPs", *(["teacher"] if taught else []),
        "GPU-hours", "hours", "GiB per GPU", *(["price"] if assumed.price else []),
        title=f"Training on {assumed.workers} x {assumed.gpu}",
    )  # fmt: skip

    def add(
        name: str, plan: str, steps: int, flops: float, hours: float, memory: float, share: float
    ) -> None:
        teacher = [f"{100 * share:.0f} %" if share else "-"] if taught else []
        price = [f"{hours * assumed.price:,.2f}"] if assumed.price else []
        each = hours / assumed.workers
        numbers = (f"{hours:,.2f}", f"{each:,.2f}", f"{memory:.1f}")
        flop = f"{flops / 1e15:,.1f}"
        table.add_row(name, plan or "-", f"{steps:,}", flop, *teacher, *numbers, *price)

    for row in rows:
        add(
            row.name,
            row.plan,
            row.steps,
            row.flops,
            row.gpu_hours,
            row.memory_gib,
            row.teacher_share,
        )
    hours = sum(row.gpu_hours for row in rows)
    add(
        "all",
        "",
        sum(row.steps for row in rows),
        sum(row.flops for row in rows),
        hours,
        max(row.memory_gib for row in rows),
        sum(row.gpu_hours * row.teacher_share for row in rows) / hours,
    )
    console.print(table)
    for row in rows:
        if row.chosen:
            console.print(f"{row.name}: train.memory = auto chooses {row.chosen}", markup=False)
    data = f"{records:,} records with " if records else "conversations with "
    console.print(
        f"assumed: {data}one picture and {assumed.text_tokens} text tokens; "
        f"{100 * assumed.hfu:.0f} % of the peak of {assumed.hardware.peak_flops / 1e12:.0f} "
        "TFLOP/s (dense bf16); evaluation, merging and loading not counted",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
