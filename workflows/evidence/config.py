"""The evidence: ADSC's choices and its peers at three budgets, trained by one recipe, three seeds.

Hypotheses, results and commands stand in docs/evidence-details.md. Through Ray, on the demo's base
(stages resume by themselves; hours on two cores):

    adsc run evidence

On one machine without Ray, arm by arm, each a file that is not made twice; `--scale 576` trains a
larger base with 576 vision tokens first, for a GPU:

    python -m workflows.evidence --out DIR --scale 576 --processes 8

Both share arms, training loop, scoring and the form of the results. The command without Ray is in
workflows/evidence/command.py, what it does in workflows/evidence/local.py. `--scale ladder` is the
comparison that docs/evidence.md begins with; workflows/evidence/ladder.py has its arms.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from pydantic import Field

from adsc.curriculum import curriculum
from pipeline.config import ADDED, Config, ConfigError, edit
from pipeline.data.config import PrepareConfig
from pipeline.durable.stage import Stage
from pipeline.durable.workflow import Workflow
from pipeline.evaluation.methods import MethodConfig, PeerConfig
from pipeline.kinds.base import BaseConfig
from pipeline.kinds.evaluate import EVALUATE, ArmConfig, EvaluateConfig
from pipeline.kinds.merge import MergeConfig
from pipeline.kinds.report import REPORT, ReportConfig
from pipeline.recipe import base_and_prepare, train_and_merge
from pipeline.training.config import LoraSettings, TrainConfig
from workflows.demo.pictures import FashionConfig, pictures
from workflows.demo.tiny_base import TinyBaseConfig, TowerConfig
from workflows.demo.tiny_llava import TinyLlavaConfig
from workflows.demo.workflow import BASE
from workflows.evidence.adapt import AdaptedConfig
from workflows.evidence.summary import REINDEXED, SUMMARISE
from workflows.stamps.base import StampsBaseConfig, make_base
from workflows.stamps.scenes import ScenesConfig, scenes

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
"""Variants that are asked untrained, too."""
TRAINED_PEERS = ("fastv", "pyramiddrop", "visionzip")
"""Peers that are trained by the same recipe, at their target throughout."""
CONTROL = "dense_lora"


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
    """An arm of a ladder at one budget: what it is asked with, and how it is trained."""

    name: str
    """In the arm's name, NAME-BUDGET; the same at every budget."""
    label: str
    """For people."""
    budget: str
    """Name of the budget that it meets."""
    plan: str = ""
    """The plan that it is asked with."""
    method: PeerConfig | None = None
    """A peer instead of a plan."""
    stages: tuple[str, ...] = ()
    """Plans of its training stages; none: one stage with what it is asked with."""
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
    """Which of VARIANTS are asked untrained, too."""
    trained_peers: tuple[str, ...] = Field(TRAINED_PEERS, json_schema_extra=ADDED)
    """Which of the budgets' peers are trained, too."""
    recipes: tuple[Recipe, ...] = Field((), json_schema_extra=ADDED)
    """Arms instead of variants, anchors and trained peers."""
    questions: str = Field("test", json_schema_extra=ADDED)
    """The split whose questions are asked; SPLIT_turns asks each after the turn before it."""
    control_splits: tuple[str, ...] = Field((), json_schema_extra=ADDED)
    """Splits besides `test` that only the dense base is asked: what it knows without looking."""
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
    """What it is asked with."""
    way: tuple[MethodConfig, ...] = ()
    """What each of its training stages runs with; none: it is the base."""
    split: str = "test"
    """Whose questions it is asked."""
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
    yield Arm(name=CONTROL, label="dense + LoRA", method=dense, way=(dense,) * config.stages)


def _controls_of_steps(config: EvidenceConfig) -> Iterator[Arm]:
    """The dense model trained for as many steps as any recipe, but for those of CONTROL."""
    tiers: dict[str, int] = {}
    each = {budget.name: list(_recipes(config, budget)) for budget in config.budgets}
    for arm in (arm for own in each.values() for arm in own if arm.way):
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
                way=(dense,),
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
            way = tuple(MethodConfig(plan=plan) for plan in recipe.stages) or (method,)
            yield Arm(
                name=f"{recipe.name}-{budget.name}",
                label=recipe.label,
                method=method,
                way=way,
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
            way=tuple(MethodConfig(plan=str(one)) for one in plans),
        )
    for peer in budget.peers:
        if peer.name in config.trained_peers:
            method = MethodConfig(method=peer)
            name, label = _names(peer)
            yield Arm(
                name=f"{name}-{budget.name}",
                label=f"{label}, trained",
                method=method,
                way=(method,) * config.stages,
            )


