"""The compression recipe: from prepared data and a base checkpoint to a compressed one, as stages.

A workflow (see workflows/) brings a config and the stages that make its data; everything after
that is the same for the small demo and for a 7B model. Nothing here runs anything.
"""

from collections.abc import Sequence
from typing import Self

from pydantic import model_validator

from adsc.curriculum import pressures
from adsc.plan import PlanError, PruningPlan
from pipeline.config import Config
from pipeline.data.templates import NAMES
from pipeline.search.config import FOUND, SearchConfig
from pipeline.stage import Stage
from pipeline.stages.base import BASE_VERSION, BaseConfig, base, num_decoder_layers, pin_digest
from pipeline.stages.evaluate import EVALUATE_VERSION, ArmConfig, EvaluateConfig, evaluate
from pipeline.stages.export import EXPORT_VERSION, ExportConfig, export, register_again
from pipeline.stages.merge import MERGE_VERSION, MergeConfig, merge
from pipeline.stages.prepare import PREPARE_VERSION, PrepareConfig, prepare
from pipeline.stages.report import REPORT_VERSION, ReportConfig, report
from pipeline.stages.search import (
    SEARCH_DATA_VERSION,
    SEARCH_VERSION,
    SearchDataConfig,
    SearchStageConfig,
    evaluate_found,
    merge_found,
    search,
    search_data,
    train_found,
)
from pipeline.stages.train import TRAIN_VERSION, train_stage
from pipeline.training.config import TrainConfig
from pipeline.training.curriculum import CurriculumConfig, configs_of, plans_of


class CompressConfig(Config):
    """Everything that decides what a compression computes."""

    plan: str
    """The target plan, such as `2:1/4,5:1/4`; `search` is the one that the search stage finds."""
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
    search: SearchConfig = SearchConfig()
    """For `plan = search`: the space, the budget and the study."""

    @model_validator(mode="after")
    def _leave_what_is_filled_in(self) -> Self:
        filled = {
            "train.plan": self.train.runs_with,
            "merge.plan": self.merge.runs_with,
            "evaluate.arms": self.evaluate.arms,
        }
        given = [name for name, value in filled.items() if value]
        if given:
            raise ValueError(f"{', '.join(given)} follow from `plan` and `curriculum`: set those")
        if self.plan == FOUND and self.curriculum.order == "explicit":
            raise ValueError(
                "plan = search and curriculum.order = explicit contradict: plans can't be listed "
                "before the target is found; choose reverse, forward or fixed"
            )
        return self

    @property
    def searched(self) -> bool:
        """Whether the plan comes from a search."""
        return self.plan == FOUND


def compress(config: CompressConfig, data: Stage) -> list[Stage]:
    """The stages of a compression; `data` is a stage that writes records and pictures.

    Besides the target plan a dense control is trained: same data, same steps, no drop.

    Raises:
        PlanError: a plan that is malformed or that names a layer which the base does not have.
    """
    layers = num_decoder_layers(config.base.source)
    if layers is not None and not config.searched:
        PruningPlan.parse(config.plan).check_layers(layers)
    if config.prepare.template not in NAMES:
        raise ValueError(
            f"prepare.template {config.prepare.template!r} is unknown; there are {', '.join(NAMES)}"
        )
    if config.train.lora is None and not config.train.tune:
        raise ValueError("nothing to train: set train.lora or train.tune")
    stages = [data, *base_and_prepare(data, config.base, config.prepare), *_search(config)]
    plans = training_plans(config)
    # Stages that run with a found plan are told by its stage, and known by its fingerprint.
    found = {FOUND: "search"} if config.searched else {}
    for prefix, merged, each in (
        ("train", "merge", plans),
        ("control", "merge-control", [""] * len(plans)),
    ):
        merging = config.merge.model_copy(update={"plan": each[-1]})
        stages += train_and_merge(prefix, merged, training_configs(config, each), merging)
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
    trained = {s.name: s.name for s in stages if s.body in (train_stage, train_found)}
    checkpoints = {name: name for name in ("base", "merge", "merge-control")}
    stages += [
        Stage(
            name="evaluate",
            title="evaluate: every arm, same questions",
            body=evaluate_found if config.searched else evaluate,
            version=EVALUATE_VERSION,
            config=config.evaluate.model_copy(update={"arms": arms, "seed": config.train.seed}),
            needs={"data": "prepare", **checkpoints, **trained, **found},
        ),
        Stage(
            name="export",
            title="export: the compressed checkpoint",
            body=export,
            complete=register_again,
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
            needs={"evaluate": "evaluate", **found},
        ),
    ]
    return stages


