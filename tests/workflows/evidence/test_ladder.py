"""The ladder: its arms are within their budgets and have controls of their own steps; one machine
trains each arm once, whatever is evaluated; features that are remembered are the tower's."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import adsc
from pipeline.config import edit
from pipeline.evaluation.generation import Questions, build_inputs
from pipeline.evaluation.intervals import Bootstrap
from pipeline.evaluation.methods import PeerConfig, build_method
from pipeline.training.batches import StepLoader
from pipeline.training.config import DistillSettings, TrainConfig
from pipeline.training.objective import Objective
from tests.small import Small
from tests.workflows.evidence.evidence_model import demo_model
from workflows.demo.tiny_llava import IMAGE_TOKEN
from workflows.evidence import __main__ as command
from workflows.evidence import config as evidence
from workflows.evidence import local
from workflows.evidence.config import (
    CONTROL,
    BudgetConfig,
    EvidenceConfig,
    Recipe,
    arms,
    control_of,
)
from workflows.evidence.features import install, key_of, pack, remember, teach_ahead, unpack
from workflows.evidence.ladder import BUDGETS, ladder_config, ladder_recipes, variant_config
from workflows.evidence.questions import load_asking
from workflows.evidence.retention import COMPARISONS, Answered, compare, write_retention
from workflows.evidence.tasks import jobs_of, tasks


def test_no_arm_has_more_tokens_than_its_budget_and_every_peer_has_all_of_it() -> None:
    config, model = ladder_config(), demo_model()
    for budget in config.budgets:
        most = BUDGETS[budget.name]
        for arm in arms(config, budget):
            if not arm.method.runs_with:
                continue
            average = build_method(arm.method, model).average_tokens(64, 8)
            if arm.method.method is not None:
                assert average == most, arm.name
            assert average <= most, arm.name


def test_names_are_unique_and_every_arm_has_a_control_of_its_own_steps() -> None:
    config = ladder_config()
    everything = {arm.name: arm for budget in config.budgets for arm in arms(config, budget)}
    assert max(Counter((r.name, r.budget) for r in ladder_recipes()).values()) == 1

    def steps(arm: evidence.Arm) -> int:
        return sum(stage.steps or 0 for stage in evidence.trainings(config, arm, 0))

    for arm in everything.values():
        if arm.trained_with:
            control = everything[control_of(config, arm)]
            assert not control.method.runs_with and steps(control) == steps(arm)
            assert control.tier <= arm.tier, "a share is kept of nothing"
    assert {steps(everything[n]) for n in everything if n.startswith(CONTROL)} == {150, 450, 1350}


def test_what_is_compared_are_arms() -> None:
    names = {recipe.name for recipe in ladder_recipes()}
    assert {name for pair in COMPARISONS for name in pair} <= names
    assert len(set(COMPARISONS)) == len(COMPARISONS)


def test_all_scales_can_be_built() -> None:
    for variant in ("free", "textures", "lists"):
        config = variant_config(variant)  # type: ignore[arg-type]
        made = [
            arm for budget in config.budgets for arm in arms(config, budget) if arm.trained_with
        ]
        assert {arm.split for arm in made} == {"validation"}
        assert all(evidence.trainings(config, arm, 1) for arm in made)


def test_arms_are_chosen_by_name_kind_pattern_and_budget_with_their_controls() -> None:
    config = ladder_config()
    assert command.choose(config, None, None) is None
    chosen = command.choose(config, ["tiles", "drop-889"], None)
    assert chosen == ["tiles-667", "tiles-778", "tiles-889", "drop-889", "dense", CONTROL]
    chosen = command.choose(config, ["tiles_distill*"], ["778"])
    assert chosen == [
        "tiles_distill-778", "tiles_distill_450-778", "dense", CONTROL, f"{CONTROL}_450",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="there are no arms tile; there are dense"):
        command.choose(config, ["tile"], None)
    with pytest.raises(ValueError, match="there are no budgets 66; there are 667, 778, 889"):
        command.choose(config, ["tiles"], ["66"])


def test_tiers_come_first_and_within_them_seeds(tmp_path: Path) -> None:
    config = ladder_config()
    ordered = [t for t in tasks(config, tmp_path, None) if t.seed is not None]
    assert [(t.arm.tier, t.seed) for t in ordered] == sorted((t.arm.tier, t.seed) for t in ordered)
    jobs = jobs_of(config, tmp_path, ordered)
    elastic = [job for job in jobs if job[0].arm.name == "elastic-667"]
    names = [task.arm.name for task in elastic[0]]
    assert names == ["elastic-667", "elastic_dense-667", "elastic-778", "elastic-889"]


def small_ladder(small: Small) -> EvidenceConfig:
    """An arm evaluated with two plans, a peer that looks at the tower and one that doesn't."""
    recipes = (
        Recipe(name="drop", label="drop", budget="b", plan="1:1/4", tier=0),
        Recipe(name="twice", label="heavy, then lighter", budget="b", plan="1:1/2",
               stages=("1:1/8", "1:1/4"), train={"steps": 1}, tier=1),
        Recipe(name="again", label="another plan", budget="b", plan="1:1/8",
               stages=("1:1/8", "1:1/4"), train={"steps": 1}, tier=1),
        Recipe(name="visionzip", label="visionzip", budget="b",
               method=PeerConfig(name="visionzip", average=28), tier=0),
    )  # fmt: skip
    config = ladder_config().model_copy(
        update={
            "budgets": (BudgetConfig(name="b", label="less", plan="1:1/4", peers=()),),
            "recipes": recipes,
        }
    )
    return edit(
        config,
        {
            "base.source": str(small.base),
            "data.train_pictures": 24,
            "data.validation_pictures": 2,
            "data.test_pictures": 3,
            "seeds": [0, 1],
            "train.steps": 2,
            "train.batch_size": 4,
        },
    )


