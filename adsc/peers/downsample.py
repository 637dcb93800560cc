"""A picture of lower resolution: the trivial control of VTC-Bench (arXiv 2510.07143).

The picture is shrunk so far that it would have m patches instead of n, and brought back to the size
that the tower takes; of its n features the means of the m cells of a grid enter the decoder, as in
`pool`. So the decoder gets m tokens that hold what a picture of that resolution shows, while tower
and projector, which take one size of picture only, run as they are and cost what they cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from adsc.dropping.blocks import is_replaced
from adsc.errors import UnsupportedModel
from adsc.families.family import Family
from adsc.method import Budget, MethodHook
from adsc.peers.pool import Pool

if TYPE_CHECKING:
    from torch.nn import Module

FAMILIES = ("llava", "llava_next")


@dataclass(frozen=True, kw_only=True)
class Downsample(Pool):
    """`pool` of pictures that were shrunk."""

    name = "downsample"

    @classmethod
    def fit(cls, budget: Budget, positions: str | None = None) -> Downsample:
        return cls(stages=budget.cut(0), positions=budget.positions(positions, "reindex"))

    def check_family(self, family: Family) -> None:
        if family.model_type not in FAMILIES:
            raise UnsupportedModel(
                f"downsample serves LLaVA-1.5 and LLaVA-NeXT, whose towers take pictures of one "
                f"size, not {family.name}: shrink its pictures before its processor instead"
            )

    def install(self, inner: Any) -> None:
        tower: Module = inner.vision_tower
        tower.register_forward_pre_hook(Shrink(self.stages[0][1]), with_kwargs=True)


class Shrink(MethodHook):
    """Pre-hook of a tower: pictures lose what `share` of their pixels can't show."""

    def __init__(self, share: Fraction) -> None:
        self.share = share

    def __call__(
        self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if is_replaced(module):
            return args, kwargs
        if args:
            return (shrunk(args[0], self.share), *args[1:]), kwargs
        return args, kwargs | {"pixel_values": shrunk(kwargs["pixel_values"], self.share)}


def shrunk(pictures: Tensor, share: Fraction) -> Tensor:
    """(N, 3, H, W) averaged down to `share` of their pixels, and interpolated back."""
    sides = pictures.shape[-2:]
    small = [max(1, round(side * float(share) ** 0.5)) for side in sides]
    less = nn.functional.interpolate(pictures.float(), size=small, mode="area")
    back = nn.functional.interpolate(less, size=sides, mode="bilinear", align_corners=False)
    return back.to(pictures)