def base_and_prepare(data: Stage, checkpoint: BaseConfig, rendering: PrepareConfig) -> list[Stage]:
    """The stages `base` and `prepare`, which others need; `data` writes records and pictures."""
    return [
        Stage(
            name="base",
            title="base: the checkpoint to compress",
            body=base,
            version=BASE_VERSION,
            config=pin_digest(checkpoint),
        ),
        Stage(
            name="prepare",
            title="prepare: real records to tokens",
            body=prepare,
            version=PREPARE_VERSION,
            config=rendering,
            needs={"data": data.name, "base": "base"},
        ),
    ]


def training_plans(config: CompressConfig) -> list[str]:
    """The plan of each training stage; see `plans_of`. Those of a search are references
    (`found_plan`), as its own is."""
    if config.searched:
        way = config.curriculum
        each = pressures(way.order, way.stages, way.extreme)
        return [FOUND if pressure == 1 else f"{FOUND}^{pressure}" for pressure in each]
    return plans_of(config.curriculum, config.plan)


def training_configs(config: CompressConfig, plans: list[str]) -> list[TrainConfig]:
    """The config of each training stage; see `configs_of`."""
    return configs_of(config.curriculum, config.train, plans)


def _search(config: CompressConfig) -> list[Stage]:
    """The stages that find the plan; none where it is given.

    Raises:
        PlanError: a search without a budget.
    """
    if not config.searched:
        return []
    own = config.search
    try:
        own.budget  # noqa: B018  # raises
    except ValueError as error:
        raise PlanError(f"plan = search: {error} (as search.average=192)") from None
    held = {"rows": own.rows, "confirm_rows": own.confirm_rows, "seed": own.seed}
    # What doesn't change trials is left out of the search's identity.
    train = TrainConfig(precision=config.train.precision)
    way = CurriculumConfig()
    if own.fidelity != "untrained":
        train = config.train
    if own.fidelity == "curriculum":
        way = config.curriculum
    return [
        Stage(
            name="search-data",
            title="search-data: conversations for trials",
            body=search_data,
            version=SEARCH_DATA_VERSION,
            config=SearchDataConfig(train_rows=own.train_rows, **held),
            needs={"data": "prepare"},
        ),
        Stage(
            name="search",
            title=f"search: {own.trials} trials, {own.fidelity}",
            body=search,
            version=SEARCH_VERSION,
            config=SearchStageConfig(search=own, train=train, curriculum=way),
            needs={"base": "base", "data": "search-data"},
        ),
    ]


def train_and_merge(
    prefix: str, merged: str, trainings: Sequence[TrainConfig], merging: MergeConfig
) -> list[Stage]:
    """A chain of training stages on `base` and `prepare`, each from the adapter of the one before,
    and the stage that folds the last one's in.

    Args:
        prefix: of the training stages' names, which are numbered from 1.
        merged: the name of the last stage.
    """
    stages: list[Stage] = []
    searched = merging.plan == FOUND
    needs = {"base": "base", "data": "prepare", **({FOUND: "search"} if searched else {})}
    for number, train in enumerate(trainings, 1):
        start = {"start": stages[-1].name} if stages else {}
        stages.append(
            Stage(
                name=f"{prefix}-{number}",
                title=f"{prefix} {number}/{len(trainings)}: "
                f"LoRA with {train.runs_with or 'no drop'}",
                body=train_found if searched else train_stage,
                version=TRAIN_VERSION,
                config=train,
                needs=needs | start,
            )
        )
    stages.append(
        Stage(
            name=merged,
            title=f"{merged}: adapter into base",
            body=merge_found if searched else merge,
            version=MERGE_VERSION,
            config=merging,
            needs=needs | {"trained": stages[-1].name},
        )
    )
    return stages