@pytest.mark.slow
def test_test_questions_are_evaluated_later_without_another_training(
    small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_ladder(small)
    with caplog.at_level(logging.INFO):
        assert local.run(config, tmp_path, processes=1) == 0
    trained = {folder: folder.stat().st_mtime_ns for folder in (tmp_path / "trained").iterdir()}
    assert len(trained) == 2 * 4, "drop, visionzip and the control; two plans share a training"
    found = json.loads((tmp_path / "ladder-validation.json").read_text())
    rows = {arm["name"]: arm for arm in found["arms"]}
    assert rows["drop"]["tokens"] == 28.0 and rows["twice"]["control"] == CONTROL
    assert rows["drop"]["seeds"] == [0, 1] and rows["dense"]["seeds"] == [None]
    files = sorted((tmp_path / "arms").iterdir())
    for turns in ("test", "test_turns"):
        assert local.run(edit(config, {"questions": turns}), tmp_path, processes=1) == 0
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "trained").iterdir()} == trained
    assert len(list((tmp_path / "arms").iterdir())) == 3 * len(files)
    alone, later = (
        json.loads((tmp_path / f"ladder-{split}.json").read_text())
        for split in ("test", "test_turns")
    )
    assert (alone["split"], later["split"]) == ("test", "test_turns")
    questions = Questions(tmp_path / "prepared" / "test")
    text = (tmp_path / "ladder-test_turns.md").read_text()
    assert f"{len(questions) - 3} questions" in text, "all but the first of three pictures"
    assert "| heavy, then lighter | `1:1/2` |" in text


def test_the_base_teaches_every_arm_from_logits_computed_once(small: Small) -> None:
    base, distill = small.base, DistillSettings()
    config = TrainConfig(batch_size=4, accumulate=2)
    batch = StepLoader(data=small.prepared / "train", processor=base, config=config)(0)
    model: Any = AutoModelForImageTextToText.from_pretrained(base).eval()
    plan = adsc.PruningPlan.parse("1:1/2;pool=tiles")
    adsc.attach(model, plan)
    pictures: dict[bytes, torch.Tensor] = {}
    objective = Objective(model, distill, model.device, in_step=False)
    for micro in batch.micro:
        taught = unpack(teach_ahead(model, pack(micro, pictures), pictures), pictures)
        (extra,) = taught.keys() - micro.keys()
        assert taught[extra].shape[0] == (micro["labels"] != -100).sum()
        wanted = objective(**micro, supervised=9, plan=plan)
        found = objective(**taught, supervised=9, plan=plan)
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_remembered_features_are_the_towers_and_it_runs_no_more(small: Small) -> None:
    """Worst difference seen: 1e-6 of logits of size 3, other batch sizes being other sums."""
    model: Any = AutoModelForImageTextToText.from_pretrained(small.base).eval()
    processor = AutoProcessor.from_pretrained(small.base)
    questions = Questions(small.prepared / "test")
    batches = [build_inputs(questions.load(numbers), processor) for numbers in ([0, 1, 2], [20])]
    pictures: dict[bytes, torch.Tensor] = {}
    packed = [pack(batch, pictures) for batch in batches]
    for batch, one in zip(batches, packed, strict=True):
        again = unpack(one, pictures)
        assert batch.keys() == again.keys()
        assert all(torch.equal(batch[name], again[name]) for name in batch)
    features = remember(model, pictures)
    assert len(features) == 2, "three questions about one picture, and one about another"
    runs: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    for plan in ("", "0:1/4", "1:1/4,2:1/2"):
        adsc.attach(model, plan)
        for batch in batches:
            adsc.detach(model)
            adsc.attach(model, plan)
            with torch.no_grad():
                wanted = model(**batch).logits
                generated = model.generate(**batch, max_new_tokens=4, do_sample=False)
            make, runs[:] = model.model.get_image_features, []
            install(model, features)
            with torch.no_grad():
                torch.testing.assert_close(model(**batch).logits, wanted, rtol=0, atol=1e-5)
                later = model.generate(**batch, max_new_tokens=4, do_sample=False)
            assert torch.equal(later, generated) and not runs
            model.model.get_image_features = make
    install(model, {})
    model(**batches[0])
    assert runs, "what isn't known passes the tower"
    one = batches[0]["pixel_values"][0]
    assert key_of(one) == key_of(one.clone()) != key_of(one + 1e-6)


