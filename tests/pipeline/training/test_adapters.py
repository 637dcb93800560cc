"""Decoders under another name get the adapter that the default means, and its FLOPs are counted."""

from __future__ import annotations

import re

import pytest
import torch

from adsc import PruningPlan
from pipeline.training.adapters import (
    checksums,
    prepare_trainable,
    read_trained,
    trained_parts,
)
from pipeline.training.batches import RowShape
from pipeline.training.config import LoraSettings
from pipeline.training.throughput import TrainingCost
from tests.adsc.zoo import CASES, LAYERS

LORA = LoraSettings(rank=4, alpha=8)


@pytest.mark.parametrize("name", ["smolvlm", "idefics3", "llava"])
def test_the_default_adapter_is_on_every_layer_and_counted(name, tmp_path):
    made = prepare_trainable(CASES[name].model(), LORA, ())
    trained = {n: p for n, p in made.named_parameters() if p.requires_grad}
    decoder = re.compile(r"(language_model|text_model)\.layers\.(\d+)\.(self_attn|mlp)\.")
    assert all(decoder.search(one) for one in trained)
    assert len(trained) == LAYERS * 7 * 2

    rows = [RowShape(20, 0, 0)]
    config = made.get_base_model().config
    plan = PruningPlan.parse("")
    whole = TrainingCost(made, config, plan).step(rows).model
    for parameter in trained.values():
        parameter.requires_grad_(False)
    sizes = sum(p.numel() for p in trained.values())
    # Forward, and both gradients: three times 2 FLOPs for each weight and token.
    assert whole - TrainingCost(made, config, plan).step(rows).model >= 3 * 2 * sizes * 20

    weights = {n: p.detach() for n, p in trained.items()}
    trained_parts(weights, LORA).write(tmp_path)
    assert read_trained(tmp_path, set(weights), LORA, whole=True).keys() == weights.keys()


@pytest.mark.parametrize("count", [1, 8191, 20000])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8]
)
def test_one_value_that_moves_changes_the_checksum(dtype: torch.dtype, count: int) -> None:
    """Whatever a base's weights are kept in, and wherever the value stands."""

    def checksum(values: torch.Tensor) -> float:
        stored = torch.nn.Parameter(values.to(dtype), requires_grad=False)
        return checksums([("weight", stored, stored.data)])["weight"][1]

    still = torch.arange(count) % 7.0
    assert checksum(still) == checksum(still.clone())
    for place in {0, count // 2, count - 1}:
        moved = still.clone()
        moved[place] += 1
        assert checksum(moved) != checksum(still)


def test_a_part_without_values_has_a_checksum() -> None:
    """As a rank's of a small parameter under ZeRO-3."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    assert checksums([("weight", parameter, parameter.data[:0])]) == {"weight": (True, 0.0)}
