"""The compression recipe: from prepared data and a base checkpoint to a compressed one, as stages.

A workflow (see workflows/) brings a config and the stages that make its data; everything after
that is the same for the small demo and for a 7B model. Nothing here runs anything.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, StringConstraints, model_validator

from adsc.curriculum import pressures
from adsc.named import DENSE
from adsc.plan import PlanError, PruningPlan
from pipeline.config import ADDED, Config, edit
from pipeline.data.config import PrepareConfig
from pipeline.data.templates import NAMES
from pipeline.durable.stage import Stage
from pipeline.evaluation.config import ArmConfig, EvaluateConfig
from pipeline.evaluation.methods import FoundPlan, Plan
from pipeline.kinds.base import BASE, BaseConfig, num_decoder_layers, pin_digest
from pipeline.kinds.evaluate import EVALUATE
from pipeline.kinds.export import EXPORT, ExportConfig
from pipeline.kinds.merge import MERGE, MergeConfig
from pipeline.kinds.prepare import PREPARE
from pipeline.kinds.report import REPORT, ReportConfig
from pipeline.kinds.search import SEARCH, SEARCH_DATA, SearchDataConfig, SearchStageConfig
from pipeline.kinds.train import TRAIN
from pipeline.search.config import SearchConfig
from pipeline.search.keys import with_settings
from pipeline.training.config import TrainConfig
from pipeline.training.curriculum import WITHIN_ONE, CurriculumConfig, configs_of, plans_of

RESERVED = (
    *("train", "control", "merge", "plan", "dense", "base"),
    *("dense_lora", "plan_untrained", "plan_trained"),
)
"""Names that no compared recipe can have: those of other arms and stages."""
Compared = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,30}$")]
"""Name of a compared recipe: its arm has it, and its stages' names begin with it."""


class ComparedConfig(Config):
    """Another recipe, trained and evaluated on the same data and questions as the own one."""

    label: str
    """Name of its row in the table."""
    plan: str
    """Its target plan."""
    curriculum: CurriculumConfig = CurriculumConfig(order="fixed", stages=1)
    """Its curriculum; any but `elastic`."""
    train: dict[str, Any] = {}
    """Changes of the own `train`, such as `{steps: 100, distill: null}`."""

    @model_validator(mode="after")
    def _trains_one_plan(self) -> Self:
        if self.curriculum.order == "elastic":
            raise ValueError(
                "a compared recipe has one plan, so its curriculum can't be elastic; choose "
                "reverse, forward, fixed, grow or explicit"
            )
        return self


class CompressConfig(Config):
    """Everything that decides what a compression computes."""

    COMPARED_BY: ClassVar[tuple[str, ...]] = (
        "plan",
        "base.source",
        "curriculum.order",
        "curriculum.stages",
        "train.steps",
        "train.epochs",
        "train.batch_size",
        "train.learning_rate",
        "train.lora.rank",
        "train.distill.weight",
        "train.seed",
    )

    plan: Plan
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
    compare: dict[Compared, ComparedConfig] = Field({}, json_schema_extra=ADDED)
    """Other recipes by name, each an arm beside the own one; `{}` trains none of them."""

    @model_validator(mode="after")
    def _leave_what_is_filled_in(self) -> Self:
        filled = {
            "train.plan": self.train.runs_with,
            "merge.plan": self.merge.runs_with,
            "merge.plans": self.merge.plans,
            "train.plans": self.train.plans,
            "train.weights": self.train.weights,
            "train.grow": self.train.grow,
            "evaluate.arms": self.evaluate.arms,
        }
        given = [name for name, value in filled.items() if value]
        if given:
            raise ValueError(f"{', '.join(given)} follow from `plan` and `curriculum`: set those")
        budgets = {f"elastic_{name}" for name in (*self.curriculum.elastic, DENSE)}
        if taken := [name for name in self.compare if name in budgets.union(RESERVED)]:
            raise ValueError(f"compare.{taken[0]}: that name is taken; choose one such as paper")
        if isinstance(self.plan, FoundPlan) and self.plan != FoundPlan():
            raise ValueError(
                f"plan = {self.plan}: the target is the found plan itself; write plan = search, "
                "and let curriculum.order and curriculum.extreme set the pressure of each training"
            )
        for key, one in self.search.ranges.items():
            for value in one.values:
                with_settings(self.train, [(key, value)])
        if self.searched and self.curriculum.order in ("explicit", "elastic"):
            raise ValueError(
                f"plan = search and curriculum.order = {self.curriculum.order} contradict: plans "
                "can't be listed before the target is found; choose reverse, forward, fixed or grow"
            )
        return self

    @property
    def searched(self) -> bool:
        """Whether the plan comes from a search."""
        return isinstance(self.plan, FoundPlan)