def test_second_turns_show_the_turn_before_and_its_right_answer(small: Small) -> None:
    processor = AutoProcessor.from_pretrained(small.base)
    asking = load_asking(small.prepared, "test_turns", processor, 4, {})
    plain = Questions(small.prepared / "test")
    assert len(asking.questions) == len(plain) - len(plain.data)
    numbers, inputs = asking.batches[0]
    text = processor.tokenizer.decode(inputs["input_ids"][0]).replace(IMAGE_TOKEN, "")
    entry = asking.questions.entries[numbers[0]]
    place = plain.entries.index(entry._replace(text=entry.text.split("\n")[-1]))
    before = plain.entries[place - 1]
    for part in (before.text, before.expected, plain.entries[place].text):
        assert part in text
    assert text.rstrip().endswith("ASSISTANT:")
    image = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert (inputs["input_ids"] == image).sum(1).tolist() == [64] * len(numbers)


def answered(name: str, scores: dict[int | None, list[float]], control: str = CONTROL) -> Answered:
    return Answered(name, name, "b", "1:1/4" if name != CONTROL else "", 16.0, control, 1.0, scores)


def test_shares_are_kept_of_the_control_on_the_seeds_that_both_have(tmp_path: Path) -> None:
    found = [
        answered(CONTROL, {0: [1, 1, 1, 0], 1: [1, 0, 0, 0], 2: [1, 1, 1, 1]}),
        answered("tiles", {0: [1, 1, 0, 0], 1: [1, 0, 0, 0]}),
        answered("runs", {0: [1, 0, 0, 0], 1: [0, 0, 0, 0]}),
        answered("drop", {5: [1, 0, 0, 0]}),
    ]
    records = ["a", "a", "b", "c"]
    write_retention(found, ["x", "x", "y", "y"], records, tmp_path, "validation", {"b": "less"})
    table = json.loads((tmp_path / "ladder-validation.json").read_text())
    rows = {arm["name"]: arm for arm in table["arms"]}
    assert rows["tiles"]["kept"]["mean"] == pytest.approx(3 / 4), "3 of the control's 4"
    assert rows["drop"]["kept"] is None, "no seed of the control is its own"
    assert rows[CONTROL]["kept"] is None
    assert rows["tiles"]["right"]["mean"] == pytest.approx(0.375)
    assert rows["tiles"]["kinds"] == {"x": 0.75, "y": 0.0}
    (difference,) = (row for row in table["comparisons"] if row["one"] == "tiles")
    assert difference["mean"] == pytest.approx(0.25) and difference["seeds"] == 2
    assert (tmp_path / "ladder-validation.png").stat().st_size > 5_000
    draws = Bootstrap(records, seed=0)
    assert compare(found, "drop", "tiles", "b", draws) is None
    table = (tmp_path / "ladder-validation.md").read_text()
    assert "| tiles | `1:1/4` | 16.0 | 2 | 37.5 [" in table and "| tiles − runs | +25.0 [" in table


def test_interval_of_a_difference_holds_its_mean() -> None:
    rng = np.random.default_rng(0)
    one, other = (rng.integers(0, 2, size=(3, 40)).astype(float) for _ in range(2))
    found = [
        answered("tiles", dict(enumerate(one.tolist()))),
        answered("runs", dict(enumerate(other.tolist()))),
    ]
    row = compare(found, "tiles", "runs", "b", Bootstrap([str(i // 4) for i in range(40)], seed=0))
    assert row is not None and row["low"] < row["mean"] < row["high"]
    assert row["mean"] == pytest.approx(float(one.mean() - other.mean()))
