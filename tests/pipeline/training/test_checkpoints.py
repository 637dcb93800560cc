"""What a checkpoint holds, who writes it and when, and what a stage takes from the one before."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pipeline.data.prepared import PreparedData
from pipeline.training.checkpoints import read_moments
from pipeline.training.config import LoraSettings, TrainConfig
from pipeline.training.loop import train
from pipeline.training.torchrun import FolderContext
from tests.pipeline.training.training_runs import CONFIG, Plain, sources, trained, worst_difference
from tests.small import Small

PROJECTOR = (r".*multi_modal_projector\..*",)


def test_a_checkpoint_is_whole_and_has_no_pickle(small: Small, tmp_path: Path) -> None:
    config = CONFIG.model_copy(
        update={"steps": 3, "tune": PROJECTOR, "tune_learning_rate": 1e-4, "checkpoint_every": 3}
    )
    train(config, sources(small), Plain(tmp_path))
    folder = tmp_path / "step-0000003"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "moments.safetensors",
        "state.json",
        "trained/adapter/adapter_config.json",
        "trained/adapter/adapter_model.safetensors",
        "trained/history.json",
        "trained/tuned.safetensors",
    }
    state = json.loads((folder / "state.json").read_text())
    assert (state["step"], state["conversations"], state["seed"]) == (3, 12, 0)
    assert state["rates"]["learning_rate"] == pytest.approx(
        100 * state["rates"]["learning_rate_tuned"]
    )
    assert len(state["norms"]) == 3 and all(norm > 0 for norm in state["norms"])
    moments = read_moments(folder / "moments.safetensors")
    weights = len(trained(tmp_path, 3)) + len(load_file(folder / "trained" / "tuned.safetensors"))
    assert len(moments) == weights
    assert {key for one in moments.values() for key in one} == {"step", "exp_avg", "exp_avg_sq"}
    settings = json.loads((folder / "trained/adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] is None and settings["inference_mode"]


class SlowDisk(FolderContext):
    """Holds every write back until it is released."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.go_on = threading.Event()
        self.logged: list[int] = []
        self.written_when_logged: list[int] = []

    def report(
        self,
        step: int,
        metrics: dict[str, float],
        write: Callable[[Path], None] | None,
        wait: bool = False,
    ) -> None:
        assert write is not None

        def delayed(folder: Path) -> None:
            assert self.go_on.wait(60)
            write(folder)

        super().report(step, metrics, delayed, wait)

    def log(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        self.logged.append(step)
        self.written_when_logged.append(len(self.checkpoints()))
        if step == 3:
            self.go_on.set()


def test_training_goes_on_while_a_checkpoint_is_written(small: Small, tmp_path: Path) -> None:
    """Step 3 is reached with the checkpoint of step 2 unwritten; it holds step 2 all the same."""
    context = SlowDisk(tmp_path / "slow")
    train(CONFIG, sources(small), context)
    context.close()
    assert context.written_when_logged[:3] == [0, 0, 0]
    assert [path.name for path in context.checkpoints()] == ["step-0000004", "step-0000006"]
    train(CONFIG, sources(small), Plain(tmp_path / "plain"))
    for step in (4, 6):
        assert (
            worst_difference(trained(tmp_path / "slow", step), trained(tmp_path / "plain", step))
            == 0
        )


def test_what_a_dead_process_left_half_written_is_passed_over(small: Small, tmp_path: Path) -> None:
    (tmp_path / ".writing-0000002" / "trained").mkdir(parents=True)
    (tmp_path / ".writing-0000002" / "moments.safetensors").write_text("half")
    context = Plain(tmp_path)
    train(CONFIG, sources(small), context)
    assert sorted(context.losses) == [1, 2, 3, 4, 5, 6]
    assert not list(tmp_path.glob(".writing-*"))


class Told(Plain):
    """Gets the signal to leave while it takes its third step."""

    def log(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        super().log(step, steps, metrics)
        if step == 2:
            self.leave()


def test_leaving_loses_nothing(small: Small, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"checkpoint_every": 100})
    assert train(config, sources(small), Told(tmp_path)) is False
    assert [path.name for path in Plain(tmp_path).checkpoints()] == ["step-0000003"]
    context = Plain(tmp_path)
    assert train(config, sources(small), context) is True
    assert sorted(context.losses) == [4, 5, 6]
    train(config, sources(small), Plain(tmp_path / "whole"))
    assert worst_difference(trained(tmp_path), trained(tmp_path / "whole")) == 0


def test_epochs_and_share_decide_the_steps(small: Small, tmp_path: Path) -> None:
    changes = {"steps": None, "epochs": 1.5, "data_share": 0.5}
    context = Plain(tmp_path)
    train(CONFIG.model_copy(update=changes), sources(small), context)
    assert len(PreparedData(sources(small).data)) == 24
    assert max(context.losses) == 5  # one and a half times 12 rows, 4 a step


def test_the_optimizer_is_carried_only_where_both_stages_say_so(
    small: Small, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"steps": 2, "carry_optimizer": True})
    train(config, sources(small), Plain(tmp_path / "first"))
    start = tmp_path / "first" / "step-0000002" / "trained"
    train(config, sources(small, start), Plain(tmp_path / "second"))
    counts = {
        name: read_moments(tmp_path / name / "step-0000002" / "moments.safetensors")
        for name in ("first", "second")
    }
    assert {int(one["step"]) for one in counts["first"].values()} == {2}
    assert {int(one["step"]) for one in counts["second"].values()} == {4}
    (tmp_path / "first" / "step-0000002" / "moments.safetensors").unlink()
    with pytest.raises(ValueError, match="needs the optimizer of the previous stage"):
        train(config, sources(small, start), Plain(tmp_path / "third"))


