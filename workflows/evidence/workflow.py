"""The evidence: ADSC's choices and its peers at three budgets, trained by one recipe, three seeds.

Hypotheses, results and commands stand in docs/evidence-details.md. Through Ray, on the demo's base
(stages resume by themselves; hours on two cores):

    adsc run evidence

On one machine without Ray, arm by arm, each a file that is not made twice; `--scale 576` trains a
larger base with 576 vision tokens first, for a GPU:

    python -m workflows.evidence --out DIR --scale 576 --processes 8

Both share arms, training loop, scoring and the form of the results. The command without Ray is in
workflows/evidence/__main__.py, what it does in workflows/evidence/local.py. `--scale ladder` is the
comparison that docs/evidence.md begins with; workflows/evidence/ladder.py has its arms.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pipeline.config import Config, ConfigError
from pipeline.data.config import PrepareConfig
from pipeline.durable.stage import Stage
from pipeline.durable.workflow import Workflow
from pipeline.evaluation.config import ArmConfig, EvaluateConfig
from pipeline.evaluation.methods import PeerConfig
from pipeline.kinds.base import BaseConfig
from pipeline.kinds.evaluate import EVALUATE
from pipeline.kinds.merge import MergeConfig
from pipeline.kinds.report import REPORT, ReportConfig
from pipeline.recipe import base_and_prepare, train_and_merge
from pipeline.training.config import LoraSettings, TrainConfig
from workflows.demo.pictures import FashionConfig, pictures
from workflows.demo.tiny_base import TinyBaseConfig, TowerConfig
from workflows.demo.tiny_llava import TinyLlavaConfig
from workflows.demo.workflow import BASE
from workflows.evidence.config import (
    AdaptedConfig,
    BudgetConfig,
    EvidenceConfig,
    arms,
    evaluated,
    trainings,
)
from workflows.evidence.summary import REINDEXED, SUMMARISE
from workflows.stamps.base import make_base
from workflows.stamps.scenes import ScenesConfig, scenes

LOOSE = {"tolerance": 0.02}  # of 64 tokens, one more or less is 1.6 %


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
            if arm.trained_with:
                name = f"{arm.name}-s{seed}"
                merging = MergeConfig(plan=arm.method.plan, method=arm.method.method)
                each = trainings(config, arm, seed)
                stages += train_and_merge(f"train-{name}", f"merge-{name}", each, merging)
    for budget in config.budgets:
        chosen = evaluated(config, budget)
        merged = {arm.checkpoint: arm.checkpoint for arm in chosen.arms if arm.trained}
        stages += [
            EVALUATE.stage(
                name=f"evaluate-{budget.name}",
                title=f"evaluate: every arm at {budget.label}",
                config=chosen,
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
