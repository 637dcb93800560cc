"""Config of an evaluation: its arms, its questions, and how they are put."""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config import ADDED, Config
from pipeline.evaluation.benchmarks import BENCHMARKS
from pipeline.evaluation.methods import MethodConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class ArmConfig(MethodConfig):
    """One checkpoint with one method; alone or with others of its group a row of the table."""

    name: str
    """Short name, unique; letters, digits, `_`, `.` and `-`."""
    label: str
    """Name for people."""
    checkpoint: str
    """The input that holds the model: `base`, or a merge stage's."""
    trained: bool = False
    """Whether the checkpoint was trained in this workflow."""
    group: str = ""
    """Arms of a group are one method trained with several seeds: their scores are pooled into one
    row of that name, with the first one's label."""
    seed: int | None = None
    """Seed of its training; arms of a group each have their own."""
    budget: str = Field("", json_schema_extra=ADDED)
    """Of a checkpoint with named plans: the name of this one, or `dense`."""
    curve: str = Field("", json_schema_extra=ADDED)
    """Rows of one curve are one checkpoint at several budgets: the report joins them."""

    @property
    def row(self) -> str:
        return self.group or self.name


class EvaluateConfig(Config):
    """What is compared, and how the answers are made."""

    title: str = ""
    """Title of the report."""
    task: str = ""
    """What the data is, in a few words."""
    arms: tuple[ArmConfig, ...] = ()
    """What answers; a row of the table each, or each group."""
    control: str = "dense_lora"
    """Name of the row that the others are compared with: the dense model trained alike."""
    splits: tuple[str, ...] = Field(("test",), min_length=1)
    """Splits of the prepared data to evaluate on."""
    template: Literal["data", "checkpoint"] = "data"
    """How questions are put: as in training (the prepared data's template), or as the checkpoint's
    own processor does."""
    benchmarks: tuple[str, ...] = Field((), json_schema_extra=ADDED)
    """Splits that are the public benchmarks of that name (pipeline/evaluation/benchmarks.py), and
    are scored by their rules; others by exact match."""
    engine: Literal["transformers", "vllm"] = Field("transformers", json_schema_extra=ADDED)
    """What answers. Times and memory are measured in transformers in any case."""
    batch_size: int = Field(64, gt=0)
    """Questions answered at a time."""
    max_new_tokens: int = Field(8, gt=0)
    """Longest answer in tokens."""
    compile: Literal["layers"] | None = Field(None, json_schema_extra=ADDED)
    """layers: torch.compile for each decoder layer, for answers and for what is timed; null runs
    eagerly. Other kernels round elsewhere, so single answers may differ."""
    shard_questions: int = Field(512, gt=0)
    """Questions in a piece of work: what a killed run repeats at most, for each worker."""
    prefill_batch: int = Field(32, gt=0)
    """Questions in the batch whose prefill and decoding are timed: the first with pictures."""
    prefill_rounds: int = Field(15, gt=0)
    """Timed prefills of each method; the methods take turns."""
    decode_tokens: int = Field(8, gt=1)
    """Tokens of a timed generation."""
    decode_rounds: int = Field(5, gt=0)
    """Timed generations of each method."""
    sample_pictures: int = Field(4, ge=0)
    """Pictures shown in the report with every arm's answers."""
    seed: int = Field(0, ge=0)
    """Seed of the bootstrap; a compression puts its training's seed here."""

    @field_validator("benchmarks")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in names if name not in BENCHMARKS]:
            raise ValueError(f"no benchmarks: {', '.join(unknown)}; of {', '.join(BENCHMARKS)}")
        return names

    @model_validator(mode="after")
    def _engine_takes_arms(self) -> Self:
        peers = [arm.name for arm in self.arms if arm.method is not None]
        if self.engine == "vllm" and peers:
            raise ValueError(
                f"arms {', '.join(peers)}: vLLM runs pruning plans and dense models only; leave "
                "peers out, or evaluate with engine = transformers"
            )
        return self

    @model_validator(mode="after")
    def _arms_make_rows(self) -> Self:
        names = [arm.name for arm in self.arms]
        bad = [name for name in names if not _NAME.fullmatch(name) or names.count(name) > 1]
        if bad:
            raise ValueError(
                f"arms {', '.join(bad)}: names are unique, of letters, digits, `_`, `.` and `-`"
            )
        for row in rows_of(self.arms):
            first, *others = row.arms
            seeds = [arm.seed for arm in row.arms]
            if any((a.plan, a.method) != (first.plan, first.method) for a in others):
                raise ValueError(f"arms of the group {row.name} have different methods")
            if others and (None in seeds or len(set(seeds)) < len(seeds)):
                raise ValueError(f"arms of the group {row.name} need a seed of their own each")
        return self


class Row(NamedTuple):
    """A row of the table: one arm, or the arms of a group."""

    name: str
    arms: list[ArmConfig]


def rows_of(arms: Sequence[ArmConfig]) -> list[Row]:
    rows: dict[str, Row] = {}
    for arm in arms:
        rows.setdefault(arm.row, Row(arm.row, [])).arms.append(arm)
    return list(rows.values())


def leading_arms(config: EvaluateConfig) -> list[ArmConfig]:
    return [row.arms[0] for row in rows_of(config.arms)]


def rule_of(config: EvaluateConfig, split: str) -> str:
    return BENCHMARKS[split].rule if split in config.benchmarks else "exact_match"