def compress(config: CompressConfig, data: Stage) -> list[Stage]:
    """The stages of a compression; `data` is a stage that writes records and pictures.

    Besides the target plan a dense control is trained: same data, same steps, no drop; and the
    recipes in `compare`.

    Raises:
        PlanError: a plan that is malformed or that names a layer which the base does not have.
    """
    layers = num_decoder_layers(config.base.source)
    if layers is not None and not isinstance(config.plan, FoundPlan):
        compared = (other.plan for other in config.compare.values())
        for plan in (config.plan, *config.curriculum.elastic.values(), *compared):
            PruningPlan.parse(plan).check_layers(layers)
    if config.prepare.template not in NAMES:
        raise ValueError(
            f"prepare.template {config.prepare.template!r} is unknown; there are {', '.join(NAMES)}"
        )
    if config.train.lora is None and not config.train.tune:
        raise ValueError("nothing to train: set train.lora or train.tune")
    stages = [data, *base_and_prepare(data, config.base, config.prepare), *_search(config)]
    for name, trainings in branches(config).items():
        named = dict(config.curriculum.elastic) if name == "train" else {}
        merging = config.merge.model_copy(update={"plan": trainings[-1].plan, "plans": named})
        stages += train_and_merge(name, _merged(name), trainings, merging)
    arms = _arms(config)
    trained = {s.name: s.name for s in stages if s.kind == TRAIN}
    checkpoints = {name: name for name in ("base", *map(_merged, branches(config)))}
    stages += [
        EVALUATE.stage(
            name="evaluate",
            title="evaluate: every arm, same questions",
            config=config.evaluate.model_copy(update={"arms": arms, "seed": config.train.seed}),
            needs={"data": "prepare", **checkpoints, **trained},
        ),
        EXPORT.stage(
            name="export",
            title="export: the compressed checkpoint",
            config=config.export,
            needs={"merge": "merge", "evaluate": "evaluate", "data": "prepare"},
        ),
        REPORT.stage(
            name="report",
            title="report: page and figure",
            config=config.report,
            needs={"evaluate": "evaluate", **({"search": "search"} if config.searched else {})},
        ),
    ]
    return stages


def branches(config: CompressConfig) -> dict[str, list[TrainConfig]]:
    """The trainings of each checkpoint that is made, by the prefix of their stages: the own recipe,
    its dense control (as many steps, no drop), and the recipes that are compared.

    Raises:
        PlanError: a curriculum that doesn't fit its plan.
        ConfigError: changes of `train` that it can't take.
    """
    plans = training_plans(config)
    trainings = {
        "train": training_configs(config, plans),
        "control": training_configs(config, [""] * len(plans)),
    }
    for name, other in config.compare.items():
        train = edit(config.train, other.train)
        trainings[name] = configs_of(
            other.curriculum, train, plans_of(other.curriculum, other.plan)
        )
    return trainings


def _merged(branch: str) -> str:
    """The stage that folds in what a branch has trained."""
    return "merge" if branch == "train" else f"merge-{branch}"


