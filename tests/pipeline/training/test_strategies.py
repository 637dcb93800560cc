"""Equivalent runs in real processes: workers, strategies, launchers; and SIGTERM under torchrun."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.training.config import OffloadSettings, TrainConfig
from pipeline.training.loop import Sources, train
from pipeline.training.strategy import Zero
from pipeline.training.torchrun import TRY_AGAIN, FolderContext
from tests.pipeline.training.training_runs import (
    CONFIG,
    LORA,
    Plain,
    in_two_processes,
    sources,
    trained,
    worst_difference,
)
from tests.small import Small

PROJECTOR = (r".*multi_modal_projector\..*",)
# Dropout depends on the rank, and a projector exercises a second group of parameters.
EXACT = CONFIG.model_copy(
    update={
        "lora": LORA.model_copy(update={"dropout": 0.0}),
        "tune": PROJECTOR,
        "tune_learning_rate": 1e-3,
    }
)
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
COMPILED = ("ddp", "zero2")


def command_line(small: Small, config: TrainConfig, folder: Path) -> list[object]:
    """What pipeline.training.torchrun takes."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.json"
    file.write_text(config.model_dump_json())
    return [file, "--base", small.base, "--data", small.prepared / "train", "--out", folder]


def result(folder: Path, step: int = EXACT.steps or 0) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds as tensors."""
    checkpoint = folder / f"step-{step:07d}"
    moments = load_file(checkpoint / "moments.safetensors")
    tuned = load_file(checkpoint / "trained" / "tuned.safetensors")
    return {**trained(folder, step), **tuned, **moments}


def losses(folder: Path) -> list[float]:
    newest = FolderContext(folder).checkpoints()[-1]
    return [loss for _, loss in json.loads((newest / "trained" / "history.json").read_text())]


@pytest.fixture(scope="module")
def alone(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EXACT in this process."""
    folder = tmp_path_factory.mktemp("alone")
    train(EXACT, sources(small), Plain(folder))
    return folder


def test_torchrun_with_two_workers_equals_one_process(
    small: Small, tmp_path: Path, alone: Path
) -> None:
    config = EXACT.model_copy(update={"keep_checkpoints": 1})
    in_two_processes("pipeline.training.torchrun", *command_line(small, config, tmp_path))
    # Measured: weights and moments 2e-6 after six steps of AdamW at 1e-2.
    assert losses(tmp_path) == pytest.approx(losses(alone), abs=2e-5)
    assert worst_difference(result(tmp_path), result(alone)) < 2e-4
    assert [path.name for path in FolderContext(tmp_path).checkpoints()] == ["step-0000006"]


def strategies(base: str, data: str, folder: str) -> None:
    """Run by two processes: every strategy; DDP's and ZeRO-3's checkpoints taken over."""
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    where = Sources(base=Path(base), data=Path(data))
    config = EXACT.model_copy(update={"accumulate": 2})

    def run(strategy: str, name: str, **more: object) -> None:
        change = {"strategy": strategy, **more}
        train(config.model_copy(update=change), where, Plain(Path(folder) / name, rank, 2))

    for strategy in STRATEGIES:
        run(strategy, strategy)
    with torch.compiler.set_stance("default", force_backend="eager"):
        for strategy in COMPILED:
            run(strategy, f"{strategy}-compiled", compile="layers")
    for first, second in (("ddp", "zero3"), ("zero3", "zero3"), ("zero3", "zero2")):
        torch.distributed.barrier()
        name = f"{first}-{second}"
        if rank == 0:
            step = "step-0000004"
            shutil.copytree(Path(folder) / first / step, Path(folder) / name / step)
        torch.distributed.barrier()
        run(second, name)


