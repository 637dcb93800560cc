"""What tests of the search share: a space, held-out conversations, a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.kinds.search import SearchDataConfig
from pipeline.search.config import SearchConfig
from pipeline.search.space import Costs, Space
from pipeline.search.trial import SearchJob
from pipeline.stages.search import search_data
from pipeline.stages.train import train_stage
from pipeline.training.config import LoraSettings, TrainConfig
from pipeline.training.curriculum import CurriculumConfig
from tests.pipeline.contexts import stage_context
from tests.small import Small

LLAVA = "llava-1.5-7b"
DATA = {"template": "vicuna_short", "digest": "0" * 64}
TRAIN = TrainConfig(
    steps=3, batch_size=4, learning_rate=1e-2, lora=LoraSettings(rank=4, alpha=8, dropout=0.0)
)


def space_of(model: Any = LLAVA, **settings: Any) -> Space:
    config = SearchConfig(**settings)
    return Space(Costs(model, config), config)


@pytest.fixture(scope="module", name="splits")
def prepared_splits(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The splits of `search_data`: 24 training conversations, 6 + 6 of them held out."""
    out = tmp_path_factory.mktemp("splits") / "out"
    ctx = stage_context("search-data", out, {"data": (small.prepared, DATA)})
    search_data(ctx, SearchDataConfig(rows=6, confirm_rows=6))
    return out


def job_of(small: Small, splits: Path, folder: Path, **settings: Any) -> SearchJob:
    ctx = stage_context("s", folder / "out", {"base": (small.base, {}), "data": (splits, DATA)})
    config = SearchConfig(average=32, tolerance=0.1, **settings)
    return SearchJob(
        search=config, train=TRAIN, curriculum=CurriculumConfig(stages=2),
        inputs=dict(ctx.inputs), storage=str(folder / "run"), run=ctx.run,
        train_stage=train_stage,
    )  # fmt: skip
