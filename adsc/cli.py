"""The commands `cost` and `plan`: what a plan saves, and which plans meet a budget.

They read configs only: nothing is downloaded, no weights are loaded. This is not the project's
whole command line; that one adds these two with `add_commands`. Alone: `python -m adsc.cli cost`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

from adsc.costs.cost import CONVENTIONS, LOGITS, Cost, estimate_cost
from adsc.costs.geometries import GEOMETRIES, HUB_IDS, shape
from adsc.errors import CostError
from adsc.families.family import ImageInput
from adsc.families.table import first_legal_layer, image_cost
from adsc.method import Method, from_dict
from adsc.named import CONFIG_FIELD, find_plan
from adsc.plan import POOLS, PlanError, PruningPlan
from adsc.solve import ANY_KEEP, solve_plans

COST_EXAMPLES = """examples:
  adsc cost llava-1.5-7b --plan 8:1/2,16:1/2,24:1/2 --text-tokens 101
  adsc cost llava-1.5-7b --plan 8:1/9 --batch-size 32 --new-tokens 64 --json
  adsc cost ./my-checkpoint                     (its own plan, if it carries one)
"""
PLAN_EXAMPLES = """examples:
  adsc plan --model llava-1.5-7b --average 192
  adsc plan --model llava-1.5-7b --average 128 --drops 2 --keep 1/2,1/4 --tolerance 0.05
  adsc plan --model llava-1.5-7b --average 128 --pool tiles
  adsc plan --model llava-1.5-7b --average 128 --pool tiles --exit 24
  adsc plan --model ./my-checkpoint --average 64 --keep 1/3 --limit 5 --json
  adsc plan --model llava-1.5-7b --draw "4:1/9,24:0;pool=tiles" --image photo.jpg --out plan.png
"""


def add_commands(subparsers: Any) -> None:
    """Add `cost` and `plan` to an argparse command line.

    Each parsed namespace then has `run`, a function from the namespace to an exit code.

    Args:
        subparsers: what `ArgumentParser.add_subparsers` returned.
    """
    raw = argparse.RawDescriptionHelpFormatter
    cost = subparsers.add_parser(
        "cost",
        help="FLOPs and KV cache of a model, dense and under a plan",
        description="FLOPs in every published convention, and KV-cache bytes, of a model with and "
        "without a pruning plan.",
        epilog=COST_EXAMPLES,
        formatter_class=raw,
    )
    add_cost_arguments(cost)
    cost.set_defaults(run=_reporting(run_cost))

    plan = subparsers.add_parser(
        "plan",
        help="placements of drops that meet a token budget",
        description="All placements of a number of drops whose vision tokens, averaged over the "
        "decoder's layers, meet a budget; the closest first.",
        epilog=PLAN_EXAMPLES,
        formatter_class=raw,
    )
    add_plan_arguments(plan)
    plan.set_defaults(run=_reporting(run_plan))


def add_cost_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cost`."""
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument(
        "--plan",
        help="layer:keep,layer:keep, such as 8:1/2,16:1/2 or 4:1/9,24:0;pool=tiles; or the name "
        "of a plan of the checkpoint",
    )
    _add_workload(parser)


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `plan`."""
    parser.add_argument("--model", required=True, metavar="MODEL", help=_MODEL_HELP)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--average", type=float, help="vision tokens per layer and image")
    wanted.add_argument(
        "--draw", metavar="PLAN", help="draw the tokens that this plan leaves, on --image"
    )
    parser.add_argument("--image", metavar="FILE", type=Path, help="the picture for --draw")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("plan.png"),
        help="the drawing (plan.png)",
    )  # fmt: skip
    parser.add_argument(
        "--drops", type=int, help="number of drops, not counting an exit (3; with --pool: 1)"
    )
    parser.add_argument(
        "--keep",
        help="keep ratio of a drop, or one for each: 1/2,1/4; any: all common ratios "
        "(1/2; with --pool: any)",
    )
    parser.add_argument(
        "--pool",
        choices=POOLS,
        help="average groups of tokens instead of dropping them; whole tiles are listed first",
    )
    parser.add_argument(
        "--exit", type=int, metavar="LAYER", help="drop all vision tokens from this layer on"
    )
    parser.add_argument("--tolerance", type=float, default=0.01, help="relative tolerance (0.01)")
    parser.add_argument("--limit", type=int, default=20, help="placements to list (20)")
    parser.add_argument(
        "--convention", choices=CONVENTIONS, default="exact", help="how FLOPs are counted (exact)"
    )
    parser.add_argument("--logits", choices=LOGITS, default="last", help=_LOGITS_HELP)
    _add_workload(parser)


_MODEL_HELP = f"a checkpoint folder, or one of {', '.join(sorted(GEOMETRIES))}"
_LOGITS_HELP = "where the lm_head runs: last position, kept positions, full uncompressed length"


def _add_workload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text-tokens", type=int, default=101, help="positions that are not vision tokens (101)"
    )
    parser.add_argument("--num-images", type=int, default=1, help="images per row (1)")
    parser.add_argument("--batch-size", type=int, default=1, help="rows (1)")
    parser.add_argument(
        "--new-tokens", type=int, default=0, help="decode steps after the prefill (0)"
    )
    parser.add_argument(
        "--image-size",
        type=_image_size,
        metavar="HxW",
        help="image size in pixels, for models whose token count depends on it",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _image_size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH in pixels, such as 336x336")
    return int(height), int(width)


def _reporting(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Turn the errors that a user can mend into one sentence on stderr and exit code 2."""

    def guarded(arguments: argparse.Namespace) -> int:
        try:
            return run(arguments)
        except (CostError, PlanError) as error:
            print(f"adsc: {error}", file=sys.stderr)
            return 2

    return guarded