def test_a_start_that_would_be_lost_is_refused(small: Small, tmp_path: Path) -> None:
    """A later stage trains what an earlier one trained: else merging would drop it."""
    first = CONFIG.model_copy(update={"steps": 1, "tune": PROJECTOR})
    train(first, sources(small), Plain(tmp_path / "first"))
    where = sources(small, tmp_path / "first" / "step-0000001" / "trained")
    with pytest.raises(ValueError, match=r"multi_modal_projector.* must cover what was trained"):
        train(CONFIG, where, Plain(tmp_path / "no-tune"))
    other = LoraSettings(rank=8, alpha=8)
    with pytest.raises(ValueError, match=r"\(8, 8.0, .*\(4, 8.*one adapter"):
        train(first.model_copy(update={"lora": other}), where, Plain(tmp_path / "rank"))


def test_activation_checkpointing_changes_memory_only(small: Small, tmp_path: Path) -> None:
    train(CONFIG, sources(small), Plain(tmp_path / "plain"))
    for how in (True, "selective"):
        config = CONFIG.model_copy(update={"activation_checkpointing": how})
        train(config, sources(small), Plain(tmp_path / str(how)))
        worst = worst_difference(trained(tmp_path / "plain"), trained(tmp_path / str(how)))
        assert worst < 1e-6  # measured: 0, dropout included


def test_llava_preset() -> None:
    config = TrainConfig.llava15(plan="8:1/2", steps=10, epochs=None)
    assert config.lora is not None
    assert (config.lora.rank, config.lora.alpha, config.batch_size) == (128, 256, 128)
    assert (config.learning_rate, config.tune_learning_rate) == (2e-4, 2e-5)
    assert (config.precision, config.warmup, config.steps) == ("bf16", 0.03, 10)
    assert TrainConfig.llava15().steps_for(665_298) == 5198


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epochs": 1.0}, "steps = 100 and epochs = 1.0: set one"),
        ({"steps": None}, "set one and the other to null"),
        ({"offload": {"optimizer": "cpu"}}, "offload needs a ZeRO strategy"),
        ({"strategy": "zero2", "offload": {"parameters": "cpu"}}, "needs strategy zero3"),
        ({"compile": "layers", "strategy": "zero3"}, "compile = layers with strategy zero3"),
        (
            {"compile": "layers", "activation_checkpointing": "selective"},
            "operators that a compiled layer no longer has",
        ),
    ],
)
def test_settings_that_exclude_each_other(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TrainConfig.model_validate(changes)
