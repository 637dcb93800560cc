"""The command `adsc search`: its arguments, dry run and table. The stages are the recipe's.

It runs the stages up to `search` of a workflow whose plan is `search`; `adsc run` of that workflow
with the same settings continues from there.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from workflows.commands import terminal
from workflows.commands.options import (
    add_ray,
    add_workers,
    add_workflow,
    positive,
    run_context,
)
from workflows.registry import load_workflow

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.durable.stage import Stage
    from pipeline.durable.workflow import Workflow
    from pipeline.search.config import SearchConfig

EXAMPLES = """examples:
  adsc search demo --average 22 --dry-run              (the space, the first trials, their costs)
  adsc search demo --average 22 --trials 64 --workers 2
  adsc search demo --average 16 32                     (a Pareto front of loss and cost)
  adsc search demo --kv-mib 0.96 --objective accuracy
  adsc search demo --average 22 --fidelity lora --rungs 10 30 90 --set train.learning_rate=1e-3
  adsc search demo --over train.learning_rate=1e-4..1e-2,log lora.rank=8,16,32 --rungs 10 30
  adsc search demo --average 22 --over train.distill.weight=0..1 --rungs 30
  adsc search llava15_7b --average 192 --dry-run
  adsc run demo --set plan=search --set search.average=22     (trains with the plan it finds)

Two numbers give a budget's minimum and maximum. Set anything else with --set search.KEY=VALUE;
`adsc show demo --config` lists the keys.
"""
BUDGETS = ("average", "gflops", "kv_mib", "prefill_ms")
SHOWN = 10
"""Trials in the table at the end."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    number = positive(float)
    for name, unit in (
        ("average", "vision tokens per picture, averaged over decoder layers"),
        ("gflops", "GFLOPs of a prefill"),
        ("kv-mib", "MiB of KV cache"),
        ("prefill-ms", "measured milliseconds of a prefill"),
    ):
        parser.add_argument(
            f"--{name}", nargs="+", type=number, metavar="N", help=f"budget: {unit}"
        )
    parser.add_argument("--trials", type=positive(int), help="plans to try (64)")
    parser.add_argument(
        "--objective", choices=("loss", "accuracy"), help="the quality to optimise (loss)"
    )
    parser.add_argument(
        "--fidelity",
        choices=("untrained", "lora", "curriculum"),
        help="training of a trial before it is scored (untrained: none)",
    )
    parser.add_argument(
        "--rungs", nargs="+", type=positive(int), metavar="N",
        help="training steps (untrained: conversations) after which the worst trials are stopped",
    )  # fmt: skip
    parser.add_argument(
        "--over", nargs="+", metavar="KEY=RANGE",
        help="also search training keys: train.learning_rate=1e-4..1e-2,log lora.rank=8,16,32 "
        "train.distill.weight=0..1; without a budget, the workflow's plan is kept",
    )  # fmt: skip
    parser.add_argument("--sampler", choices=("tpe", "random"), help="search algorithm (tpe)")
    parser.add_argument("--seed", type=int, dest="search_seed", help="seed of the search (0)")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")
    parser.add_argument(
        "--dry-run", action="store_true", help="only print the space and the first trials"
    )
    add_workflow(parser)
    add_workers(parser)
    add_ray(parser)


