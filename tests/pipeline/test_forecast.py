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
    """More room keeps more, a plan fits more rows, and nothing chosen needs more than there is."""
    heavy = "4:1/4,30:1/4"
    found = {
        (gpu, plan): of_7b(Assumptions(gpu=gpu), memory="auto", plan=plan, batch_size=32)
        for gpu in ("l40s", "h100", "h200")
        for plan in ("", heavy)
    }
    for (gpu, _), row in found.items():
        assert row.memory_gib <= USABLE * Assumptions(gpu=gpu).hardware.memory_gib
    for plan in ("", heavy):
        hours = [found[gpu, plan].gpu_hours for gpu in ("l40s", "h100", "h200")]
        assert hours == sorted(hours, reverse=True)
    assert "checkpointing = true" not in found["h200", heavy].chosen
    dense, less = (int(found["h100", plan].chosen.split()[2].rstrip(",")) for plan in ("", heavy))
    assert less > dense
    assert not of_7b(Assumptions()).chosen


def test_what_fits_nowhere_is_made_small() -> None:
    """The dry run says that it doesn't fit; training tries it."""
    row = of_7b(Assumptions(gpu="a100-40gb"), memory="auto", precision="fp32")
    assert row.memory_gib <= of_7b(Assumptions(gpu="a100-40gb"), precision="fp32").memory_gib
    assert row.chosen == "micro_tokens = 776, activation_checkpointing = true"
