"""Types of results.json, which `evaluate` passes to `report`. Other fields are ignored.

Only shapes are checked; the numbers are explained where they are computed, and in the report.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class ResultsError(ValueError):
    """results.json is missing or isn't what `evaluate` writes; the message names each field."""


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True
    )


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
    """Name of the arm."""
    label: str
    """Name in tables."""
    plan: str
    """The plan, or the peer with its budget; empty is dense."""
    peer: bool = False
    """Whether the method is a peer rather than a plan."""
    trained: bool
    """Whether it was trained with its plan."""
    budget: str = ""
    """Name of the plan, of a checkpoint with several; `dense` for none of them."""
    curve: str = ""
    """What the arm is one budget of; empty for an arm by itself."""
    accuracy: Interval
    """Mean score of all questions, 0 to 1."""
    by_kind: dict[str, Interval]
    """The same by kind of question."""
    by_split: dict[str, Task] = {}
    """Of every split, or task file, where there are several."""
    difference: Interval | None = None
    """Difference from the control's accuracy, paired."""
    retention: float | None = None
    """Accuracy as a share of the control's."""
    retention_interval: Interval | None = None
    """The same with its interval."""
    seeds: list[Seed] = []
    """One entry per training, for an arm with several."""
    over_seeds: Interval | None = None
    """Mean accuracy over seeds with Student's interval; None for one seed."""
    difference_over_seeds: Interval | None = None
    """Difference from the control, paired by seed, likewise."""
    average_vision_tokens: float
    """Vision tokens that enter a layer, mean over layers."""
    reduction: float
    """Share of these that is saved."""
    tokens_per_layer: list[int]
    """Vision tokens that enter each layer."""
    flops: int
    """FLOPs of a prefill, convention `exact`."""
    flops_reduction: float
    """Share of the dense model's that is saved."""
    kv_cache_bytes: int
    """KV cache of a prefill, computed."""
    kv_reduction: float
    """Share of the dense model's that is saved."""
    prefill_ms: Quartiles
    """Milliseconds of a batch's prefill."""
    prefill_speedup: float | None = None
    """Dense time over this one."""
    decode_tokens_per_s: Quartiles | None = None
    """Tokens a second after the first token."""
    decode_speedup: float | None = None
    """This rate over the dense one."""
    kv_measured_bytes: int | None = None
    """KV cache of the batch as measured, padding included."""
    peak_memory_bytes: int | None = None
    """Highest memory of generating."""
    working_memory_bytes: int | None = None
    """How much of it was not in use before."""
    seconds_per_question: float | None = None
    """Wall time of an answer."""


class Sample(_Part):
    """A question with each arm's answer; `picture` is a path inside the evaluate folder."""

    picture: str
    question: str
    expected: str
    answers: dict[str, str]


class Results(_Part):
    """results.json as a whole."""

    title: str
    """Title of the report."""
    task: str
    """The task, in words."""
    workflow: str
    """Name of the workflow."""
    seed: int
    """Seed of the training."""
    commit: str | None
    """Git commit of the code."""
    config: dict[str, Any]
    """Config of the evaluation."""
    num_questions: int
    """Questions that each arm answered."""
    num_pictures: int
    """Distinct pictures of these questions."""
    num_vision_tokens: int
    """Vision tokens of a question before any drop, mean over the timed batch."""
    num_layers: int
    """Decoder layers."""
    text_tokens: float
    """Text tokens of a question, mean over the timed batch."""
    prefill_batch: int | None = None
    """Questions in the batch that was timed."""
    decode_tokens: int | None = None
    """Tokens of a timed generation."""
    device: str = ""
    """The device of the measurements."""
    dtype: str = ""
    """Of the weights."""
    control_arm: str = ""
    """Name of the arm that the others are compared with."""
    majority: Baseline
    """The baseline without a model."""
    arms: list[Arm]
    """One entry per arm."""
    curves: dict[str, list[tuple[float, float]]] = {}
    """Training losses by stage, as pairs (step, loss)."""
    samples: list[Sample] = []
    """Some questions with every arm's answer."""
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
