"""train.compile: the same training, in few graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from adsc.attachment.compiled import LIMIT
from pipeline.evaluation.methods import PeerConfig
from pipeline.training.config import DistillSettings, TrainConfig
from pipeline.training.loop import train
from tests.pipeline.training.training_runs import CONFIG, Plain, sources, trained, worst_difference
from tests.small import Small

PLANS = {"a": "1:1/4,3:0;pool=tiles", "b": "1:1/2,2:1/4", "c": "2:1/4"}
CASES: dict[str, dict[str, Any]] = {
    "elastic, recomputed": {
        "plan": PLANS["a"],
        "plans": PLANS,
        "weights": {"dense": 1.0},
        "activation_checkpointing": True,
    },
    "taught, micro-batches": {"distill": DistillSettings(), "accumulate": 2},
    "bf16": {"precision": "bf16"},
    "peer": {"plan": "", "method": PeerConfig(name="fastv", average=40)},
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if n else name for n, name in enumerate(CASES)],
)
def test_compiled_layers_train_the_same(small: Small, tmp_path: Path, name: str) -> None:
    """To the last bit where what is traced runs as it is: dropout draws alike, too."""
    config = TrainConfig.model_validate(CONFIG.model_dump() | CASES[name])
    compiled = config.model_copy(update={"compile": "layers"})
    torch._dynamo.reset()
    counters.clear()
    train(config, sources(small), Plain(tmp_path / "eager"))
    assert not counters["stats"]
    with torch.compiler.set_stance("default", force_backend="eager"):
        train(compiled, sources(small), Plain(tmp_path / "compiled"))
    assert 0 < counters["stats"]["unique_graphs"] <= LIMIT
    assert not counters["graph_break"]
    assert worst_difference(trained(tmp_path / "compiled"), trained(tmp_path / "eager")) == 0