def _names(peer: PeerConfig) -> tuple[str, str]:
    """Of its arms, and for people."""
    if peer.options.get("positions") != "keep":
        return peer.name, peer.name
    return f"{peer.name}_keep", f"{peer.name}, positions kept"


def trainings(config: EvidenceConfig, arm: Arm, seed: int) -> list[TrainConfig]:
    """The arm's training stages: but for what the arm says, the same steps, batches and rates as
    every other arm's."""
    each = edit(config.train, arm.train) if arm.train else config.train
    return [
        each.model_copy(
            update={"plan": way.plan, "method": way.method, "seed": 1000 * seed + number}
        )
        for number, way in enumerate(arm.way, 1)
    ]


def evaluated(config: EvidenceConfig, budget: BudgetConfig) -> EvaluateConfig:
    """The questions of a budget to all its arms; trainings of one arm make a row."""
    asked: list[ArmConfig] = []
    for arm in arms(config, budget):
        same: dict[str, Any] = {"label": arm.label, **dict(arm.method)}
        if not arm.way:
            asked.append(ArmConfig(name=arm.name, checkpoint="base", **same))
        asked += [
            ArmConfig(
                name=f"{arm.name}-s{seed}",
                checkpoint=f"merge-{arm.name}-s{seed}",
                trained=True,
                group=arm.name,
                seed=seed,
                **same,
            )
            for seed in config.seeds
            if arm.way
        ]
    return config.evaluate.model_copy(
        update={
            "title": f"{config.evaluate.title}, {budget.label}",
            "arms": tuple(asked),
            "control": CONTROL,
            "splits": (config.questions,),
        }
    )


def _peers(
    average: float, options: Mapping[str, Any] = MappingProxyType({}), without: Sequence[str] = ()
) -> tuple[PeerConfig, ...]:
    names = ("stride", "random", "pool", "fastv", "pyramiddrop", "sparsevlm", "visionzip", "dart")
    peers: list[PeerConfig] = []
    for name in (*names, "divprune"):
        if name not in without:
            own = options.get(name, {})
            peers.append(PeerConfig(name=name, average=average, options=own))
            if name in REINDEXED:
                kept = own | {"positions": "keep"}
                peers.append(PeerConfig(name=name, average=average, options=kept))
    return tuple(peers)


AT_LAYER_1: dict[str, Any] = {
    **{name: {"layer": 1} for name in ("stride", "fastv", "dart")},
    "pyramiddrop": {"layers": "earlier"},
}
"""Where two full layers alone would exceed the budget."""
LOOSE = {"tolerance": 0.02}  # of 64 tokens, one more or less is 1.6 %


def evidence_config() -> EvidenceConfig:
    """The demo's base: 8 layers, 64 vision tokens."""
    names = ("random", "pool", "sparsevlm", "visionzip", "divprune", *AT_LAYER_1)
    loose: dict[str, Any] = dict.fromkeys(names, LOOSE)
    early = loose | {name: options | LOOSE for name, options in AT_LAYER_1.items()}
    earliest = {"stride": {"layer": 0} | LOOSE}
    scored = ("fastv", "dart", "sparsevlm", "pyramiddrop")
    return EvidenceConfig(
        base=BaseConfig(source=BASE),
        data=FashionConfig(),
        prepare=PrepareConfig(template="vicuna_short", context=512),
        budgets=(
            BudgetConfig(
                name="667",
                label="-66.7 %",
                plan="2:5/32,4:1/2",
                peers=_peers(64 / 3, loose),
            ),
            BudgetConfig(
                name="778",
                label="-77.8 %",
                plan="1:5/32,4:1/2",
                peers=_peers(128 / 9, early),
            ),
            BudgetConfig(
                name="889",
                label="-88.9 %",
                plan="0:9/64,4:1/2",
                # A full first layer is more than this budget, and these need one.
                peers=_peers(64 / 9, loose | earliest, without=scored),
            ),
        ),
        train=TrainConfig(
            steps=50,
            batch_size=16,
            accumulate=4,
            learning_rate=2e-3,
            lora=LoraSettings(rank=16, alpha=32, dropout=0.0),
            checkpoint_every=50,
        ),
        evaluate=EvaluateConfig(
            title="ADSC and its peers on the demo's base",
            task="real pictures, generated questions: Fashion-MNIST things in 3 x 3 grids",
            prefill_rounds=5,
            decode_rounds=2,
        ),
    )