@pytest.mark.slow
def test_ddp_and_all_stages_of_zero_are_one_run(small: Small, tmp_path: Path, alone: Path) -> None:
    in_two_processes(
        "tests.pipeline.training.test_strategies", small.base, small.prepared / "train", tmp_path
    )
    reference = result(tmp_path / "ddp")
    assert worst_difference(reference, result(alone)) < 2e-4  # one worker, no accumulation
    for strategy in STRATEGIES:
        # Measured, weights and moments: 7e-8, 1e-7 and 1e-6 (ZeRO-3).
        assert losses(tmp_path / strategy) == pytest.approx(losses(tmp_path / "ddp"), abs=1e-5)
        assert worst_difference(result(tmp_path / strategy), reference) < 1e-4
    for strategy in COMPILED:
        assert worst_difference(result(tmp_path / f"{strategy}-compiled"), reference) < 1e-4
    # Resumed equals uninterrupted, under the same strategy and under another one. Measured: 1e-6.
    for name in ("ddp-zero3", "zero3-zero3", "zero3-zero2"):
        assert worst_difference(result(tmp_path / name), reference) < 1e-4


@pytest.mark.slow
def test_a_checkpoint_of_zero_3_on_two_workers_goes_on_with_ddp_on_one(
    small: Small, tmp_path: Path, alone: Path
) -> None:
    """And the reverse, in one process: what a checkpoint holds names no strategy."""
    for number, strategy in enumerate(("zero3", "ddp", "zero2")):
        config = EXACT.model_copy(update={"strategy": strategy})
        context = Plain(tmp_path, die_at=2 * number + 2 if number < 2 else 0)
        try:
            train(config, sources(small), context)
        except InterruptedError:
            assert number < 2
    assert worst_difference(result(tmp_path), result(alone)) < 1e-4  # measured: 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_bf16_with_everything_that_saves_memory(
    small: Small, tmp_path: Path, strategy: str
) -> None:
    """Offload to the CPU and activation checkpointing change nothing but memory."""
    plain = EXACT.model_copy(update={"precision": "bf16"})
    train(plain, sources(small), Plain(tmp_path / "plain"))
    changes = {
        "strategy": strategy,
        "offload": OffloadSettings(
            optimizer="cpu", parameters="cpu" if strategy == "zero3" else None
        ),
        "activation_checkpointing": True,
    }
    train(plain.model_copy(update=changes), sources(small), Plain(tmp_path / "other"))
    # bf16 has three digits. Measured: 2e-3.
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "plain"), abs=2e-2)


@pytest.mark.slow
def test_sigterm_under_torchrun_leaves_with_a_checkpoint(
    small: Small, tmp_path: Path, alone: Path
) -> None:
    """torchrun hands the signal on; both processes leave after the same step."""
    config = EXACT.model_copy(update={"checkpoint_every": 1000, "steps": 4000})
    where = command_line(small, config, tmp_path / "run")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "pipeline.training.torchrun", *map(str, where)]
    log = tmp_path / "log"
    status = terminated(command, lambda: "step 3 of" in log.read_text(), log)
    assert status != 0
    (newest,) = FolderContext(tmp_path / "run").checkpoints()
    step = json.loads((newest / "state.json").read_text())["step"]
    assert 3 <= step < 1000
    # Alone, a process tells by its status that it is to be started again.
    command = [sys.executable, "-m", "pipeline.training.torchrun", *map(str, where)]
    again = tmp_path / "again"
    assert (
        terminated(command, lambda: f"step {step + 3} of" in again.read_text(), again) == TRY_AGAIN
    )
    assert "left early" in again.read_text() and f"step {step} of" not in again.read_text()


def terminated(command: list[str], ready: Callable[[], bool], log: Path) -> int:
    """The status of a process that gets SIGTERM once it is ready."""
    with log.open("w") as file, subprocess.Popen(command, stderr=file, stdout=file) as process:
        try:
            deadline = time.monotonic() + 240
            while not ready():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[
                    -2000:
                ]
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            return process.wait(120)
        finally:
            process.kill()


def test_deepspeed_gets_what_the_config_says() -> None:
    config = TrainConfig(
        strategy="zero3", offload=OffloadSettings(optimizer="cpu", parameters="/nvme"), clip=0.5
    )
    settings = Zero(config, torch.device("cpu")).settings()
    assert settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 50_000_000,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "offload_param": {"device": "nvme", "nvme_path": "/nvme", "pin_memory": False},
    }


if __name__ == "__main__":
    strategies(*sys.argv[1:])
