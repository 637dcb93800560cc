"""The full-size recipe: its dry run, and the records that it holds out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adsc.plan import PlanError, PruningPlan
from pipeline.config import ConfigError
from pipeline.durable import record as records
from pipeline.durable.graph import fingerprints
from pipeline.kinds.merge import MergeConfig
from pipeline.store import open_store
from pipeline.training.config import TrainConfig
from tests.pipeline.contexts import stage_context
from workflows.commands.main import main
from workflows.llava15_7b import PAPER_PLANS, PLANS, HoldOutConfig, hold_out
from workflows.registry import WORKFLOWS, load_workflow
from workflows.renamed import FORMERLY, former

SHORT = "<image>\nWhat is it?\nAnswer the question using a single word or phrase."
CHOICE = "<image>\nWhich one?\nA. a\nB. b\nAnswer with the option's letter from the given choices"


@pytest.mark.parametrize("average", PAPER_PLANS)
def test_plans_of_the_paper_meet_their_budget(average: int) -> None:
    plan = PruningPlan.parse(PAPER_PLANS[average])
    assert plan.average_tokens(576, 32) == pytest.approx(average, rel=0.005)


@pytest.mark.parametrize("average", PLANS)
def test_advised_plans_are_whole_tiles_within_their_budget(average: int) -> None:
    plan = PruningPlan.parse(PLANS[average])
    assert 0.98 * average <= plan.average_tokens(576, 32) <= average
    (tiles,) = plan.tokens_after_drops(576)[:-1]
    sizes = {len(group.members) for group in plan.groups(576, (24, 24))[0]}
    assert sizes == {576 // tiles} and plan.exit == 24


NAMES = [name for name in WORKFLOWS if name.startswith("llava15_7b")]


@pytest.mark.parametrize("name", NAMES)
def test_dry_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = f"--root={tmp_path / 'runs'}"
    assert main(["run", name, "--dry-run", "--workers=8", "--gpu-price=2", root]) == 0
    printed = capsys.readouterr().out
    assert (
        "Training on 8 x h100" in printed and "665,298 records" in printed and "to run" in printed
    )
    assert not (tmp_path / "runs").exists()
    trained = [s.config for s in load_workflow(name).stages() if s.name.startswith("train-")]
    assert all(isinstance(config, TrainConfig) for config in trained)
    # An epoch of 128 conversations a step; the paper's curriculum has three parts, rounded up.
    steps = 3 * 1733 if "paper" in name else 5198
    assert sum(c.steps_for(665_298) for c in trained) == steps  # type: ignore[attr-defined]


def test_one_checkpoint_for_all_budgets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "llava15_7b_elastic", "--dry-run", f"--root={tmp_path}"]) == 0
    costs = capsys.readouterr().out
    for plan in PLANS.values():
        assert plan in costs
    stages = {stage.name: stage for stage in load_workflow("llava15_7b_elastic").stages()}
    merged, control = stages["merge"].config, stages["control-1"].config
    assert isinstance(merged, MergeConfig) and isinstance(control, TrainConfig)
    assert merged.plans == {"192": PLANS[192], "128": PLANS[128], "64": PLANS[64]}
    assert merged.plan == PLANS[192]
    assert control.distill is None, "the control is trained on the data's answers alone"


def started(root: Path, name: str, *changes: str) -> None:
    """As a driver leaves a store that was killed in the first training with a plan."""
    prints = fingerprints(load_workflow(name, changes).stages())
    folder = root / records.folder("train-1", prints["train-1"]) / "run" / "step-0000100"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")


@pytest.mark.parametrize("name", FORMERLY)
def test_a_training_that_began_as_the_paper_s_is_not_begun_anew(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = "data.held_out=100"
    words = ["--root", str(tmp_path), "--set", change]
    store, workflow = open_store(str(tmp_path)), load_workflow(name, [change])
    assert former(workflow, [change], store) is None
    started(tmp_path, FORMERLY[name], change)
    assert main(["run", name, *words]) == 2
    printed = capsys.readouterr().err
    assert f"`adsc run {FORMERLY[name]}` resumes it" in printed
    assert f"--set 'plan={workflow.config.plan}'" in printed  # type: ignore[attr-defined]
    # To look is no harm, and says the same; the new name has nothing to say.
    assert main(["ls", name, *words]) == 0 and "now called" in capsys.readouterr().err
    assert main(["ls", FORMERLY[name], *words]) == 0 and capsys.readouterr().err == ""
    plan = f"plan={workflow.config.plan}"  # type: ignore[attr-defined]
    assert former(load_workflow(name, [change, plan]), [change, plan], store) is None
    started(tmp_path, name, change)
    assert former(workflow, [change], store) is None


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llava15_7b", "train.distill.weight=0.5"),
        ("llava15_7b", "curriculum.training=[{learning_rate: 1e-4}]"),
        ("llava15_7b_64", "train.distill={teacher: '1:1/2'}"),
    ],
)
def test_changes_that_only_the_present_recipe_can_have(
    name: str, change: str, tmp_path: Path
) -> None:
    workflow = load_workflow(name, [change])
    workflow.stages()
    with pytest.raises((ConfigError, PlanError)):
        load_workflow(FORMERLY[name], [change]).stages()
    assert former(workflow, [change], open_store(str(tmp_path))) is None


def test_a_dry_run_that_can_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change = "train.activation_checkpointing=false"
    run = ["run", "llava15_7b", "--dry-run", "--gpu-type=l40s", f"--root={tmp_path}"]
    assert main([*run, "--set", change]) == 1
    printed = capsys.readouterr().out
    assert "control-1 needs about" in printed and "train.strategy=zero3" in printed


def record(name: str, question: str, picture: str | None = "a.jpg") -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "bag"}]
    return {"id": name, "conversations": turns} | ({"image": picture} if picture else {})


def test_a_test_set_is_held_out(tmp_path: Path) -> None:
    records = [record(f"long-{i}", "<image>\nDescribe it.", f"{i}.jpg") for i in range(20)]
    records += [record(f"short-{i}", SHORT, f"{i}.jpg") for i in range(10)]
    records += [record(f"choice-{i}", CHOICE, f"x{i}.jpg") for i in range(10)]
    records += [record("text", "A single word or phrase?", None)]
    lines = ",\n".join(map(json.dumps, records))
    (tmp_path / "mix.json").write_text(f"[{lines},\n{{'broken': 1}}]")
    config = HoldOutConfig(folder=str(tmp_path), records="mix.json", held_out=12)
    counts = hold_out(stage_context("records", tmp_path / "out", {}), config)
    train, test = (
        (tmp_path / "out" / f"{split}.jsonl").read_text().splitlines()
        for split in ("train", "test")
    )
    assert counts == {"train": len(train), "test": 12, "left_out": 42 - 12 - len(train)}
    records = [json.loads(line) for line in test]
    assert len({it["id"] for it in records}) == 12
    assert all(it["id"].startswith(("short", "choice")) for it in records)
    pictures = {it["image"] for it in records}
    kept = [json.loads(line) for line in train]
    # What can't be read is left for the stage `prepare`, which judges all records.
    assert [it for it in kept if isinstance(it, str)] == [kept[-1]]
    assert not pictures & {it.get("image") for it in kept[:-1]}
    assert counts["left_out"] > 0


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"download LLaVA's records .* --set data\.folder=DIR"):
        hold_out(stage_context("a", tmp_path / "a", {}), HoldOutConfig(folder=str(tmp_path)))
    (tmp_path / "mix.json").write_text(json.dumps([record("one", SHORT)]))
    config = HoldOutConfig(folder=str(tmp_path), records="mix.json")
    with pytest.raises(ValueError, match=r"1 conversations .* lower data\.held_out = 2000"):
        hold_out(stage_context("b", tmp_path / "b", {}), config)
