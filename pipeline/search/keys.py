"""Keys of the training that a search varies besides the placement, or alone: ranges as text,
draws, and the training of a draw.

    1e-4..1e-2,log     any number in between, evenly on a logarithmic scale
    0..1               any number in between; whole ones where the key takes whole numbers
    8,16,32            one of these

Nothing here trains, or knows placements.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Union, get_args, get_origin

from pipeline.config import Config, edit
from pipeline.training.config import DistillSettings, LoraSettings, TrainConfig

if TYPE_CHECKING:
    import numpy as np

PREFIX = "train."
TAKEN = ("plan", "method", "plans", "weights", "grow", "seed", "steps", "epochs", "carry_optimizer")
"""Keys that a trial sets itself."""
Settings = tuple[tuple[str, Any], ...]
"""Keys and values of one trial; empty for the workflow's own."""


class KeyProblem(ValueError):
    """A key or a range that can't be searched."""


class Range(NamedTuple):
    """The allowed values of a key."""

    values: tuple[Any, ...]
    """One of these; or the ends of an interval."""
    interval: bool = False
    log: bool = False
    whole: bool = False
    """Whole numbers of the interval only."""

    def draw(self, rng: np.random.Generator) -> Any:
        """A value, drawn uniformly."""
        if not self.interval:
            return self.values[int(rng.integers(len(self.values)))]
        low, high = self.values
        if self.whole and not self.log:
            return int(rng.integers(low, high + 1))
        if self.log:
            drawn = math.exp(rng.uniform(math.log(low), math.log(high)))
        else:
            drawn = float(rng.uniform(low, high))
        return min(high, max(low, round(drawn))) if self.whole else drawn

    def holds(self, value: Any) -> bool:
        """Whether a value is in the range."""
        if not self.interval:
            return value in self.values
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.values[0] <= value <= self.values[1]

    def distribution(self) -> Any:
        """The range as an Optuna distribution."""
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        if not self.interval:
            return CategoricalDistribution(self.values)
        kind: Any = IntDistribution if self.whole else FloatDistribution
        return kind(*self.values, log=self.log)


def full_key(key: str) -> str:
    """`lora.rank` is short for `train.lora.rank`."""
    known = key.partition(".")[0] in TrainConfig.model_fields
    return PREFIX + key if known else key


def read_range(key: str, text: str) -> Range:
    """The range of a key, from text.

    Raises:
        KeyProblem: a key that a search can't vary, or a malformed range.
    """
    if not key.startswith(PREFIX) or key.removeprefix(PREFIX).partition(".")[0] in TAKEN:
        raise KeyProblem(
            f"search.over can't vary {key}: it takes keys of the training, such as "
            f"train.learning_rate or train.lora.rank, but not {', '.join(TAKEN)}"
        )
    whole = _is_whole(key)
    body, comma, word = text.rpartition(",")
    log = bool(comma) and word.strip() == "log"
    body = body if log else text
    low, dots, high = body.partition("..")
    if not dots:
        values = tuple(_value(part) for part in body.split(","))
        if log or len(values) < 2 or len(set(values)) < len(values):
            raise KeyProblem(_malformed(key, text))
        return Range(values)
    ends = (_value(low), _value(high))
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends)
    if not numbers or not ends[0] < ends[1] or (log and ends[0] <= 0):
        raise KeyProblem(_malformed(key, text))
    if whole and any(end != int(end) for end in ends):
        raise KeyProblem(f"{key} takes whole numbers, its range is {text!r}")
    kind = int if whole else float
    return Range((kind(ends[0]), kind(ends[1])), interval=True, log=log, whole=whole)


def _malformed(key: str, text: str) -> str:
    return (
        f"the range {text!r} of {key} can't be read: write values, as 8,16,32, or an interval from "
        "low to high, as 0..1, or 1e-4..1e-2,log for one above 0 on a logarithmic scale"
    )


def _value(text: str) -> Any:
    import yaml

    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text.strip()


def _is_whole(key: str) -> bool:
    """Whether a key of the training takes whole numbers.

    Raises:
        KeyProblem: there is no such key.
    """
    kind: Any = TrainConfig
    for name in key.removeprefix(PREFIX).split("."):
        kinds = [kind] if not _is_union(kind) else list(get_args(kind))
        section = next(
            (it for it in kinds if isinstance(it, type) and issubclass(it, Config)), None
        )
        if section is None or name not in section.model_fields:
            raise KeyProblem(
                f"search.over varies {key}, which the training does not have; its keys are listed "
                "by `adsc show WORKFLOW --config`"
            )
        kind = section.model_fields[name].annotation
    return kind is int or (_is_union(kind) and int in get_args(kind))


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def drawn(ranges: Mapping[str, Range], rng: np.random.Generator) -> Settings:
    """A value for each key."""
    return tuple((key, one.draw(rng)) for key, one in ranges.items())


def own_settings(train: TrainConfig, ranges: Mapping[str, Range]) -> Settings:
    """The values that a training has, in the keys' order; empty if one is outside of its range."""
    found = []
    for key, one in ranges.items():
        value: Any = train
        for name in key.removeprefix(PREFIX).split("."):
            value = getattr(value, name, None)
        if key == "train.distill.weight" and value is None:
            value = 0.0
        if not one.holds(value):
            return ()
        found.append((key, value))
    return tuple(found)


def with_settings(train: TrainConfig, settings: Sequence[tuple[str, Any]]) -> TrainConfig:
    """A training with a trial's settings. Sections that it leaves out are begun with their
    defaults; a distillation of weight 0 is none.

    Raises:
        ConfigError: a value that its key does not take.
    """
    changes = {key.removeprefix(PREFIX): value for key, value in settings}
    without = changes.get("distill.weight") == 0
    if without:
        changes = {key: it for key, it in changes.items() if not key.startswith("distill.")}
        train = train.model_copy(update={"distill": None})
    begun: dict[str, Any] = {"distill": DistillSettings(), "lora": LoraSettings()}
    for name, section in begun.items():
        if getattr(train, name) is None and any(key.startswith(f"{name}.") for key in changes):
            train = train.model_copy(update={name: section})
    return edit(train, changes)


def written(settings: Sequence[tuple[str, Any]]) -> str:
    """Settings as text: `train.learning_rate=0.001 train.lora.rank=8`."""
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in settings
    )