def evidence_576_config() -> EvidenceConfig:
    """A larger base, trained here: 12 layers of width 256, 576 vision tokens, 4 x 4 grids."""
    data = FashionConfig(train_pictures=24000, test_pictures=200, grid=4, cell=36, each=4)
    sizes = TinyLlavaConfig(
        image_size=144, patch_size=6, vision_width=192, width=256, layers=12, heads=8, mlp_width=512
    )
    prepare = PrepareConfig(template="vicuna_short", context=1024)
    made = TinyBaseConfig(
        data=data,
        tower=TowerConfig(model=sizes, steps=1000, batch_size=128, grid=4, cell=36, workers=12),
        prepare=prepare,
    )
    decoder = made.decoder.model_copy(
        update={"batch_size": 32, "precision": "bf16", "checkpoint_every": 1000, "steps": 1800}
    )
    return EvidenceConfig(
        base=BaseConfig(source="made"),
        made=made.model_copy(update={"decoder": decoder}),
        data=data,
        prepare=prepare,
        budgets=(
            BudgetConfig(name="667", label="-66.7 %", plan="2:55/192,6:1/2", peers=_peers(192)),
            BudgetConfig(
                name="778",
                label="-77.8 %",
                plan="2:55/576,6:1/2",
                peers=_peers(128, {"pyramiddrop": {"layers": "earlier"}}),
            ),
            BudgetConfig(
                name="889", label="-88.9 %", plan="1:1/24,6:1/2", peers=_peers(64, AT_LAYER_1)
            ),
        ),
        train=TrainConfig(
            steps=50,
            batch_size=16,
            learning_rate=1e-3,
            lora=LoraSettings(rank=16, alpha=32, dropout=0.0),
            checkpoint_every=1000,
        ),
        evaluate=EvaluateConfig(
            title="ADSC and its peers at 576 vision tokens",
            task="real pictures, generated questions: Fashion-MNIST things in 4 x 4 grids",
            batch_size=256,
            prefill_rounds=5,
            decode_rounds=2,
        ),
    )


def evidence() -> Workflow:
    return Workflow(
        name="evidence",
        config=evidence_config(),
        build=build,
    )


def build(config: EvidenceConfig) -> list[Stage]:
    """The stages on Ray.

    Raises:
        ConfigError: a base that would have to be made first.
    """
    stages = _world(config)
    everything = {arm.name: arm for budget in config.budgets for arm in arms(config, budget)}
    for seed in config.seeds:
        for arm in everything.values():
            if arm.way:
                name = f"{arm.name}-s{seed}"
                merging = MergeConfig(plan=arm.method.plan, method=arm.method.method)
                each = trainings(config, arm, seed)
                stages += train_and_merge(f"train-{name}", f"merge-{name}", each, merging)
    for budget in config.budgets:
        asked = evaluated(config, budget)
        merged = {arm.checkpoint: arm.checkpoint for arm in asked.arms if arm.trained}
        stages += [
            EVALUATE.stage(
                name=f"evaluate-{budget.name}",
                title=f"evaluate: every arm at {budget.label}",
                config=asked,
                needs={"data": "prepare", "base": "base", **merged},
            ),
            REPORT.stage(
                name=f"report-{budget.name}",
                title=f"report: page and figure at {budget.label}",
                config=ReportConfig(),
                needs={"evaluate": f"evaluate-{budget.name}"},
            ),
        ]
    if config.control_splits:
        stages.append(_control_stage(config))
    return [
        *stages,
        SUMMARISE.stage(
            name="summary",
            title="summary: all budgets in a table and a figure",
            config=Config(),
            needs={budget.name: f"evaluate-{budget.name}" for budget in config.budgets},
        ),
    ]


def _world(config: EvidenceConfig) -> list[Stage]:
    """The stages that make the data and the base, up to `base` and `prepare`."""
    if isinstance(config.made, TinyBaseConfig | AdaptedConfig):
        raise ConfigError(
            "this evidence makes its own base, which is done on one machine: "
            "python -m workflows.evidence --out DIR --scale 576"
        )
    data = scenes(config.data) if isinstance(config.data, ScenesConfig) else pictures(config.data)
    if config.made is not None:
        return [data, *make_base(config.made, config.prepare)]
    return [data, *base_and_prepare(data, config.base, config.prepare)]


def _control_stage(config: EvidenceConfig) -> Stage:
    dense = ArmConfig(name="dense", label="dense base", checkpoint="base")
    return EVALUATE.stage(
        name="evaluate-controls",
        title="evaluate: the dense base without what it needs",
        config=config.evaluate.model_copy(
            update={
                "title": f"{config.evaluate.title}, controls",
                "arms": (dense,),
                "control": "dense",
                "splits": ("test", *config.control_splits),
            }
        ),
        needs={"data": "prepare", "base": "base"},
    )
