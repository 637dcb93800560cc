"""Exactly the declared parameters move: checksums before and after a stage, on every rank.

Under ZeRO-3 a rank sums up the part of a parameter that it holds; what moved anywhere has moved.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn


class MovementError(ValueError):
    """Other parameters moved than the config declares."""


def checksums(
    parts: Iterable[tuple[str, nn.Parameter, torch.Tensor]],
) -> dict[str, tuple[bool, float]]:
    """Per parameter: whether it is to move, and a number that changes when it does."""
    sums = {}
    with torch.no_grad():
        for name, parameter, part in parts:
            weights = torch.arange(1, part.numel() + 1, device=part.device) % 8191 + 1
            value = (part.flatten().double() * weights).sum().item()
            sums[name] = (parameter.requires_grad, value)
    return sums


def check_moved(
    before: dict[str, tuple[bool, float]], after: dict[str, tuple[bool, float]]
) -> None:
    """Compare checksums; every rank calls it.

    Raises:
        MovementError: on every rank, naming some parameters.
    """
    flags = torch.tensor([float(after[name][1] != was) for name, (_, was) in before.items()])
    if dist.is_initialized() and dist.get_world_size() > 1:
        flags = flags.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    moved = {name for name, flag in zip(before, flags.tolist(), strict=True) if flag}
    leaked = [name for name, (trained, _) in before.items() if not trained and name in moved]
    if leaked:
        raise MovementError(
            f"{len(leaked)} frozen parameters moved, such as {leaked[:3]}: report this bug"
        )
    still = [name for name, (trained, _) in before.items() if trained and name not in moved]
    # In a fresh adapter's first step B is zero, and so is the gradient of A.
    still = [name for name in still if ".lora_A." not in name]
    if still:
        raise MovementError(
            f"{len(still)} parameters were to be trained but did not move, such as {still[:3]}: "
            "the model does not use them; leave them out of train.tune or train.lora.targets"
        )
