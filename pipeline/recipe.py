"""The compression recipe: from prepared data and a base checkpoint to a compressed one, as stages.

A workflow (see workflows/) brings a config and the stages that make its data; everything after
that is the same for the small demo and for a 7B model. Nothing here runs anything.
"""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from adsc.curriculum import curriculum
from adsc.plan import PlanError, PruningPlan
from pipeline.config import Config, ConfigError, edit
from pipeline.data.templates import NAMES
from pipeline.stage import Stage
from pipeline.stages.base import BASE_VERSION, BaseConfig, base, num_decoder_layers, pin_digest
from pipeline.stages.evaluate import EVALUATE_VERSION, ArmConfig, EvaluateConfig, evaluate
from pipeline.stages.export import EXPORT_VERSION, ExportConfig, export
from pipeline.stages.merge import MERGE_VERSION, MergeConfig, merge
from pipeline.stages.prepare import PREPARE_VERSION, PrepareConfig, prepare
from pipeline.stages.report import REPORT_VERSION, ReportConfig, report
from pipeline.stages.train import TRAIN_VERSION, train_stage
from pipeline.training.config import TrainConfig


class CurriculumConfig(Config):
    """The way to the target plan; see adsc.curriculum."""

    order: Literal["reverse", "forward", "fixed", "explicit"] = "reverse"
    """reverse: heaviest compression first. forward: mild first. fixed: the target throughout.
    explicit: the plans in `plans`."""
    stages: int = Field(3, ge=1)
    """Training stages, each one Ray Train run; `explicit` has one for each of its plans."""
    extreme: float = Field(1.5, gt=1)
    """The first stage's keep ratios are the target's to this power (or its inverse)."""
    plans: tuple[str, ...] = ()
    """For `explicit`: the plan of each training stage; the last is the target."""
    training: tuple[dict[str, Any], ...] = ()
    """Changes of `train` for single stages, one mapping each: `[{learning_rate: 1e-4}, {}, {}]`;
    empty trains all alike."""

    @model_validator(mode="after")
    def _plans_belong_to_explicit(self) -> Self:
        if bool(self.plans) != (self.order == "explicit"):
            raise ValueError(
                f"curriculum.order = {self.order} with {len(self.plans)} plans: list the plans of "
                "`explicit`, and of no other order, in curriculum.plans"
            )
        return self


class CompressConfig(Config):
    """Everything that decides what a compression computes."""

    plan: str
    """The target plan, such as `2:1/4,5:1/4`."""
    base: BaseConfig
    """The checkpoint to compress."""
    prepare: PrepareConfig = PrepareConfig()
    """Validation and rendering of the data."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """Plans of the training stages."""
    train: TrainConfig = TrainConfig()
    """One training stage; `plan` is filled in by the curriculum."""
    merge: MergeConfig = MergeConfig()
    """Folding the adapter in; `plan` is filled in."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Questions, batches and intervals; the arms are filled in."""
    export: ExportConfig = ExportConfig()
    """The published checkpoint."""
    report: ReportConfig = ReportConfig()
    """The page and the figure."""

    @model_validator(mode="after")
    def _leave_what_is_filled_in(self) -> Self:
        filled = {
            "train.plan": self.train.plan,
            "merge.plan": self.merge.plan,
            "evaluate.arms": self.evaluate.arms,
        }
        given = [name for name, value in filled.items() if value]
        if given:
            raise ValueError(f"{', '.join(given)} follow from `plan` and `curriculum`: set those")
        return self