def read_config(model: str) -> Any:
    """The config of a checkpoint folder or of a named geometry, never from the network.

    Raises:
        CostError: neither of them, or a folder without a readable config.
    """
    folder = Path(model)
    if not folder.is_dir():
        if model in HUB_IDS:
            return shape(model)
        if folder.exists() or "/" in model or "\\" in model:
            raise CostError(
                f"{model!r} is not a checkpoint folder; name a folder with a config.json, or a "
                f"geometry: {', '.join(sorted(GEOMETRIES))}"
            )
        return shape(model)
    if not (folder / "config.json").is_file():
        hint = (
            "it holds an adapter: merge it first, or name the folder of its base model"
            if (folder / "adapter_config.json").is_file()
            else "a checkpoint folder has one"
        )
        raise CostError(f"no config.json in {model!r}; {hint}")
    from transformers import AutoConfig  # it loads torch: named geometries do without

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise CostError(f"config.json in {model!r} cannot be read: {reason}") from error


def _workload(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("text_tokens", "num_images", "batch_size", "new_tokens", "image_size")
    return {name: getattr(arguments, name) for name in names}


def run_cost(arguments: argparse.Namespace) -> int:
    """Print what a plan saves.

    Raises:
        CostError, PlanError: what can't be counted, in a sentence.
    """
    config = read_config(arguments.model)
    plan = _chosen_plan(arguments.plan, config)
    workload = _workload(arguments)

    def both(convention: str, logits: str = "last") -> tuple[Cost, Cost]:
        options = {**workload, "convention": convention, "logits": logits}
        dense = estimate_cost(config, None, **options)
        return dense, estimate_cost(config, plan, **options)

    exact = {logits: both("exact", logits) for logits in LOGITS}
    published = {name: both(name) for name in CONVENTIONS if name != "exact"}
    dense, pruned = exact["last"]
    kv = (dense.kv_cache_bytes, pruned.kv_cache_bytes, pruned.versus(dense).kv_cache_bytes)
    if arguments.json:
        document = {
            "model": arguments.model,
            "plan": str(plan),
            **{name: value for name, value in workload.items() if value is not None},
            "vision_tokens": dense.per_layer[0].vision_tokens,
            "average_vision_tokens": pruned.average_vision_tokens,
            "vision_tokens_per_layer": [layer.vision_tokens for layer in pruned.per_layer],
            "tokens_per_layer": [layer.tokens for layer in pruned.per_layer],
            "flops": {
                "exact": {logits: _pair(*_flops(*costs)) for logits, costs in exact.items()},
                **{name: _pair(*_flops(*costs)) for name, costs in published.items()},
            },
            "kv_cache_bytes": _pair(*kv),
        }
        print(json.dumps(document, indent=2))
        return 0
    print(
        f"{arguments.model}: {len(dense.per_layer)} decoder layers, per row "
        f"{dense.per_layer[0].vision_tokens} vision and {workload['text_tokens']} other tokens; "
        f"{workload['batch_size']} row(s), {workload['new_tokens']} decode step(s)"
    )
    print(
        f"plan {str(plan) or '(none)'}: {pruned.average_vision_tokens:g} vision tokens on average"
        f" ({_change(pruned.versus(dense).vision_tokens)})"
    )
    print(f"vision tokens entering layers {_runs([x.vision_tokens for x in pruned.per_layer])}\n")
    lines = [("convention", "unit", "dense", "plan", "change")]
    for logits, costs in exact.items():
        name = f"exact, lm_head {logits}"
        lines.append((name, "TFLOPs", *_scaled(*_flops(*costs), unit=1e12)))
    for name, costs in published.items():
        lines.append((name, "TMACs", *_scaled(*_flops(*costs), unit=1e12)))
    lines.append(("KV cache", "MiB", *_scaled(*kv, unit=2**20)))
    _print_table(lines, left=2)
    return 0


def run_plan(arguments: argparse.Namespace) -> int:
    """Print placements that meet the budget, or draw a given plan.

    Raises:
        CostError, PlanError: what can't be counted, met or drawn, in a sentence.
    """
    if arguments.draw is not None:
        return _draw(arguments)
    config, workload = read_config(arguments.model), _workload(arguments)
    layers = config.get_text_config().num_hidden_layers
    image = ImageInput(size=arguments.image_size, images_in_row=arguments.num_images)
    seen = image_cost(config, image)
    tokens, pool = seen.tokens, arguments.pool
    words = arguments.keep or (ANY_KEEP if pool else "1/2")
    keep = tuple(filter(None, (ratio.strip() for ratio in words.split(","))))
    drops = arguments.drops
    if drops is None:
        drops = len(keep) if len(keep) > 1 else 1 if pool else 3
    if arguments.limit < 1:
        raise CostError(f"--limit {arguments.limit} must be a whole number from 1")
    plans = solve_plans(
        layers,
        tokens,
        arguments.average,
        drops,
        keep if len(keep) > 1 else words,
        arguments.tolerance,
        first_layer=first_legal_layer(config),
        pool=pool,
        exit_layer=arguments.exit,
        lattice=seen.lattice,
    )
    options = {**workload, "convention": arguments.convention, "logits": arguments.logits}
    dense = estimate_cost(config, None, **options)
    found = []
    for plan in plans[: arguments.limit]:
        saved = estimate_cost(config, plan, **options).versus(dense)
        average = plan.average_tokens(tokens, layers)
        found.append((str(plan), average, saved.flops, saved.kv_cache_bytes))
    if arguments.json:
        names = ("plan", "average_vision_tokens", "flops_reduction", "kv_cache_reduction")
        document = {
            "model": arguments.model,
            "vision_tokens": tokens,
            **{name: value for name, value in options.items() if value is not None},
            "found": len(plans),
            "placements": [dict(zip(names, row, strict=True)) for row in found],
        }
        print(json.dumps(document, indent=2))
        return 0
    placements = "1 placement" if len(plans) == 1 else f"{len(plans)} placements"
    leave = "" if arguments.exit is None else f"; exit before layer {arguments.exit}"
    shown = "" if len(found) == len(plans) else f"the {len(found)} closest, "
    print(
        f"{arguments.model}: {placements} of {drops} {'drop' if drops == 1 else 'drops'} "
        f"(keep {words}{leave}) with an average of {arguments.average:g} of {tokens} vision tokens "
        f"per image, within {arguments.tolerance:.1%}; {shown}FLOPs in "
        + arguments.convention
        + (f", lm_head {arguments.logits}" if arguments.convention == "exact" else "")
        + "\n"
    )
    lines = [("plan", "average", "FLOPs", "KV cache")]
    lines += [(plan, f"{mean:.2f}", _change(f), _change(kv)) for plan, mean, f, kv in found]
    _print_table(lines, left=1)
    return 0


def _draw(arguments: argparse.Namespace) -> int:
    from PIL import Image, UnidentifiedImageError

    from adsc.drawing import draw_plan

    if arguments.image is None:
        raise PlanError("--draw needs a picture to draw on: add --image FILE")
    config = read_config(arguments.model)
    plan = find_plan(arguments.draw, config)
    if not isinstance(plan, PruningPlan):
        raise PlanError(f"{arguments.draw} chooses tokens by content; --draw takes plans only")
    plan.check_layers(config.get_text_config().num_hidden_layers)
    try:
        with Image.open(arguments.image) as picture:
            size = arguments.image_size or (picture.height, picture.width)
            lattice = image_cost(config, ImageInput(size=size)).lattice
            sheet = draw_plan(picture, plan, lattice)
        sheet.save(arguments.out)
    except (UnidentifiedImageError, OSError, ValueError) as error:
        if isinstance(error, PlanError | CostError):
            raise
        raise PlanError(f"{arguments.image} can't be drawn to {arguments.out}: {error}") from error
    print(arguments.out)
    return 0


def _chosen_plan(text: str | None, config: Any) -> PruningPlan | Method:
    """The plan (or the name of one) on the command line, else the one in the checkpoint's config,
    else the empty one."""
    carried = getattr(config, CONFIG_FIELD, None)
    if text is not None or carried is None:
        return find_plan(text or "", config)
    return from_dict(carried)


def _pair(dense: int, plan: int, reduction: float) -> dict[str, float]:
    return {"dense": dense, "plan": plan, "reduction": reduction}


def _flops(dense: Cost, plan: Cost) -> tuple[int, int, float]:
    return dense.flops, plan.flops, plan.versus(dense).flops


def _scaled(dense: int, plan: int, saved: float, *, unit: float) -> tuple[str, str, str]:
    return f"{dense / unit:.3f}", f"{plan / unit:.3f}", _change(saved)


def _change(saved: float) -> str:
    """A share saved as the change that it makes: 0.567 is -56.7 %."""
    return f"{-saved * 100:+.1f} %" if round(saved, 3) else "0.0 %"


def _runs(counts: Sequence[int]) -> str:
    """Layers with equal counts together: 0-7: 576, 8-31: 288."""
    parts, start = [], 0
    for count, group in groupby(counts):
        end = start + len(list(group))
        parts.append(f"{start}-{end - 1}: {count}" if end - start > 1 else f"{start}: {count}")
        start = end
    return ", ".join(parts)


def _print_table(lines: Sequence[Sequence[str]], *, left: int) -> None:
    """Columns as wide as their widest cell; the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `cost` or `plan` alone; returns the exit code."""
    parser = _Parser(prog="adsc", description="What a pruning plan saves, and which plans to use.")
    add_commands(parser.add_subparsers(metavar="COMMAND", required=True))
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)


if __name__ == "__main__":
    sys.exit(main())
