"""The ladder: what each idea brings over the published drop, and the peers with the same help.

Every arm starts from one base and differs from the arm above it in one thing: a mean instead of a
drop, one early drop instead of two, tiles instead of runs, distillation, steps, an exit. Peers are
trained alike, and again with the same distillation and steps. Each arm has a dense control of its
own steps. Choices (which plan of `CANDIDATES`, which anchor) are made on validation questions; the
test questions are asked once, at the end:

    python -m workflows.evidence --out DIR --scale ladder --processes 2
    python -m workflows.evidence --out DIR --scale ladder --processes 2 --questions test

Hypotheses, written before any arm was run, with what would refute them, stand in
docs/evidence-ladder.md ("Hypotheses of the ladder"). `--scale free`, `textures` and `lists` ask the
top arms on harder pictures and for long answers.

Legend: budgets are named by what is saved, 667 for -66.7 %; the demo's base has 64 vision tokens
and 8 layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from pipeline.data.config import PrepareConfig
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.methods import PeerConfig
from pipeline.kinds.base import BaseConfig
from pipeline.training.config import LoraSettings, TrainConfig
from workflows.demo.pictures import FashionConfig
from workflows.demo.workflow import BASE
from workflows.evidence.config import AdaptedConfig, BudgetConfig, EvidenceConfig, Recipe

SHORT, LONG, LONGEST = 150, 450, 1350
"""Steps of a training."""
DISTILL = {"weight": 1.0, "temperature": 1.0, "teacher": "dense"}
"""The base's own predictions as targets (TrainConfig.distill)."""
BUDGETS = {"667": 22, "778": 15, "889": 8}
"""Layer average up to which an arm may go: what the plan with whole tiles and without an exit has.
Peers get all of it."""
TILES = {"667": "1:1/4", "778": "1:1/8", "889": "0:1/8"}
"""One early drop to whole tiles."""
EXITS = {"667": "2:1/4,5:0", "778": "0:3/8,5:0", "889": "0:1/4,4:0"}
"""Tiles that leave late: averages 22, 15 and 8. Of `CANDIDATES`, the best on validation questions
with seed 0."""
CANDIDATES: dict[str, dict[str, str]] = {
    "667": {
        "a": "1:1/4,6:0",
        "b": "1:1/2,4:0",
        "c": "0:1/2,5:0",
        "d": "1:1/2,3:1/4,6:0",
        "e": "2:1/4,5:0",
        "f": "1:1/4,7:0",
    },
    "778": {
        "a": "1:1/8,7:0",
        "b": "0:1/4,7:0",
        "c": "0:1/2,2:1/4",
        "d": "0:1/2,2:1/2,5:0",
        "e": "0:1/2,3:0",
        "f": "1:1/4,4:0",
        "g": "0:3/8,5:0",
        "h": "1:1/4,4:1/4,6:0",
        "i": "0:1/2,3:1/2,4:0",
        "j": "0:15/32,4:0",
        "k": "0:5/16,6:0",
    },
    "889": {
        "a": "0:1/8,7:0",
        "b": "0:1/4,3:0",
        "c": "0:1/2,1:1/4,4:0",
        "d": "0:1/4,2:1/2,5:0",
        "e": "0:3/8,1:1/4,6:0",
        "f": "0:1/4,1:1/2,6:0",
        "g": "0:1/4,4:0",
        "h": "0:1/4,3:1/2,5:0",
        "i": "0:1/4,2:1/2,6:0",
        "j": "0:1/2,1:1/2,3:0",
    },
}
"""Plans with an exit, or two drops, that meet the budgets."""
TOP_PEERS = ("divprune", "pyramiddrop")
KEPT = ("divprune", "pyramiddrop", "visionzip", "pool", "tome", "downsample")
"""Peers that renumber positions as published; here they keep them, which is better for all."""


def ladder_recipes() -> Iterator[Recipe]:
    """All arms; of smaller tier first, since seeds count more than arms."""
    for budget in BUDGETS:
        yield from _steps(budget)
        yield from _peers(budget)
        yield from _published(budget)
        yield from _candidates(budget)
    yield recipe("elastic_dense", "elastic, asked dense", "667", tier=1, steps=LONG, elastic=TILES)
    yield recipe(
        "elastic_exit_distill_dense", "elastic with exits, distilled, asked dense", "667",
        tier=1, steps=LONG, elastic=EXITS, distill=True,
    )  # fmt: skip


