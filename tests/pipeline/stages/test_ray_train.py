"""The Ray Train stage: the plain loop's result on any number of workers, and plain refusals."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from pipeline.stages.train import TrainingRefused, train_stage
from pipeline.training.loop import train
from tests.pipeline.contexts import stage_context
from tests.pipeline.training.training_runs import (
    CONFIG,
    LORA,
    Plain,
    sources,
    trained,
    worst_difference,
)
from tests.small import Small

pytestmark = pytest.mark.usefixtures("ray_address")

EXACT = CONFIG.model_copy(update={"lora": LORA.model_copy(update={"dropout": 0.0})})


def inputs(small: Small) -> dict[str, tuple[Path, dict[str, str]]]:
    return {"base": (small.base, {}), "data": (small.prepared, {"digest": "0" * 64})}


@pytest.mark.parametrize(
    ("workers", "data_workers", "strategy"),
    [
        pytest.param(1, 1, "ddp", marks=pytest.mark.slow),
        (2, 0, "ddp"),
        pytest.param(2, 0, "zero3", marks=pytest.mark.slow),
    ],
)
def test_ray_train_equals_the_plain_loop(
    workers: int, data_workers: int, strategy: str, small: Small, tmp_path: Path
) -> None:
    train(EXACT, sources(small), Plain(tmp_path / "plain"))
    ctx = stage_context("train-1", tmp_path / "ray" / "out", inputs(small))
    ctx.run = ctx.run.__class__(
        root=ctx.run.root, workflow="demo", num_workers=workers, data_workers=data_workers
    )
    outputs = train_stage(ctx, EXACT.model_copy(update={"strategy": strategy}))
    assert outputs["steps"] == EXACT.steps
    found = load_file(ctx.out / "trained" / "adapter" / "adapter_model.safetensors")
    worst = worst_difference(found, trained(tmp_path / "plain"))
    assert worst == 0 if workers == 1 else worst < 5e-4


def test_a_config_that_cannot_train_is_refused_in_one_sentence(
    small: Small, tmp_path: Path
) -> None:
    ctx = stage_context("train-1", tmp_path / "out", inputs(small))
    with pytest.raises(TrainingRefused, match=r"^train.tune \['projektor'\] match no parameter"):
        train_stage(ctx, EXACT.model_copy(update={"tune": ("projektor",)}))