def compress(config: CompressConfig, data: Stage) -> list[Stage]:
    """The stages of a compression; `data` is a stage that writes records and pictures.

    Besides the target plan a dense control is trained: same data, same steps, no drop.

    Raises:
        PlanError: a plan that is malformed or that names a layer which the base does not have.
    """
    layers = num_decoder_layers(config.base.source)
    if layers is not None:
        PruningPlan.parse(config.plan).check_layers(layers)
    if config.prepare.template not in NAMES:
        raise ValueError(
            f"prepare.template {config.prepare.template!r} is unknown; there are {', '.join(NAMES)}"
        )
    if config.train.lora is None and not config.train.tune:
        raise ValueError("nothing to train: set train.lora or train.tune")
    stages = [
        data,
        Stage(
            name="base",
            title="base: the checkpoint to compress",
            body=base,
            version=BASE_VERSION,
            config=pin_digest(config.base),
        ),
        Stage(
            name="prepare",
            title="prepare: real records to tokens",
            body=prepare,
            version=PREPARE_VERSION,
            config=config.prepare,
            needs={"data": data.name, "base": "base"},
        ),
    ]
    plans = training_plans(config)
    stages += _train_and_merge("train", "merge", plans, config)
    stages += _train_and_merge("control", "merge-control", [""] * len(plans), config)
    arms = (
        ArmConfig(name="dense", label="dense base", checkpoint="base", plan="", trained=False),
        ArmConfig(
            name="dense_lora",
            label="dense + LoRA",
            checkpoint="merge-control",
            plan="",
            trained=True,
        ),
        ArmConfig(
            name="plan_untrained",
            label="plan, untrained",
            checkpoint="base",
            plan=config.plan,
            trained=False,
        ),
        ArmConfig(
            name="plan_trained",
            label=f"plan, trained ({config.curriculum.order})",
            checkpoint="merge",
            plan=config.plan,
            trained=True,
        ),
    )
    trained = {s.name: s.name for s in stages if s.body is train_stage}
    checkpoints = {name: name for name in ("base", "merge", "merge-control")}
    stages += [
        Stage(
            name="evaluate",
            title="evaluate: every arm, same questions",
            body=evaluate,
            version=EVALUATE_VERSION,
            config=config.evaluate.model_copy(update={"arms": arms, "seed": config.train.seed}),
            needs={"data": "prepare", **checkpoints, **trained},
        ),
        Stage(
            name="export",
            title="export: the compressed checkpoint",
            body=export,
            version=EXPORT_VERSION,
            config=config.export,
            needs={"merge": "merge", "evaluate": "evaluate", "data": "prepare"},
        ),
        Stage(
            name="report",
            title="report: page and figure",
            body=report,
            version=REPORT_VERSION,
            config=config.report,
            needs={"evaluate": "evaluate"},
        ),
    ]
    return stages


def training_plans(config: CompressConfig) -> list[str]:
    """The plan of each training stage.

    Raises:
        PlanError: a malformed plan, or an explicit list that does not end with the target.
    """
    way, target = config.curriculum, PruningPlan.parse(config.plan)
    if way.order != "explicit":
        return [str(plan) for plan in curriculum(target, way.order, way.stages, way.extreme)]
    plans = [PruningPlan.parse(plan) for plan in way.plans]
    if plans[-1] != target:
        raise PlanError(
            f"curriculum.plans end with {way.plans[-1]!r}, the target is {config.plan!r}: the last "
            "training stage has to train what the finished model runs with"
        )
    return [str(plan) for plan in plans]


def training_configs(config: CompressConfig, plans: list[str]) -> list[TrainConfig]:
    """The config of each training stage: `train`, changed as the curriculum says.

    Raises:
        ConfigError: changes for another number of stages, or keys that `train` lacks.
    """
    changes = config.curriculum.training or ({},) * len(plans)
    if len(changes) != len(plans):
        raise ConfigError(
            f"curriculum.training has {len(changes)} entries for {len(plans)} training stages; "
            "write one for each, {} where nothing changes"
        )
    filled = sorted({"plan", "seed"} & {key for change in changes for key in change})
    if filled:
        raise ConfigError(f"curriculum.training may not set {', '.join(filled)}")
    return [
        # Each stage draws its own batches.
        edit(config.train, change).model_copy(
            update={"plan": plan, "seed": 1000 * config.train.seed + number}
        )
        for number, (plan, change) in enumerate(zip(plans, changes, strict=True), 1)
    ]


def _train_and_merge(
    prefix: str, merged: str, plans: list[str], config: CompressConfig
) -> list[Stage]:
    stages: list[Stage] = []
    for number, train in enumerate(training_configs(config, plans), 1):
        needs = {"base": "base", "data": "prepare"}
        if stages:
            needs["start"] = stages[-1].name
        stages.append(
            Stage(
                name=f"{prefix}-{number}",
                title=f"{prefix} {number}/{len(plans)}: LoRA with {train.plan or 'no drop'}",
                body=train_stage,
                version=TRAIN_VERSION,
                config=train,
                needs=needs,
            )
        )
    stages.append(
        Stage(
            name=merged,
            title=f"{merged}: adapter into base",
            body=merge,
            version=MERGE_VERSION,
            config=config.merge.model_copy(update={"plan": plans[-1]}),
            needs={"base": "base", "data": "prepare", "trained": stages[-1].name},
        )
    )
    return stages
