"""Methods that choose tokens by looking at them: what every peer of the plan has in common.

A plan's indices are known before the forward pass. A method's counts are too, but which tokens they
are depends on hidden states: it is asked at its layers (`adsc.choice`). It is otherwise attached,
saved and counted like a plan. The methods themselves are in `adsc.peers`, a file each.

Legend: n vision tokens of one image, n' of them left before a drop, m after it, c of these merged
from others, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from adsc.plan import POSITIONS, PlanError, PruningPlan, kept_count

if TYPE_CHECKING:
    from adsc.choice import Scene
    from adsc.scoring_cost import Sizes

KINDS: dict[str, type[Method]] = {}  # every method by its name


@dataclass(frozen=True, eq=False)
class Selection:
    """What a drop leaves of one image.

    Args:
        keep: (m,) numbers of the tokens that stay among the image's n, ascending.
        merged: (c,) those of them that get a new state; None if none does.
        weights: (c, n') the new states as sums over the tokens that were left before the drop.
        states: (c, D) or the new states themselves; for drops at layer 0 only.
    """

    keep: Tensor
    merged: Tensor | None = None
    weights: Tensor | None = None
    states: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to choose vision tokens.

    Args:
        stages: pairs (layer, share): before that layer each image is cut to this share of the
            tokens that it had at first. No stage: nothing is dropped.
        positions: `keep` leaves kept tokens their position ids; `reindex` renumbers after a drop.

    Raises:
        PlanError: stages out of order, shares that grow or leave (0, 1], an unknown word.
    """

    name: ClassVar[str]
    refuses: ClassVar[tuple[str, ...]] = ()
    """Names of families that it can't serve."""

    stages: tuple[tuple[int, Fraction], ...] = ()
    positions: str = "keep"

    def __init_subclass__(cls) -> None:
        KINDS[cls.name] = cls

    def __post_init__(self) -> None:
        stages = PruningPlan(stages=self.stages, positions=self.positions).stages
        object.__setattr__(self, "stages", stages)
        shares = [share for _, share in stages]
        if shares != sorted(shares, reverse=True):
            raise PlanError(
                f"shares {', '.join(map(str, shares))} of {self.name} grow from one drop to the "
                "next: each is a share of an image's first number of tokens"
            )

    def __str__(self) -> str:
        """Name, stages as layer:share, and every option that is not the default."""
        parts = [f"{self.name} " + ",".join(f"{layer}:{share}" for layer, share in self.stages)]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "stages" and value != field.default:
                parts.append(f"{field.name}={value}")
        return ";".join(part.strip() for part in parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, as it stands in a checkpoint's config."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["stages"] = [[layer, str(share)] for layer, share in self.stages]
        values = {n: str(v) if isinstance(v, Fraction) else v for n, v in values.items()}
        return {"method": self.name, **values}

    def check_layers(self, num_layers: int) -> None:
        """Raise PlanError if a stage names a layer that a decoder of `num_layers` does not have."""
        PruningPlan(stages=self.stages).check_layers(num_layers)

    def counts(self, num_vision_tokens: int) -> list[int]:
        """Tokens of one image after each stage; at least one."""
        return [kept_count(num_vision_tokens, share) for _, share in self.stages]

    def tokens_per_layer(self, num_vision_tokens: int, num_layers: int) -> list[int]:
        """Vision tokens of one image that enter each decoder layer, one number a layer."""
        self.check_layers(num_layers)
        layers = [layer for layer, _ in self.stages]
        counts = [num_vision_tokens, *self.counts(num_vision_tokens)]
        return [counts[sum(at <= layer for at in layers)] for layer in range(num_layers)]

    def average_tokens(self, num_vision_tokens: int, num_layers: int) -> float:
        """Mean over layers of the vision tokens entering each layer: the budget that counts."""
        return sum(self.tokens_per_layer(num_vision_tokens, num_layers)) / num_layers

    def reduction(self, num_vision_tokens: int, num_layers: int) -> float:
        """1 - average / initial."""
        return 1 - self.average_tokens(num_vision_tokens, num_layers) / num_vision_tokens

    def kept_indices(
        self, num_vision_tokens: int, lattice: tuple[int, int] | None = None
    ) -> list[tuple[int, ...]]:
        """Stand-ins of the right number: everything but the choice itself depends on that alone."""
        return [tuple(range(count)) for count in self.counts(num_vision_tokens)]

    def watches(self) -> frozenset[int]:
        """Layers before which `note` is asked."""
        return frozenset()

    def note(self, scene: Scene) -> Any:
        """What to remember of a watched layer's input; later `scene.notes[layer]`."""
        raise NotImplementedError

    def choose(self, scene: Scene, stage: int) -> list[Selection]:
        """What stage number `stage` leaves of each of `scene.spots`; must not need gradients."""
        raise NotImplementedError

    def scoring_macs(self, sizes: Sizes) -> int:
        """MACs of the matmuls that a prefill of the batch spends on choosing and merging."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The layer average that a method is to be fitted to.

    Args:
        average: vision tokens of one image entering a layer, mean over layers.
        tokens: n of the image that `average` is meant for; others keep the same shares.
        layers: L of the decoder.
        tolerance: how far the true average may be from it, relative to it.
        first: the first layer at which the model allows a drop.
        axes: position ids of one token.
    """

    average: Fraction
    tokens: int
    layers: int
    tolerance: Fraction
    first: int
    axes: int

    def after(self, layer: int) -> Fraction:
        """Tokens that each layer from `layer` on may have if those before it have all."""
        return (self.average * self.layers - layer * self.tokens) / (self.layers - layer)

    def share(self, count: int | Fraction) -> Fraction:
        """The share that leaves a whole number of tokens, at least one and at most all."""
        whole = int(Fraction(count) + Fraction(1, 2))
        return Fraction(min(max(whole, 1), self.tokens), self.tokens)

    def positions(self, given: str | None, published: str) -> str:
        """The word asked for, or the published one where the model's positions allow it."""
        if given is not None and given not in POSITIONS:
            raise PlanError(f"positions {given!r} is unknown; choose one of {', '.join(POSITIONS)}")
        return given or (published if self.axes == 1 else "keep")


def as_whole(name: str, value: object, least: int) -> int:
    """An option that counts something."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PlanError(f"{name} {value!r} must be a whole number from {least}")
    return value


def from_dict(data: dict[str, Any]) -> PruningPlan | Method:
    """The plan or method that stands in a checkpoint's config.

    Raises:
        PlanError: an unknown method, unknown or ill-typed fields.
    """
    if "method" not in data:
        return PruningPlan.from_dict(data)
    name, values = data["method"], {key: data[key] for key in data if key != "method"}
    if name not in KINDS:
        raise PlanError(f"method {name!r} is unknown; known are {', '.join(sorted(KINDS))}")
    kind = KINDS[name]
    if unknown := set(values) - {field.name for field in fields(kind)}:
        raise PlanError(f"unknown fields {sorted(unknown)} in method {name!r}")
    return kind(**values)