def recipe(
    name: str,
    label: str,
    budget: str,
    plan: str = "",
    *,
    method: PeerConfig | None = None,
    tier: int,
    steps: int = SHORT,
    distill: bool = False,
    before: Sequence[str] = (),
    elastic: Mapping[str, str] = MappingProxyType({}),
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Recipe:
    train = dict(more)
    trained = (*before, plan) if plan else ()
    if steps != SHORT:
        train["steps"] = steps
    if distill:
        train["distill"] = DISTILL
    if elastic:
        plans = {name: f"{one};pool=tiles" for name, one in elastic.items()}
        train |= {"plans": plans, "weights": {"dense": 0.5}}
        trained = (plans["667"],)  # one training for all budgets
    return Recipe(
        name=name,
        label=label,
        budget=budget,
        plan=plan,
        method=method,
        stages=trained,
        train=train,
        tier=tier,
    )


def _steps(budget: str) -> Iterator[Recipe]:
    """What each idea brings."""
    published = {"667": "2:5/32,4:1/2", "778": "1:5/32,4:1/2", "889": "0:9/64,4:1/2"}[budget]
    early = {"667": "0:5/16", "778": "0:15/64", "889": "0:1/8"}[budget]
    once, tiles = TILES[budget], f"{TILES[budget]};pool=tiles"
    left = f"{EXITS[budget]};pool=tiles"
    yield recipe("drop", "drop, as published", budget, published, tier=1)
    yield recipe("drop_once", "one early drop", budget, once, tier=2)
    yield recipe("runs", "means of runs", budget, f"{once};pool=runs", tier=1)
    yield recipe("tiles", "means of tiles", budget, tiles, tier=0)
    for anchor in ("first", "center"):
        yield recipe(
            f"tiles_{anchor}", f"tiles, {anchor}", budget, f"{once};anchor={anchor};pool=tiles",
            tier=3,
        )  # fmt: skip
    yield recipe("tiles_distill", "tiles, distilled", budget, tiles, tier=1, distill=True)
    yield recipe("tiles_450", "tiles, 450 steps", budget, tiles, tier=2, steps=LONG)
    yield recipe(
        "tiles_distill_450", "tiles, distilled, 450 steps", budget, tiles,
        tier=1, steps=LONG, distill=True,
    )  # fmt: skip
    yield recipe("tiles_exit", "tiles and exit", budget, left, tier=2)
    yield recipe("tiles_exit_distill", "tiles and exit, distilled", budget, left, tier=1,
                  distill=True)  # fmt: skip
    yield recipe(
        "tiles_exit_distill_450", "tiles and exit, distilled, 450 steps", budget, left,
        tier=0, steps=LONG, distill=True,
    )  # fmt: skip
    yield recipe(
        "tiles_exit_distill_1350", "tiles and exit, distilled, 1350 steps", budget, left,
        tier=4, steps=LONGEST, distill=True,
    )  # fmt: skip
    yield recipe("tiles_early", "tiles before the decoder", budget, f"{early};pool=tiles", tier=2)
    yield recipe(
        "elastic", "elastic", budget, tiles, tier=1, steps=LONG, elastic=TILES,
    )  # fmt: skip
    yield recipe(
        "elastic_exit_distill", "elastic with exits, distilled", budget, left,
        tier=1, steps=LONG, elastic=EXITS, distill=True,
    )  # fmt: skip


def _peers(budget: str) -> Iterator[Recipe]:
    """Trained alike, and with the same distillation and steps as the longest of our top arms."""
    for peer in peers_of(budget):
        kept = peer.options.get("positions") == "keep"
        name = f"{peer.name}_keep" if kept else peer.name
        label = f"{peer.name}, positions kept" if kept else peer.name
        top = peer.name in TOP_PEERS
        best = peer.name == TOP_PEERS[0]
        yield recipe(name, label, budget, method=peer, tier=0 if best else 1 if top else 2)
        yield recipe(
            f"{name}_distill_450", f"{label}, distilled, 450 steps", budget, method=peer,
            tier=0 if best else 1 if top else 2, steps=LONG, distill=True,
        )  # fmt: skip


def peers_of(budget: str) -> list[PeerConfig]:
    """Every peer that reaches it; scores of a full first layer are more than -88.9 % allows."""
    options: dict[str, dict[str, Any]] = {name: {"positions": "keep"} for name in KEPT}
    if budget != "889":
        options["fastv"] = {} if budget == "667" else {"layer": 1}
        if budget == "778":
            options["pyramiddrop"]["layers"] = "earlier"
    else:
        options.pop("pyramiddrop")
    return [
        PeerConfig(name=name, average=BUDGETS[budget], options={"tolerance": 0.03} | own)
        for name, own in options.items()
    ]


def _published(budget: str) -> Iterator[Recipe]:
    """LLaVolta (arXiv 2406.20092): runs averaged after an early layer, heavy first, then lighter.
    EPIC (arXiv 2510.00515): a drop whose ratio grows step by step, taught by a milder one."""
    layer, keep = {"667": (1, 4), "778": (1, 8), "889": (0, 8)}[budget]
    runs = [f"{layer}:1/{keep * more};pool=runs" for more in (4, 2, 1)]
    yield recipe(
        "llavolta", "LLaVolta's curriculum, 450 steps", budget, runs[-1],
        tier=2, before=runs[:-1], steps=SHORT,
    )  # fmt: skip
    milder = {"weight": 0.5, "temperature": 2.0, "teacher": f"{layer}:1/2;anchor=first"}
    yield recipe(
        "epic", "EPIC's curriculum, 450 steps", budget, f"{layer}:1/{keep};anchor=first",
        tier=2, steps=LONG, more={"distill": milder, "grow": {"extreme": 2.0}},
    )  # fmt: skip


def _candidates(budget: str) -> Iterator[Recipe]:
    """For the choice of EXITS, on validation questions."""
    for letter, plan in CANDIDATES[budget].items():
        yield recipe(
            f"candidate_{letter}", f"candidate {plan}", budget, f"{plan};pool=tiles", tier=5,
            distill=True,
        )  # fmt: skip


def top_recipes(names: Sequence[str] = ()) -> tuple[Recipe, ...]:
    """Those for harder variants of the task."""
    chosen = names or (
        "drop",
        "tiles",
        "tiles_distill_450",
        "tiles_exit_distill_450",
        "divprune_keep",
        "divprune_keep_distill_450",
        "pyramiddrop_keep",
        "pool_keep_distill_450",
    )
    return tuple(one for one in ladder_recipes() if one.name in chosen)


def ladder_config() -> EvidenceConfig:
    """On the demo's base; validation questions unless told otherwise."""
    return _config("The ladder on the demo's base", FashionConfig(
        validation_pictures=200, test_pictures=400,
    ), tuple(ladder_recipes()))  # fmt: skip


def budget_of(name: str, plan: str) -> BudgetConfig:
    """Of arms that are all recipes."""
    return BudgetConfig(name=name, label=f"-{int(name) / 10:g} %", plan=plan, peers=())


def _config(
    title: str,
    data: FashionConfig,
    recipes: tuple[Recipe, ...],
    made: AdaptedConfig | None = None,
    more_splits: Sequence[str] = (),
    max_new_tokens: int = 8,
) -> EvidenceConfig:
    splits = (*data.counts, *more_splits)
    return EvidenceConfig(
        base=BaseConfig(source=BASE if made is None else "made"),
        made=made,
        data=data,
        prepare=PrepareConfig(
            template="vicuna_short",
            context=512,
            splits={split: f"{split}.json" for split in splits},
        ),
        budgets=tuple(budget_of(name, plan) for name, plan in TILES.items()),
        recipes=recipes,
        questions="validation",
        train=TrainConfig(
            steps=SHORT,
            batch_size=16,
            accumulate=4,
            learning_rate=2e-3,
            lora=LoraSettings(rank=16, alpha=32, dropout=0.0),
            checkpoint_every=50,
        ),
        stages=1,
        evaluate=EvaluateConfig(
            title=title,
            task="real pictures, generated questions: Fashion-MNIST things",
            max_new_tokens=max_new_tokens,
            prefill_rounds=5,
            decode_rounds=2,
        ),
    )


def _adapted(data: FashionConfig, steps: int, tower: bool) -> AdaptedConfig:
    """The shipped base, trained on in full: it has not seen such pictures, or such answers."""
    parts = [r".*language_model\..*", r".*multi_modal_projector\..*", r"lm_head\..*"]
    return AdaptedConfig(
        source=BaseConfig(source=BASE),
        decoder=TrainConfig(
            steps=steps,
            batch_size=16,
            accumulate=4,
            learning_rate=5e-4,
            weight_decay=0.05,
            lora=None,
            # The last layer of the tower makes no feature, and a parameter must move.
            tune=(*parts, r".*vision_tower\..*layers\.[0-3]\..*") if tower else tuple(parts),
            checkpoint_every=50,
        ),
    )


def variant_config(variant: Literal["free", "textures", "lists"]) -> EvidenceConfig:
    """The top arms on things at free places, on photographs as ground, or asked for long lists."""
    plain: dict[str, Any] = {
        "train_pictures": 6000,
        "validation_pictures": 200,
        "test_pictures": 400,
    }
    if variant == "free":
        data = FashionConfig(layout="free", **plain)
        return _config(
            "The top arms on things at free places", data, top_recipes(), _adapted(data, 600, False)
        )
    if variant == "textures":
        data = FashionConfig(ground="photographs", **plain)
        made = _adapted(data, 900, tower=True)
        return _config("The top arms on photographs as ground", data, top_recipes(), made)
    data = FashionConfig(listed=0.5, **plain)
    lists = [f"{split}_list" for split in ("validation", "test")]
    made = _adapted(data, 900, tower=False)
    return _config("The top arms, long answers", data, top_recipes(), made, lists, 64)
