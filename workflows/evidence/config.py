"""Config of the evidence: budgets, recipes, and the arms and trainings that follow from them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import Field

from adsc.curriculum import curriculum
from pipeline.config import ADDED, Config, edit
from pipeline.data.config import PrepareConfig
from pipeline.evaluation.config import ArmConfig, EvaluateConfig
from pipeline.evaluation.methods import MethodConfig, PeerConfig
from pipeline.kinds.base import BaseConfig
from pipeline.training.config import TrainConfig
from workflows.demo.pictures import FashionConfig
from workflows.demo.tiny_base import TinyBaseConfig
from workflows.stamps.base import StampsBaseConfig
from workflows.stamps.scenes import ScenesConfig

VARIANTS = {
    "adsc": ("ADSC", "", "fixed"),
    "adsc_reverse": ("ADSC, reverse", "", "reverse"),
    "adsc_forward": ("ADSC, forward", "", "forward"),
    "adsc_first": ("ADSC, first", ";anchor=first", "fixed"),
    "adsc_center": ("ADSC, center", ";anchor=center", "fixed"),
    "adsc_grid": ("ADSC, grid", ";anchor=grid", "fixed"),
    "adsc_reindex": ("ADSC, reindex", ";positions=reindex", "fixed"),
}
"""Trained with our plan: label, its options, curriculum. `adsc` (anchor last, positions kept,
the target throughout) is what the others differ from in one thing each."""


ANCHORS = ("adsc", "adsc_first", "adsc_center", "adsc_grid")
"""Variants that are evaluated untrained, too."""


TRAINED_PEERS = ("fastv", "pyramiddrop", "visionzip")
"""Peers that are trained by the same recipe, at their target throughout."""


CONTROL = "dense_lora"


class AdaptedConfig(Config):
    """A base for pictures or answers that the shipped one has not seen: the shipped one, trained
    further, with every token of a picture."""

    source: BaseConfig
    """The checkpoint to begin with."""
    decoder: TrainConfig
    """Its training on the evidence's own training pictures."""


class BudgetConfig(Config):
    """One layer average of vision tokens, and what meets it."""

    name: str
    """In the arms' names."""
    label: str
    """For people."""
    plan: str
    """Our plan; anchor and positions are the variants'."""
    peers: tuple[PeerConfig, ...]
    """Every peer that reaches it, with the options by which it does."""


class Recipe(Config):
    """An arm of a ladder at one budget: what it is evaluated with, and how it is trained."""

    name: str
    """In the arm's name, NAME-BUDGET; the same at every budget."""
    label: str
    """For people."""
    budget: str
    """Name of the budget that it meets."""
    plan: str = ""
    """The plan that it is evaluated with."""
    method: PeerConfig | None = None
    """A peer instead of a plan."""
    stages: tuple[str, ...] = ()
    """Plans of its training stages; none: one stage with what it is evaluated with."""
    train: dict[str, Any] = {}
    """What differs from the evidence's `train` in each of its stages."""
    tier: int = Field(1, ge=0)
    """Arms of smaller tier run first, with all their seeds."""


class EvidenceConfig(Config):
    """All that decides what is compared."""

    base: BaseConfig
    """The checkpoint that all arms start from."""
    made: TinyBaseConfig | StampsBaseConfig | AdaptedConfig | None = None
    """How that checkpoint is trained, where it does not ship; from nothing on one machine only."""
    data: FashionConfig | ScenesConfig
    """Pictures and questions."""
    prepare: PrepareConfig
    """Their rendering."""
    budgets: tuple[BudgetConfig, ...]
    """What is compared with one another."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which of VARIANTS are trained."""
    anchors: tuple[str, ...] = Field(ANCHORS, json_schema_extra=ADDED)
    """Which of VARIANTS are evaluated untrained, too."""
    trained_peers: tuple[str, ...] = Field(TRAINED_PEERS, json_schema_extra=ADDED)
    """Which of the budgets' peers are trained, too."""
    recipes: tuple[Recipe, ...] = Field((), json_schema_extra=ADDED)
    """Arms instead of variants, anchors and trained peers."""
    questions: str = Field("test", json_schema_extra=ADDED)
    """The split whose questions are evaluated; SPLIT_turns puts each after the turn before it."""
    control_splits: tuple[str, ...] = Field((), json_schema_extra=ADDED)
    """Splits besides `test` for the dense base only: what it answers without looking."""
    train: TrainConfig
    """One training stage of every arm; plan or method, and the seed, are filled in."""
    stages: int = Field(3, ge=1)
    """Training stages of every arm, whether its curriculum changes the plan or not."""
    extreme: float = Field(1.5, gt=1)
    """Pressure of the first stage of reverse and forward (adsc.curriculum)."""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """Each arm is trained once with each: order of the data and the adapter's initial values."""
    evaluate: EvaluateConfig
    """Questions and measurements; the arms are filled in."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of a table."""

    name: str
    """Unique over all budgets."""
    label: str
    method: MethodConfig
    """What it is evaluated with."""
    trained_with: tuple[MethodConfig, ...] = ()
    """What each of its training stages runs with; none: it is the base."""
    split: str = "test"
    """Whose questions it answers."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the evidence's training."""
    tier: int = 0
    """When it is run."""


def arms(config: EvidenceConfig, budget: BudgetConfig) -> list[Arm]:
    """Dense, the dense controls, everything untrained, everything trained."""
    if config.recipes:
        made = [*_dense(config), *_controls_of_steps(config), *_recipes(config, budget)]
    else:
        made = [*_dense(config), *_untrained(config, budget), *_trained(config, budget)]
    return [replace(arm, split=config.questions) for arm in made]


