"""A small prepared data set and a random small model, made once by the stages' own code.

No Ray is started for it: a test that needs one asks for `ray_address` besides.
"""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.pipeline.contexts import stage_context

SMALL_DEMO = (
    "data.train_pictures=60",
    "data.test_pictures=8",
    "plan=1:1/4,2:1/2",
    "curriculum.order=reverse",
    "curriculum.stages=2",
    "train.distill=null",
    "compare={}",
    "train.steps=6",
    "train.batch_size=4",
    "train.checkpoint_every=1",
    "evaluate.prefill_rounds=3",
    "export.log_model=false",
)
"""Changes of the workflow `demo` that make it a matter of seconds on the model of `small`."""


class Small(NamedTuple):
    """Folders of one small world: 24 training and 6 test pictures, a model of four layers."""

    pictures: Path
    base: Path
    prepared: Path


def in_this_process(tasks: list[dict[str, Any]], work: Any) -> Iterable[Any]:
    """Chunks to rows, as Ray's workers make them."""

    from pipeline.data.worker import render_chunk

    return chain.from_iterable(render_chunk(task, work) for task in tasks)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    from pipeline.data.config import PrepareConfig
    from pipeline.data.conversations import parse_turns
    from pipeline.data.sources import iter_records
    from pipeline.data.templates import shipped
    from pipeline.stages.prepare import prepare_data
    from workflows.demo.fashion_grids import compose_fashion
    from workflows.demo.pictures import FashionConfig
    from workflows.demo.tiny_llava import TinyLlavaConfig, build_model, build_processor

    root = tmp_path_factory.mktemp("small")
    compose_fashion(
        stage_context("pictures", root / "pictures", {}),
        FashionConfig(train_pictures=24, test_pictures=6),
    )
    records = iter_records(root / "pictures" / "train.json")
    template = shipped("vicuna_short")
    texts = [
        "".join(text for text, _ in template.render(parse_turns(record))) for _, record in records
    ]
    sizes = TinyLlavaConfig(vision_width=32, vision_layers=2, width=32, layers=4, mlp_width=48)
    processor = build_processor(texts, sizes)
    build_model(processor, sizes, seed=0).save_pretrained(root / "base")
    processor.save_pretrained(root / "base")
    inputs = {"data": (root / "pictures", {}), "base": (root / "base", {})}
    ctx = stage_context("prepare", root / "prepared", inputs)
    prepare_data(
        ctx.inputs["data"],
        ctx.inputs["base"],
        PrepareConfig(template="vicuna_short", context=512),
        ctx.out,
        ctx.progress,
        render=in_this_process,
    )
    return Small(root / "pictures", root / "base", root / "prepared")
