"""A second evidence base, closer to life: pretrained parts, captioned things, 196 vision tokens.

The same questions as workflows/evidence/'s, on a base whose decoder and tower were trained by
others: SmolLM2-135M-Instruct and EfficientNet-Lite0 (workflows/stamps/base.py), scenes of Tux
Paint's stamps (workflows/stamps/scenes.py). Fewer arms, two budgets, and a control that asks about
other pictures. The parts are optional and installed apart (docs/evidence-details.md):

    adsc run stamps --set data.stamps=FOLDER
    python -m workflows.evidence --out DIR --scale stamps --set data.stamps=FOLDER

`--scale stamps_top` has the top arms of the ladder (workflows/evidence/ladder.py) on this base, in
the same folder if you like: the base is the same.
"""

from pipeline.config import edit
from pipeline.data.config import PrepareConfig
from pipeline.durable.workflow import Workflow
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.methods import PeerConfig
from pipeline.kinds.base import BaseConfig
from pipeline.training.config import LoraSettings, TrainConfig
from workflows.evidence.config import BudgetConfig, EvidenceConfig
from workflows.evidence.ladder import budget_of, recipe
from workflows.evidence.workflow import build
from workflows.stamps.base import StampsBaseConfig
from workflows.stamps.scenes import SHUFFLED, ScenesConfig

TOKENS = 196
PEERS = ("stride", "random", "fastv", "dart")
"""VisionZip, which chooses by the tower's attention, refuses a tower that has none."""
PROJECTOR = r".*multi_modal_projector\..*"
TOP_PLANS = {"667": "7:1/4,19:0", "778": "0:18/49,18:0", "889": "0:1/4,13:0"}
"""The ladder's EXITS at the same shares of depth, 30 layers instead of 8: averages 65.3, 43.2 and
21.2 of 196 tokens. Nothing was tried here."""
LATE = "5:1/4,24:0"
"""Average 63.7. Layer 24 is the first from which an exit costs the base little on training
conversations (workflows/depth.py); the arms above were run before anybody looked."""
TOP_PEERS = ("pool", "divprune")
"""The best peers of the ladder that read no scores of the tower; positions kept."""
TOP_STEPS = 90


def stamps_config() -> EvidenceConfig:
    """The whole comparison."""
    return EvidenceConfig(
        base=BaseConfig(source="made"),
        made=StampsBaseConfig(
            decoder=TrainConfig(
                steps=640,
                batch_size=4,
                precision="bf16",
                learning_rate=1e-3,
                warmup=0.05,
                lora=LoraSettings(rank=32, alpha=64, dropout=0.0),
                tune=(PROJECTOR,),
                checkpoint_every=20,
            )
        ),
        data=ScenesConfig(),
        prepare=PrepareConfig(
            template="tokenizer",
            context=1024,
            splits={"train": "train.json", "test": "test.json", SHUFFLED: f"{SHUFFLED}.json"},
        ),
        budgets=(
            _budget("667", "-66.7 %", "2:19/49,15:1/2", TOKENS / 3),
            _budget("778", "-77.8 %", "2:11/49,15:1/2", TOKENS * 2 / 9),
        ),
        variants=("adsc", "adsc_reverse", "adsc_first"),
        anchors=("adsc", "adsc_first"),
        trained_peers=("fastv",),
        control_splits=(SHUFFLED,),
        train=TrainConfig(
            steps=30,
            batch_size=4,
            precision="bf16",
            learning_rate=5e-4,
            lora=LoraSettings(rank=16, alpha=32, dropout=0.0),
            checkpoint_every=20,
        ),
        seeds=(0,),
        evaluate=EvaluateConfig(
            title="ADSC and its peers on pretrained parts",
            task="stamps in 3 x 3 scenes, generated questions; SmolLM2-135M and EfficientNet-Lite0",
            batch_size=16,
            prefill_batch=4,
            prefill_rounds=3,
            decode_rounds=1,
        ),
    )


def _budget(name: str, label: str, plan: str, average: float) -> BudgetConfig:
    peers = (PeerConfig(name=p, average=average, options={"tolerance": 0.02}) for p in PEERS)
    return BudgetConfig(name=name, label=label, plan=plan, peers=tuple(peers))


def stamps_top_config() -> EvidenceConfig:
    """The ladder's top arms and its best peers, each trained for as many steps as the arms above,
    none distilled."""
    recipes = []
    for tier, (budget, plan) in enumerate(TOP_PLANS.items()):
        recipes.append(
            recipe("tiles_exit", "tiles and exit", budget, f"{plan};pool=tiles", tier=tier)
        )
        for peer in TOP_PEERS:
            average = TOKENS * (1 - int(budget) / 1000)
            options = {"positions": "keep", "tolerance": 0.03}
            method = PeerConfig(name=peer, average=average, options=options)
            label = f"{peer}, positions kept"
            recipes.append(recipe(f"{peer}_keep", label, budget, method=method, tier=tier))
    recipes += [
        recipe("drop", "drop, as published", "667", "2:19/49,15:1/2", tier=1),
        recipe("tiles", "means of tiles", "667", "3:1/4;pool=tiles", tier=1),
        recipe("tiles_late", "tiles and a later exit", "667", f"{LATE};pool=tiles", tier=1),
    ]
    budgets = tuple(budget_of(name, plan) for name, plan in TOP_PLANS.items())
    changed = {"stages": 1, "train.steps": TOP_STEPS, "control_splits": []}
    return edit(stamps_config(), changed).model_copy(
        update={"budgets": budgets, "recipes": tuple(recipes)}
    )


def stamps() -> Workflow:
    return Workflow(
        name="stamps",
        config=stamps_config(),
        build=build,
        setup="workflows.stamps_tower.register",
    )
