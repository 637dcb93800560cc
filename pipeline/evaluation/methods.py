"""Methods that models are trained and evaluated with: plans, or peers at a layer average; as text.

The methods themselves are adsc's. A peer is fitted to the model that it is attached to.
"""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from pipeline.config import Config
from pipeline.durable.reference import Reference
from pipeline.values import ValueSyntaxError, read_value

PLAN = "plan:"
OWN = "own"
"""The plan in a checkpoint's config; `own:64` is the one of that name."""


class MethodError(ValueError):
    """An unknown method, or one that can't be parsed."""


class PeerConfig(Config):
    """A published method to compare with, at a layer average (adsc.peers.make)."""

    name: str
    """Its name in adsc.peers: fastv, pyramiddrop, random, ..."""
    average: float = Field(gt=0)
    """Vision tokens of one picture that enter a decoder layer, mean over layers."""
    options: dict[str, str | int | float | bool | tuple[int, ...]] = {}
    """Further arguments of the method; what is left out is the paper's."""

    def __str__(self) -> str:
        options = [f"{name}={_written(value)}" for name, value in self.options.items()]
        return ",".join([f"{self.name}:{self.average:g}", *options])


def _written(value: object) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


class FoundPlan(Reference):
    """The plan that a search finds, or that one under a pressure (adsc.curriculum).

    >>> str(FoundPlan(pressure=1.5))
    'search^1.5'
    >>> FoundPlan(pressure=2).value({"plan": "2:1/4"})
    '2:1/16'
    """

    stage: str = "search"
    pressure: float = 1.0

    def __str__(self) -> str:
        return self.stage if self.pressure == 1 else f"{self.stage}^{self.pressure}"

    def value(self, outputs: Mapping[str, Any]) -> str:
        from adsc.curriculum import scale_plan
        from adsc.plan import PruningPlan

        plan = PruningPlan.parse(outputs["plan"])
        return str(plan if self.pressure == 1 else scale_plan(plan, self.pressure))


def read_plan(text: object) -> object:
    """A plan as configs have it: `search` and `search^1.5` are references, other text is a plan.

    Raises:
        ValueError: it is neither text nor a reference.
    """
    if isinstance(text, FoundPlan):
        return text
    if not isinstance(text, str):
        raise ValueError("a plan is text, such as 2:1/4,5:1/4")
    stage, sign, pressure = text.partition("^")
    if stage != FoundPlan().stage:
        return text
    if not sign:
        return FoundPlan()
    value = float(pressure)
    if not 0 < value < math.inf:
        raise ValueError(f"{text}: the pressure must be a number above 0, as in search^1.5")
    return FoundPlan(pressure=value)


Plan = Annotated[str | FoundPlan, BeforeValidator(read_plan)]
"""The type of a config's plan: text, or a reference to a search's."""


class MethodConfig(Config):
    """A plan or a peer; neither is the dense model."""

    plan: Plan = ""
    """A pruning plan as text, or a reference to the one that a search finds."""
    method: PeerConfig | None = None
    """A peer instead of a plan."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.plan and self.method:
            raise ValueError(
                f"plan '{self.plan}' and method '{self.method}': a model runs with one of them"
            )
        return self

    @property
    def runs_with(self) -> str:
        """The plan or the peer as text; empty for the dense model."""
        return str(self.method) if self.method else str(self.plan)


def parse_method(text: str) -> MethodConfig:
    """A method as people write it: `dense`, `plan:2:1/4,4:1/4`, `fastv:22`, `fastv:22,layer=3`,
    `pyramiddrop:9,layers=[1,2,3]`.

    Raises:
        MethodError: none of these.

    >>> str(parse_method("pyramiddrop:9,layers=[1,2,3]").method)
    'pyramiddrop:9,layers=[1,2,3]'
    >>> parse_method("plan:2:1/4").plan
    '2:1/4'
    """
    import adsc  # a process that only names methods loads no torch

    text = text.strip()
    if text == "dense":
        return MethodConfig()
    if text.startswith(PLAN):
        if not adsc.PruningPlan.parse(text.removeprefix(PLAN)).stages:
            raise MethodError(f"{text!r} drops nothing: write dense")
        return MethodConfig(plan=text.removeprefix(PLAN))
    name, colon, rest = text.partition(":")
    if name == OWN:
        raise MethodError(f"{text!r} is a checkpoint's own plan, and none is at hand here")
    average, *options = re.split(r",(?![^\[]*\])", rest)  # at commas outside of brackets
    try:
        budget = float(average)
    except ValueError:
        budget = 0.0
    if (
        not colon
        or not name
        or not 0 < budget < math.inf
        or any("=" not in option for option in options)
    ):
        raise MethodError(
            f"{text!r} is not a method: write dense, plan:2:1/4,4:1/4 (layer:share), or a peer "
            "with its layer average and options, fastv:22 or fastv:22,layer=3"
        )
    try:
        pairs = (option.partition("=") for option in options)
        named = {key: read_value(value) for key, _, value in pairs}
        if any(isinstance(it, str) and it.startswith(("[", "{")) for it in named.values()):
            raise ValueSyntaxError("a bracket that is never closed")
        return MethodConfig(method=PeerConfig(name=name, average=budget, options=named))
    except (ValueSyntaxError, ValidationError):
        raise MethodError(
            f"the options of {text!r} can't be read: write them as in fastv:22,layer=3 or "
            "pyramiddrop:22,layers=[1,2,4]"
        ) from None


def build_method(config: MethodConfig, model: Any) -> Any:
    """What adsc.attach takes, fitted to the model."""
    import adsc

    peer = config.method
    if peer is None:
        return adsc.PruningPlan.parse(str(config.plan))
    options: dict[str, Any] = dict(peer.options)  # the peer checks names and values
    return adsc.peers.make(peer.name, model, average=peer.average, **options)
