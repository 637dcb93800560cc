"""What `evaluate` hands to `report` in results.json, as types. Fields beyond these are left alone.

It checks shapes only; what the numbers mean is said where they are made, and in the report.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class ResultsError(ValueError):
    """results.json is missing or isn't what `evaluate` writes; the message names each field."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Interval(_Part):
    """A share or a difference of shares, with its 95 % interval."""

    mean: float
    low: float
    high: float


class Task(Interval):
    """Of one task of several, or a figure of a benchmark; what is paired with the control, but for
    the control itself."""

    difference: Interval | None = None
    retention: float | None = None


class Quartiles(_Part):
    """A measured time or rate: median and quartiles over rounds."""

    median: float
    low: float
    high: float


class Baseline(_Part):
    """Always answering the most frequent answer of the question's kind: of the training split, or
    (`questions`) of the questions themselves."""

    accuracy: float
    by_kind: dict[str, float]
    source: str = "train"


class Seed(_Part):
    """One of several training runs of an arm."""

    seed: int
    accuracy: float


class Arm(_Part):
    """One model as it was measured: dense, with a plan or with a peer; trained (perhaps with
    several seeds, which are pooled) or not."""

    name: str
    label: str
    plan: str
    """The plan, or the peer with its budget; empty is dense."""
    peer: bool = False
    trained: bool
    budget: str = ""
    """Name of the plan, of a checkpoint with several; `dense` for none of them."""
    curve: str = ""
    """What the arm is one budget of; empty for an arm by itself."""
    accuracy: Interval
    by_kind: dict[str, Interval]
    by_split: dict[str, Task] = {}
    """Of every split, or task file, where there are several."""
    difference: Interval | None = None
    retention: float | None = None
    retention_interval: Interval | None = None
    seeds: list[Seed] = []
    over_seeds: Interval | None = None
    """Mean accuracy over seeds with Student's interval; None for one seed."""
    difference_over_seeds: Interval | None = None
    """Difference from the control, paired by seed, likewise."""
    average_vision_tokens: float
    reduction: float
    tokens_per_layer: list[int]
    flops: int
    flops_reduction: float
    kv_cache_bytes: int
    kv_reduction: float
    prefill_ms: Quartiles
    prefill_speedup: float | None = None
    decode_tokens_per_s: Quartiles | None = None
    decode_speedup: float | None = None
    kv_measured_bytes: int | None = None
    peak_memory_bytes: int | None = None
    working_memory_bytes: int | None = None
    seconds_per_question: float | None = None


class Sample(_Part):
    """A question with each arm's answer; `picture` is a path inside the evaluate folder."""

    picture: str
    question: str
    expected: str
    answers: dict[str, str]


class Results(_Part):
    title: str
    task: str
    workflow: str
    seed: int
    commit: str | None
    config: dict[str, Any]
    num_questions: int
    num_pictures: int
    num_vision_tokens: int
    num_layers: int
    text_tokens: float
    prefill_batch: int | None = None
    decode_tokens: int | None = None
    device: str = ""
    dtype: str = ""
    control_arm: str = ""
    majority: Baseline
    arms: list[Arm]
    curves: dict[str, list[tuple[float, float]]] = {}
    samples: list[Sample] = []
    benchmarks: dict[str, dict[str, dict[str, Task]]] = {}
    """What public benchmarks make of scores beyond their mean: benchmark -> figure -> arm."""

    @classmethod
    def read(cls, path: Path) -> Results:
        """Load and check results.json.

        Raises:
            ResultsError: no such file, no JSON, or fields that are missing or of a wrong type.
        """
        try:
            # NaN is how JSON from Python says that there is no such number.
            data = json.loads(path.read_text(), parse_constant=lambda _: None)
            return cls.model_validate(data)
        except (OSError, json.JSONDecodeError) as error:
            raise ResultsError(
                f"can't read {path}: {error}; the evaluate stage writes it"
            ) from None
        except ValidationError as error:
            wrong = [
                f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].lower()}"
                for problem in error.errors()
            ]
            raise ResultsError(
                f"{path} isn't what the evaluate stage writes: {'; '.join(wrong)}"
            ) from None

    @property
    def compressed(self) -> Arm | None:
        """The arm that the finding is about: trained with a plan, the heaviest if there are
        more. Where no plan was trained, of the trained peers; else of all that drop tokens."""
        dropping = [arm for arm in self.arms if arm.plan]
        trained = [arm for arm in dropping if arm.trained]
        plans = [arm for arm in trained if not arm.peer]
        return max(plans or trained or dropping, key=lambda arm: arm.reduction, default=None)

    @property
    def series(self) -> dict[str, list[int]]:
        """Places of the arms of each curve, the cheapest first; a curve has two arms or more."""
        found: dict[str, list[int]] = {}
        for place, arm in enumerate(self.arms):
            if arm.curve:
                found.setdefault(arm.curve, []).append(place)
        return {
            name: sorted(places, key=lambda place: self.arms[place].average_vision_tokens)
            for name, places in found.items()
            if len(places) > 1
        }

    @property
    def control(self) -> Arm | None:
        """What the others are compared with: the dense model, trained in the same way where
        anything was trained; without one, another arm."""
        return next((arm for arm in self.arms if arm.name == self.control_arm), None)
