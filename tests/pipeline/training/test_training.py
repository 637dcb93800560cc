"""The training loop: equivalent runs are equal, exactly the declared parameters move."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from pipeline.training.adapters import MovementError, merge_trained
from pipeline.training.loop import Diverged, Sources, rate_factor, train
from tests.pipeline.training.training_runs import (
    CONFIG,
    LORA,
    Plain,
    sources,
    trained,
    worst_difference,
)
from tests.small import Small


@pytest.fixture(scope="module")
def whole(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """The undisturbed run of CONFIG."""
    context = Plain(tmp_path_factory.mktemp("whole"))
    train(CONFIG, sources(small), context)
    return context


def test_loss_falls_when_the_same_pictures_come_again(small: Small, tmp_path: Path) -> None:
    context = Plain(tmp_path)
    config = CONFIG.model_copy(
        update={
            "steps": 40,
            "batch_size": 8,
            "lora": None,
            "tune": (r".*language_model.*", r"lm_head.*"),
        }
    )
    train(config, sources(small), context)
    assert context.losses[40] < 0.6 * context.losses[1]


def test_resumed_equals_uninterrupted(small: Small, tmp_path: Path, whole: Plain) -> None:
    with pytest.raises(InterruptedError):
        train(CONFIG, sources(small), Plain(tmp_path, die_at=4))
    context = Plain(tmp_path)
    train(CONFIG, sources(small), context)
    assert sorted(context.losses) == [5, 6]
    assert worst_difference(trained(tmp_path), trained(whole.folder)) == 0
    history = json.loads((tmp_path / "step-0000006/trained/history.json").read_text())
    assert dict(history) == pytest.approx(whole.losses)


def test_a_finished_run_does_nothing_when_entered_again(small: Small, whole: Plain) -> None:
    again = Plain(whole.folder)
    train(CONFIG, sources(small), again)
    assert again.losses == {}


def test_accumulation_does_not_change_the_step(small: Small, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"lora": LORA.model_copy(update={"dropout": 0.0})})
    for name, accumulate in (("one", 1), ("four", 4)):
        context = Plain(tmp_path / name)
        train(config.model_copy(update={"accumulate": accumulate}), sources(small), context)
    # Measured worst difference 2e-5 after six steps of AdamW at 1e-2.
    assert worst_difference(trained(tmp_path / "one"), trained(tmp_path / "four")) < 5e-4


def test_exactly_the_declared_parameters_move(small: Small, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"steps": 2, "tune": (r".*multi_modal_projector\..*",)})
    train(config, sources(small), Plain(tmp_path))
    folder = tmp_path / "step-0000002" / "trained"
    tuned = load_file(folder / "tuned.safetensors")
    assert all("multi_modal_projector" in name for name in tuned) and len(tuned) == 4
    base = AutoModelForImageTextToText.from_pretrained(small.base)
    merged = merge_trained(AutoModelForImageTextToText.from_pretrained(small.base), folder)
    moved = {
        name
        for (name, a), (_, b) in zip(
            base.named_parameters(), merged.named_parameters(), strict=True
        )
        if not torch.equal(a, b)
    }
    linears = {
        name
        for name, _ in base.named_parameters()
        if "language_model.layers" in name and "proj" in name
    }
    assert moved == linears | set(tuned)


def test_a_retry_cannot_slip_past_the_check_of_what_moved(small: Small, tmp_path: Path) -> None:
    """The tower's last layer feeds nothing in a LLaVA, so it can't be trained."""
    config = CONFIG.model_copy(update={"steps": 2, "tune": (r".*vision_tower.*layers\.1\..*",)})
    for _ in range(2):
        with pytest.raises(MovementError, match=r"to be trained but did not move"):
            train(config, sources(small), Plain(tmp_path))
    assert not (tmp_path / "step-0000002").exists()


def test_the_next_stage_starts_from_the_adapter(small: Small, tmp_path: Path, whole: Plain) -> None:
    start = whole.folder / "step-0000006" / "trained"
    config = CONFIG.model_copy(update={"steps": 1, "learning_rate": 1e-6})
    train(config, sources(small, start), Plain(tmp_path))
    assert worst_difference(trained(tmp_path, 1), trained(whole.folder)) < 2e-6


def test_divergence_names_the_records(small: Small, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(small.base, base)
    model = AutoModelForImageTextToText.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    model.save_pretrained(base)
    with pytest.raises(Diverged, match=r"step 1: loss .*nan.* records: \['train/0000"):
        train(CONFIG, Sources(base=base, data=small.prepared / "train"), Plain(tmp_path / "run"))


def test_a_gradient_that_explodes_names_the_records(small: Small, tmp_path: Path) -> None:
    """From the 20th step on, against the median of the steps before; also after a restart."""
    config = CONFIG.model_copy(update={"steps": 60, "diverged_norm": 1.001, "checkpoint_every": 19})
    with pytest.raises(
        Diverged, match=r"step (2|3)\d: loss .* norm .*usually .*'train/0000"
    ) as one:
        train(config, sources(small), Plain(tmp_path))
    with pytest.raises(Diverged) as two:
        train(config, sources(small), Plain(tmp_path))
    assert str(one.value) == str(two.value)


def test_what_matches_nothing_is_refused(small: Small, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train.tune \['projektor'\] match no parameter"):
        train(CONFIG.model_copy(update={"tune": ("projektor",)}), sources(small), Plain(tmp_path))
    with pytest.raises(ValueError, match="nothing to train"):
        train(CONFIG.model_copy(update={"lora": None}), sources(small), Plain(tmp_path))


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [rate_factor(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.001
