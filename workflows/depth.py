"""How much an untrained model loses by each plan, on conversations of a prepared split.

    python -m workflows.depth --model BASE --data PREPARED/train 12:0 19:0 24:0

Where a decoder reads its picture differs from model to model, and an exit (`19:0`) before that
may cost more than training wins back. This takes minutes, no training and no test question: the
cross entropy of the answers' tokens, dense and under each plan. The first layer from which an exit
costs nothing is where to exit.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import adsc
from adsc.attachment.attach import check_plan
from pipeline.data.prepared import PreparedData
from pipeline.training.batches import StepLoader
from pipeline.training.config import TrainConfig
from pipeline.training.objective import Objective
from workflows.evidence.tasks import load_model
from workflows.stamps_tower import register


def losses(
    model: Any, batches: Sequence[dict[str, Any]], plans: Sequence[adsc.PruningPlan], *, half: bool
) -> Iterator[float]:
    """Mean cross entropy of the supervised tokens, in nats, under each plan in turn.

    Args:
        model: a LLaVA without a plan.
        batches: inputs with labels, as `StepLoader` makes them.
        plans: the empty one is dense.
        half: compute under bf16 autocast.
    """
    for plan in plans:
        check_plan(model, plan)
    adsc.attach(model, max(plans, key=lambda plan: len(plan.stages)))  # any that drops will do
    device = next(model.parameters()).device
    objective = Objective(model, None, device, in_step=False)
    supervised = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
    autocast: Any = torch.autocast(device.type, torch.bfloat16) if half else nullcontext()
    for plan in plans:
        with torch.inference_mode(), autocast:
            made = [objective(**batch, supervised=supervised, plan=plan) for batch in batches]
        yield sum(float(one["loss"]) for one in made)


def main(words: list[str] | None = None) -> int:
    """The command: a line for each plan; 2 where what was given can't be read or run."""
    parser = argparse.ArgumentParser(
        prog="workflows.depth",
        description=(__doc__ or "").partition("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(__doc__ or "").partition("\n\n")[2],
    )
    parser.add_argument("plans", nargs="+", help="plans, such as 12:0 or 7:1/4,19:0;pool=tiles")
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint folder")
    parser.add_argument("--data", type=Path, required=True, help="a prepared split")
    parser.add_argument("--conversations", type=int, default=32, help="how many are read (32)")
    parser.add_argument("--half", action="store_true", help="compute in bf16")
    given = parser.parse_args(words)
    try:
        _report(given)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"depth: {error}\n")
        return 2
    return 0


def _report(given: argparse.Namespace) -> None:
    plans = [adsc.PruningPlan(), *map(adsc.PruningPlan.parse, given.plans)]
    there = len(PreparedData(given.data))
    if not 0 < given.conversations <= there:
        raise ValueError(
            f"--conversations {given.conversations}: {given.data} has {there}; take 1 to {there}"
        )
    register()  # the tower of `stamps`
    parts = max(1, given.conversations // 4)
    config = TrainConfig(steps=1, batch_size=given.conversations, accumulate=parts)
    batches = StepLoader(data=given.data, processor=given.model, config=config)(0).micro
    model = load_model(given.model, None)
    for plan, loss in zip(plans, losses(model, batches, plans, half=given.half), strict=True):
        sys.stdout.write(f"{str(plan) or 'dense':32s} {loss:.3f}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
