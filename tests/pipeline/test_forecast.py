"""The forecast: what it says of strategies and settings, and what it chooses for a GPU."""

from __future__ import annotations

from itertools import pairwise

import pytest

from adsc.costs.geometries import geometry
from pipeline.forecast import Assumptions, StageForecast, forecast
from pipeline.training.config import TrainConfig
from pipeline.training.memory import USABLE


def of_7b(assumed: Assumptions, **changes: object) -> StageForecast:
    config = TrainConfig.llava15(steps=10, epochs=None, micro_tokens=8192, **changes)
    (found,) = forecast(geometry("llava-1.5-7b"), [("train-1", config)], None, assumed)
    return found


def test_zero_and_checkpointing_save_memory() -> None:
    eight = Assumptions(workers=8)
    strategies = ("ddp", "zero1", "zero2", "zero3")
    sizes = [of_7b(eight, strategy=strategy).memory_gib for strategy in strategies]
    assert all(more > less for more, less in pairwise(sizes)), sizes
    # The base alone: 7.06 G parameters in bf16, of which 7/8 move elsewhere.
    assert sizes[2] - sizes[3] == pytest.approx(7 / 8 * 7.06e9 * 2 / 2**30, rel=0.1)
    kept = of_7b(eight, strategy="zero2", activation_checkpointing=False)
    assert kept.memory_gib > 2 * sizes[2]
    again = of_7b(eight, strategy="zero2")
    assert kept.flops == again.flops and kept.gpu_hours < again.gpu_hours


def test_time_follows_from_flops() -> None:
    one, faster = Assumptions(), Assumptions(hfu=0.8)
    dense, pruned = of_7b(one), of_7b(one, plan="4:1/2,10:1/2,17:1/2")
    assert of_7b(faster).gpu_hours == pytest.approx(dense.gpu_hours / 2)
    assert 0.4 < pruned.flops / dense.flops < 0.6
    assert pruned.average_vision_tokens == 191.25


def test_what_a_forecast_can_not_say() -> None:
    epochs = [("train-1", TrainConfig.llava15())]
    config = geometry("llava-1.5-7b")
    with pytest.raises(ValueError, match=r"set train\.steps for a forecast"):
        forecast(config, epochs, None, Assumptions())
    with pytest.raises(ValueError, match=r"'h900' is unknown; there are a100-40gb"):
        forecast(config, epochs, 10, Assumptions(gpu="h900"))
    with pytest.raises(ValueError, match=r"hfu = 40\.0 is not a share"):
        forecast(config, epochs, 10, Assumptions(hfu=40.0))


def test_a_gpu_gets_what_is_fastest_of_what_fits() -> None:
    """A larger GPU and a plan both get larger micro-batches; nothing chosen needs more than there
    is, and all of it is written in the row."""
    how = {"steps": 10, "epochs": None, "memory": "auto", "batch_size": 32}
    stages = {
        "dense": TrainConfig.llava15(**how),
        "plan": TrainConfig.llava15(plan="4:1/4,30:1/4", **how),
        "as it is": TrainConfig.llava15(**how | {"memory": None}),
    }
    tokens = {}
    for gpu in ("a100-40gb", "h100"):
        assumed = Assumptions(gpu=gpu)
        dense, plan, kept = forecast(geometry("llava-1.5-7b"), list(stages.items()), None, assumed)
        assert kept.chosen == ""
        for row in (dense, plan):
            assert row.memory_gib <= USABLE * assumed.hardware.memory_gib
            assert row.gpu_hours < kept.gpu_hours  # which checkpoints
            assert row.chosen.endswith(", activation_checkpointing = false")
            tokens[gpu, row.name] = int(row.chosen.split(",")[0].rpartition(" ")[2])
    # Rows of 776 positions: 2 and 4 of them on the smaller GPU.
    assert tokens["a100-40gb", "dense"] == 2 * 776
    assert tokens["a100-40gb", "plan"] == 4 * 776
    assert tokens["h100", "dense"] > 2 * 776 and tokens["h100", "plan"] > 4 * 776
