"""Methods that choose tokens by looking at them: what every peer of the plan has in common.

A plan's indices are known before the forward pass. A method's counts are too, but which tokens they
are depends on hidden states: it chooses at its layers (`adsc.dropping.choice`). It is otherwise
attached, saved and counted like a plan. The methods themselves are in `adsc.peers`, a file each.

Legend: n vision tokens of one image, n' of them left before a drop, m after it, c of these merged
from others, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from adsc.errors import UnsupportedModel
from adsc.plan import POSITIONS, PlanError, PruningPlan, kept_count, tokens_entering
from adsc.tiles import Region

if TYPE_CHECKING:
    from torch import Tensor, nn

    from adsc.costs.scoring import Sizes
    from adsc.families.family import Family

KINDS: dict[str, type[Method]] = {}  # every method by its name


class MethodHook:
    """What marks a method's own hooks, so that detaching finds them."""


@dataclass(frozen=True, eq=False)
class Selection:
    """What a drop leaves of one image.

    Args:
        keep: (m,) numbers of the tokens that stay among the image's n, ascending.
        merged: (c,) those of them that get a new state; None if none does.
        weights: (c, n') the new states as sums over the tokens that were left before the drop.
        states: or what makes the new states (c, D), with gradients; for drops at layer 0 only.
    """

    keep: Tensor
    merged: Tensor | None = None
    weights: Tensor | None = None
    states: Callable[[], Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of choosing vision tokens.

    Args:
        stages: pairs (layer, share): before that layer each image is cut to this share of the
            tokens that it had at first. No stage: nothing is dropped.
        positions: `keep` leaves kept tokens their position ids; `reindex` renumbers after a drop.

    Raises:
        PlanError: stages out of order or too early, shares that grow or leave (0, 1], an unknown
            word.
    """

    name: ClassVar[str]
    refuses: ClassVar[tuple[str, ...]] = ()
    """Names of families that it can't serve."""
    why_refused: ClassVar[str] = ""
    hint: ClassVar[str] = ""
    """The way out if an average can't be reached, for the error."""
    earliest: ClassVar[int] = 0
    """The first layer before which it can drop; 1 where it chooses by a layer's attention."""
    reads_attention: ClassVar[bool] = False
    """Whether it computes queries or keys of the decoder's layers itself."""

    stages: tuple[tuple[int, Fraction], ...] = ()
    positions: str = "keep"

    def __init_subclass__(cls) -> None:
        KINDS[cls.name] = cls

    def __post_init__(self) -> None:
        stages = PruningPlan(stages=self.stages, positions=self.positions).stages
        object.__setattr__(self, "stages", stages)
        self.check_earliest([layer for layer, _ in stages])
        shares = [share for _, share in stages]
        if 0 in shares:
            raise PlanError(
                f"share 0 at layer {stages[-1][0]}: {self.name} leaves each image at least one "
                "token; an exit is for plans"
            )
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
        """JSON-ready form, as stored in a checkpoint's config."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["stages"] = [[layer, str(share)] for layer, share in self.stages]
        values = {n: str(v) if isinstance(v, Fraction) else v for n, v in values.items()}
        return {"method": self.name, **values}

    @classmethod
    def check_earliest(cls, layers: Sequence[int]) -> None:
        """Raise PlanError if one of the layers is before the first that the method can drop at."""
        if any(layer < cls.earliest for layer in layers):
            raise PlanError(
                f"layers {list(layers)}: {cls.name} can drop before layer {cls.earliest} at the "
                "earliest, since it chooses by the attention of a layer"
            )

    def check_layers(self, num_layers: int) -> None:
        """Raise PlanError if a stage names a layer that a decoder of `num_layers` does not have."""
        PruningPlan(stages=self.stages).check_layers(num_layers)

    def counts(self, num_vision_tokens: int) -> list[int]:
        """Tokens of one image after each stage; at least one."""
        return [kept_count(num_vision_tokens, share) for _, share in self.stages]

    def tokens_per_layer(self, num_vision_tokens: int, num_layers: int) -> list[int]:
        """Vision tokens of one image that enter each decoder layer, one number per layer."""
        self.check_layers(num_layers)
        counts = [num_vision_tokens, *self.counts(num_vision_tokens)]
        return tokens_entering([layer for layer, _ in self.stages], counts, num_layers)

    def average_tokens(self, num_vision_tokens: int, num_layers: int) -> float:
        """Mean over layers of the vision tokens entering each layer: the budget that counts."""
        return sum(self.tokens_per_layer(num_vision_tokens, num_layers)) / num_layers

    def reduction(self, num_vision_tokens: int, num_layers: int) -> float:
        """1 - average / initial."""
        return 1 - self.average_tokens(num_vision_tokens, num_layers) / num_vision_tokens

    def kept_indices(
        self,
        num_vision_tokens: int,
        lattice: tuple[int, int] | None = None,
        regions: tuple[Region, ...] = (),
    ) -> list[tuple[int, ...]]:
        """Stand-ins of the right number: everything but the choice itself depends on that alone."""
        return [tuple(range(count)) for count in self.counts(num_vision_tokens)]

    def check_family(self, family: Family) -> None:
        """Raise UnsupportedModel for a family that the method can't serve."""
        if family.name in self.refuses:
            raise UnsupportedModel(
                f"{self.name} does not serve {family.name}: {self.why_refused}; choose another "
                "method or family (docs/peers.md)"
            )

    def install(self, inner: nn.Module) -> None:
        """Register hooks of its own, each a MethodHook, on the inner model."""

    def watches(self) -> frozenset[int]:
        """Layers before which `note` is called."""
        return frozenset()

    # Scenes are adsc.dropping.choice.Scene, and that file knows methods: here they are of any type.
    def note(self, scene: Any) -> Any:
        """What to remember of a watched layer's input; later `scene.notes[layer]`."""
        raise NotImplementedError

    def choose(self, scene: Any, stage: int) -> list[Selection]:
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

    def cut(self, layer: int) -> tuple[tuple[int, Fraction], ...]:
        """The one drop before `layer` that comes closest to the average."""
        if layer >= self.layers:
            raise PlanError(
                f"a drop before layer {layer}, but the decoder has layers 0..{self.layers - 1}"
            )
        if self.average == self.tokens:
            return ()
        return ((layer, self.share(self.after(layer))),)

    def scaled(
        self, layers: Sequence[int], shares: Callable[[Fraction], Sequence[Fraction]]
    ) -> tuple[tuple[int, Fraction], ...]:
        """The drops before `layers` whose shares, a growing function of one number in [0, 1], come
        closest to the average."""
        PruningPlan(tuple((layer, Fraction(1)) for layer in layers)).check_layers(self.layers)
        if self.average == self.tokens:
            return ()

        def at(x: Fraction) -> tuple[tuple[int, Fraction], ...]:
            each = [self.share(share * self.tokens) for share in shares(x)]
            return tuple(zip(layers, each, strict=True))

        def total(x: Fraction) -> Fraction:
            edges = [*layers, self.layers]
            runs = [after - before for before, after in pairwise(edges)]
            kept = (run * share for run, (_, share) in zip(runs, at(x), strict=True))
            return sum(kept, Fraction(layers[0])) * self.tokens

        low, high = Fraction(0), Fraction(1)
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if total(middle) < self.average * self.layers else (low, middle)
            )
        return at(min(low, high, key=lambda x: abs(total(x) - self.average * self.layers)))

    def share(self, count: int | Fraction) -> Fraction:
        """The share that leaves a whole number of tokens, at least one and at most all."""
        whole = int(Fraction(count) + Fraction(1, 2))
        return Fraction(min(max(whole, 1), self.tokens), self.tokens)

    def positions(self, given: str | None, published: str) -> str:
        """The given value, or the published one if the model's positions allow it."""
        if given is not None and given not in POSITIONS:
            raise PlanError(f"positions {given!r} is unknown; choose one of {', '.join(POSITIONS)}")
        return given or (published if self.axes == 1 else "keep")