def _arms(config: CompressConfig) -> tuple[ArmConfig, ...]:
    """What is compared: the base, the control, the plan untrained and trained; of an elastic
    checkpoint every plan that it names, and dense."""
    return (
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
        *(
            ArmConfig(
                name=name,
                label=other.label,
                checkpoint=_merged(name),
                plan=other.plan,
                trained=True,
            )
            for name, other in config.compare.items()
        ),
        *_trained_arms(config),
    )


def _trained_arms(config: CompressConfig) -> list[ArmConfig]:
    budgets = config.curriculum.elastic
    if not budgets:
        order = config.curriculum.order
        return [
            ArmConfig(
                name="plan_trained",
                label=f"plan, trained ({order})",
                checkpoint="merge",
                plan=config.plan,
                trained=True,
            )
        ]
    return [
        ArmConfig(
            name=f"elastic_{name}",
            label=f"elastic, {name}",
            checkpoint="merge",
            plan=plan,
            trained=True,
            budget=name,
            curve="elastic checkpoint",
        )
        for name, plan in [*budgets.items(), (DENSE, "")]
    ]


def base_and_prepare(data: Stage, checkpoint: BaseConfig, rendering: PrepareConfig) -> list[Stage]:
    """The stages `base` and `prepare`, which others need; `data` writes records and pictures."""
    return [
        BASE.stage(
            name="base",
            title="base: the checkpoint to compress",
            config=pin_digest(checkpoint),
        ),
        PREPARE.stage(
            name="prepare",
            title="prepare: real records to tokens",
            config=rendering,
            needs={"data": data.name, "base": "base"},
        ),
    ]


def training_plans(config: CompressConfig) -> list[str] | list[FoundPlan]:
    """The plan of each training stage; see `plans_of`. Those of a search are references, as its own
    is."""
    curriculum = config.curriculum
    if isinstance(config.plan, FoundPlan):
        if curriculum.order in WITHIN_ONE:
            return [FoundPlan()]
        each = pressures(curriculum.order, curriculum.stages, curriculum.extreme)
        return [FoundPlan(pressure=pressure) for pressure in each]
    return plans_of(curriculum, config.plan)


def training_configs(config: CompressConfig, plans: Sequence[str | FoundPlan]) -> list[TrainConfig]:
    """The config of each training stage; see `configs_of`."""
    return configs_of(config.curriculum, config.train, plans)


def _search(config: CompressConfig) -> list[Stage]:
    """The stages that find the plan; none where it is given.

    Raises:
        PlanError: a search without a budget.
    """
    if not config.searched:
        return []
    search = config.search
    try:
        search.budget  # noqa: B018  # raises
    except ValueError as error:
        raise PlanError(f"plan = search: {error} (as search.average=192)") from None
    rows = {"rows": search.rows, "confirm_rows": search.confirm_rows, "seed": search.seed}
    # What doesn't change trials is left out of the search's identity.
    train = TrainConfig(precision=config.train.precision)
    curriculum = CurriculumConfig()
    if search.fidelity != "untrained":
        train = config.train
    if search.fidelity == "curriculum":
        curriculum = config.curriculum
    return [
        SEARCH_DATA.stage(
            name="search-data",
            title="search-data: conversations for trials",
            config=SearchDataConfig(train_rows=search.train_rows, **rows),
            needs={"data": "prepare"},
        ),
        SEARCH.stage(
            name="search",
            title=f"search: {search.trials} trials, {search.fidelity}",
            config=SearchStageConfig(search=search, train=train, curriculum=curriculum),
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
    needs = {"base": "base", "data": "prepare"}
    for number, train in enumerate(trainings, 1):
        start = {"start": stages[-1].name} if stages else {}
        stages.append(
            TRAIN.stage(
                name=f"{prefix}-{number}",
                title=f"{prefix} {number}/{len(trainings)}: "
                f"LoRA with {train.runs_with or 'no drop'}",
                config=train,
                needs=needs | start,
            )
        )
    stages.append(
        MERGE.stage(
            name=merged,
            title=f"{merged}: adapter into base",
            config=merging,
            needs=needs | {"trained": stages[-1].name},
        )
    )
    return stages