def edited(workflow: Workflow, options: argparse.Namespace) -> Workflow:
    """The workflow with `plan = search` and the settings given on the command line.

    Raises:
        ValueError: it is no compression, or (ConfigError) settings contradict each other.
    """
    from pipeline.recipe import CompressConfig

    if not isinstance(workflow.config, CompressConfig):
        raise ValueError(f"{workflow.name} compresses nothing: there is no plan to search for")
    changes: dict[str, Any] = {"plan": "search"}
    for name in BUDGETS:
        given = getattr(options, name)
        if given is not None:
            if len(given) > 2:
                raise ValueError(
                    f"--{name.replace('_', '-')} takes one number, or a minimum and a maximum"
                )
            changes[f"search.{name}"] = given[0] if len(given) == 1 else tuple(given)
    for key in ("trials", "objective", "fidelity", "sampler"):
        if getattr(options, key) is not None:
            changes[f"search.{key}"] = getattr(options, key)
    if options.over is not None:
        pairs = [given.partition("=") for given in options.over]
        if bad := ["".join(pair) for pair in pairs if not (pair[1] and pair[2])]:
            raise ValueError(
                f"--over {' '.join(bad)}: write KEY=RANGE, as train.learning_rate=1e-4..1e-2,log"
            )
        changes["search.over"] = over = {key: text for key, _, text in pairs}
        if len(over) < len(pairs):
            raise ValueError(f"--over {' '.join(options.over)}: give each key once")
        config = workflow.config
        budgets = [getattr(config.search, name) for name in BUDGETS]
        if not any(f"search.{name}" in changes for name in BUDGETS) and not any(budgets):
            if config.searched:
                raise ValueError(
                    "--over without a budget searches the training of the workflow's plan, but "
                    "that is `search`: give a budget, or --set plan=..."
                )
            changes["search.plan"] = config.plan
        if options.fidelity is None and config.search.fidelity == "untrained":
            changes["search.fidelity"] = "lora"
    if options.rungs is not None:
        changes["search.rungs"] = tuple(options.rungs)
    if options.search_seed is not None:
        changes["search.seed"] = options.search_seed
    return workflow.edit(changes)


def search_stages(workflow: Workflow) -> list[Stage]:
    """The stage `search` and every stage it needs."""
    from pipeline.durable.graph import topological_order

    by_name = {stage.name: stage for stage in topological_order(workflow.stages())}
    wanted, names = {"search"}, ["search"]
    while names:
        for need in by_name[names.pop()].needs.values():
            if need not in wanted:
                wanted.add(need)
                names.append(need)
    return [stage for stage in by_name.values() if stage.name in wanted]


def run(options: argparse.Namespace) -> int:
    """Run the stages and print the results."""
    from pipeline.durable import graph
    from pipeline.durable.stage import Input

    workflow = edited(load_workflow(options.workflow, options.changes), options)
    console = terminal.console(data=options.json)
    if options.dry_run:
        show_space(workflow.config, console)
        return 0
    parameters = workflow.parameters(options.changes)
    context = run_context(options, workflow.name, parameters, workflow.setup)
    records = graph.run(search_stages(workflow), context, console)
    search = Input(records["search"])
    results = json.loads((search.folder / "results.json").read_text())
    if options.json:
        print(json.dumps(results))
        return 0
    print_results(results, console)
    settings = " ".join(f"--set {shlex.quote(it)}" for it in _settings(workflow, options, results))
    lines = [f"{search.uri}/search.html", f"adsc run {options.workflow} {settings}"]
    console.print("Next: look at the search, train with its result", markup=False)
    for line in lines:
        console.print(f"  {line}", soft_wrap=True, markup=False, highlight=False)
    return 0


def _settings(
    workflow: Workflow, options: argparse.Namespace, results: dict[str, Any]
) -> list[str]:
    """The `--set` arguments of the next `adsc run`: the same search, whose plan it uses; or, if the
    search covered training keys, the best plan and settings themselves."""
    if results["settings"]:
        return best_settings(workflow.config, results, options.changes)
    config = workflow.config.search  # type: ignore[attr-defined]
    plain = type(config)()
    changed = [
        name for name in type(config).model_fields if getattr(config, name) != getattr(plain, name)
    ]
    search = [f"search.{name}={_written(getattr(config, name))}" for name in changed]
    others = [it for it in options.changes if not it.startswith(("plan=", "search."))]
    return ["plan=search", *search, *others]


def best_settings(config: Any, results: dict[str, Any], changes: Sequence[str]) -> list[str]:
    """The changes that make a workflow train with the best plan and settings of a search."""
    settings = dict(results["settings"])
    best = [f"plan={results['plan']}"]
    distill = {
        key.removeprefix("train.distill."): settings.pop(key)
        for key in list(settings)
        if key.startswith("train.distill.")
    }
    if distill and distill.get("weight") == 0:
        best.append("train.distill=null")
    elif distill:
        base = config.train.distill.model_dump() if config.train.distill else {}
        best.append(f"train.distill={json.dumps(base | distill)}")
    best += [f"{key}={value}" for key, value in settings.items()]
    names = {setting.partition("=")[0] for setting in best} | {"plan"}
    others = [change for change in changes if change.partition("=")[0] not in names]
    return [*best, *(change for change in others if not change.startswith("search."))]


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ",".join(map(_written, value)) + "]"
    return str(value)