def as_whole(name: str, value: object, least: int) -> int:
    """An option that counts something."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PlanError(f"{name} {value!r} must be a whole number from {least}")
    return value


def as_fraction(name: str, value: object) -> Fraction:
    """An option that is a number."""
    try:
        return Fraction(value).limit_denominator(10**6)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        raise PlanError(f"{name} {value!r} is not a number") from None


def as_layers(layers: object, words: str = "") -> tuple[int, ...]:
    """An option that names layers; `words` are others that it takes."""
    numbers = tuple(layers) if isinstance(layers, Sequence) else ()
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        raise PlanError(f"layers {layers!r} must be {words}layer numbers, such as [1,2,4]")
    return numbers


def from_dict(data: dict[str, Any]) -> PruningPlan | Method:
    """The plan or method in a checkpoint's config.

    Raises:
        PlanError: an unknown method, unknown or ill-typed fields.
    """
    if "method" not in data:
        return PruningPlan.from_dict(data)
    name, values = data["method"], {key: data[key] for key in data if key != "method"}
    if name not in KINDS:
        import_module("adsc.peers")  # methods make themselves known when they are imported
    if name not in KINDS:
        raise PlanError(f"method {name!r} is unknown; known are {', '.join(sorted(KINDS))}")
    kind = KINDS[name]
    if unknown := set(values) - {field.name for field in fields(kind)}:
        raise PlanError(f"unknown fields {sorted(unknown)} in method {name!r}")
    return kind(**values)