def _dense(config: EvidenceConfig) -> Iterator[Arm]:
    dense = MethodConfig()
    yield Arm(name="dense", label="dense base", method=dense)
    yield Arm(
        name=CONTROL, label="dense + LoRA", method=dense, trained_with=(dense,) * config.stages
    )


def _controls_of_steps(config: EvidenceConfig) -> Iterator[Arm]:
    """The dense model trained for as many steps as any recipe, but for those of CONTROL."""
    tiers: dict[str, int] = {}
    each = {budget.name: list(_recipes(config, budget)) for budget in config.budgets}
    for arm in (arm for own in each.values() for arm in own if arm.trained_with):
        name = control_of(config, arm)
        tiers[name] = min(arm.tier, tiers.get(name, arm.tier))
    dense = MethodConfig()
    for name, tier in sorted(tiers.items()):
        if name != CONTROL:
            steps = int(name.removeprefix(f"{CONTROL}_"))
            yield Arm(
                name=name,
                label=f"dense + LoRA, {steps} steps",
                method=dense,
                trained_with=(dense,),
                train={"steps": steps},
                tier=tier,
            )


def control_of(config: EvidenceConfig, arm: Arm) -> str:
    """Name of the dense arm that was trained for as many steps."""
    steps = sum(stage.steps or 0 for stage in trainings(config, arm, 0))
    usual = config.stages * (config.train.steps or 0)
    return CONTROL if steps == usual else f"{CONTROL}_{steps}"


def _recipes(config: EvidenceConfig, budget: BudgetConfig) -> Iterator[Arm]:
    for recipe in config.recipes:
        if recipe.budget == budget.name:
            method = MethodConfig(plan=recipe.plan, method=recipe.method)
            stages = tuple(MethodConfig(plan=plan) for plan in recipe.stages) or (method,)
            yield Arm(
                name=f"{recipe.name}-{budget.name}",
                label=recipe.label,
                method=method,
                trained_with=stages,
                train=recipe.train,
                tier=recipe.tier,
            )


def controls(config: EvidenceConfig) -> list[Arm]:
    """The dense base on other splits; no rows of a table."""
    return [
        Arm(name=f"dense-{split}", label=f"dense base, {split}", method=MethodConfig(), split=split)
        for split in config.control_splits
    ]


def _untrained(config: EvidenceConfig, budget: BudgetConfig) -> Iterator[Arm]:
    for name in config.anchors:
        label, options, _ = VARIANTS[name]
        yield Arm(
            name=f"{name}-untrained-{budget.name}",
            label=f"{label}, untrained",
            method=MethodConfig(plan=budget.plan + options),
        )
    for peer in budget.peers:
        name, label = _names(peer)
        yield Arm(
            name=f"{name}-untrained-{budget.name}",
            label=f"{label}, untrained",
            method=MethodConfig(method=peer),
        )


def _trained(config: EvidenceConfig, budget: BudgetConfig) -> Iterator[Arm]:
    for name in config.variants:
        label, options, order = VARIANTS[name]
        plan = budget.plan + options
        plans = curriculum(plan, order, config.stages, config.extreme)
        yield Arm(
            name=f"{name}-{budget.name}",
            label=label,
            method=MethodConfig(plan=plan),
            trained_with=tuple(MethodConfig(plan=str(one)) for one in plans),
        )
    for peer in budget.peers:
        if peer.name in config.trained_peers:
            method = MethodConfig(method=peer)
            name, label = _names(peer)
            yield Arm(
                name=f"{name}-{budget.name}",
                label=f"{label}, trained",
                method=method,
                trained_with=(method,) * config.stages,
            )


def _names(peer: PeerConfig) -> tuple[str, str]:
    """Of its arms, and for people."""
    if peer.options.get("positions") != "keep":
        return peer.name, peer.name
    return f"{peer.name}_keep", f"{peer.name}, positions kept"


def trainings(config: EvidenceConfig, arm: Arm, seed: int) -> list[TrainConfig]:
    """The arm's training stages: the same steps, batches and rates as every other arm's, but for
    its own settings."""
    each = edit(config.train, arm.train) if arm.train else config.train
    return [
        each.model_copy(
            update={"plan": method.plan, "method": method.method, "seed": 1000 * seed + number}
        )
        for number, method in enumerate(arm.trained_with, 1)
    ]


def evaluated(config: EvidenceConfig, budget: BudgetConfig) -> EvaluateConfig:
    """The questions of a budget to all its arms; trainings of one arm make a row."""
    evaluated_arms: list[ArmConfig] = []
    for arm in arms(config, budget):
        same: dict[str, Any] = {"label": arm.label, **dict(arm.method)}
        if not arm.trained_with:
            evaluated_arms.append(ArmConfig(name=arm.name, checkpoint="base", **same))
        evaluated_arms += [
            ArmConfig(
                name=f"{arm.name}-s{seed}",
                checkpoint=f"merge-{arm.name}-s{seed}",
                trained=True,
                group=arm.name,
                seed=seed,
                **same,
            )
            for seed in config.seeds
            if arm.trained_with
        ]
    return config.evaluate.model_copy(
        update={
            "title": f"{config.evaluate.title}, {budget.label}",
            "arms": tuple(evaluated_arms),
            "control": CONTROL,
            "splits": (config.questions,),
        }
    )