def show_space(config: Any, console: Console) -> None:
    """Print the size of the space and the first trials with their costs.

    Raises:
        PlanError: no plan meets the budget.
    """
    import adsc
    from pipeline.forecast import model_config
    from pipeline.search.keys import written
    from pipeline.search.space import Costs, Space
    from pipeline.search.study import Study

    search: SearchConfig = config.search
    model = model_config(config.base.source)
    if model is None:
        raise ValueError(
            f"{config.base.source} is neither a folder on this machine nor a hub id whose geometry "
            "is known: leave out --dry-run"
        )
    if search.budget[0] == "prefill_ms":
        raise ValueError(
            "a budget of prefill time needs times measured on a worker: leave out --dry-run, or "
            "give another budget"
        )
    space = Space(Costs(model, search), search)
    name, low, high = search.budget
    plans = (
        f"{len(space):,} plans ({len(space.stages):,} placements, anchors "
        f"{', '.join(search.anchors)}) with {name} from {low:g} to {high:g}"
    )
    console.print(
        f"{f'plan {search.plan}' if search.plan else plans}: {space.of.num_layers} layers, "
        f"{space.of.num_vision_tokens} vision tokens; {search.trials} trials, {search.fidelity}",
        markup=False, highlight=False,
    )  # fmt: skip
    if search.over:
        varied = " ".join(f"{key}={text}" for key, text in search.over.items())
        console.print(f"training keys: {varied}", markup=False, highlight=False)
    study = Study(space, search.model_copy(update={"sampler": "random"}))
    table = terminal.table(
        "trial", "from", "plan", "average", "GFLOPs", "KV MiB",
        title=f"The first trials, one picture with {search.text_tokens} text tokens",
    )  # fmt: skip
    for _ in range(min(search.trials, len(study.known) + 5)):
        proposal = study.next()
        if proposal is None:
            break
        cost = adsc.estimate_cost(
            model, proposal.plan, text_tokens=search.text_tokens, image_size=search.image_size
        )
        table.add_row(
            str(proposal.number),
            proposal.name,
            f"{proposal.plan} {written(proposal.settings)}".strip(),
            f"{cost.average_vision_tokens:.1f}",
            f"{cost.flops / 1e9:,.3f}",
            f"{cost.kv_cache_bytes / 2**20:,.3f}",
        )
    console.print(table)
    for title, why in space.left_out.items():
        console.print(f"left out: {title}, {why}", markup=False, highlight=False)


def print_results(results: dict[str, Any], console: Console) -> None:
    """Print the best trials, the known ones, and the conclusion."""
    from pipeline.search.keys import written

    trials: Sequence[dict[str, Any]] = [t for t in results["trials"] if t["state"] == "finished"]
    sign = 1 if results["objective"] == "loss" else -1
    ordered = sorted(trials, key=lambda t: (sign * t["rungs"][-1][1], t["number"]))
    best = [t["number"] for t in ordered[:SHOWN]]
    table = terminal.table(
        "place", "from", "plan", results["objective"], results["unit"],
        title=f"Best of {len(results['trials'])} trials, and the known placements",
    )  # fmt: skip
    for place, trial in enumerate(ordered, 1):
        if trial["number"] in best or trial["known"]:
            table.add_row(
                str(place),
                trial["name"],
                f"{trial['plan']} {written(trial['settings'])}".strip(),
                f"{trial['rungs'][-1][1]:.4f}",
                f"{trial['cost']:.5g}",
            )
    console.print(table)
    for trial in results["trials"]:
        if trial["state"] == "failed":
            console.print(f"failed: {trial['plan']}: {trial['reason']}", markup=False)
    console.print(results["finding"], markup=False, highlight=False, soft_wrap=True)
