"""What the stage `pictures` does: grids of Fashion-MNIST things, plain or harder."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.durable.stage import StageContext
from workflows.demo.fashion import (
    STREAMS,
    ask,
    compose,
    conversation,
    draw_contents,
    load_things,
    write_splits,
)
from workflows.demo.fashion_variants import make_variant, write_lists
from workflows.demo.pictures import FashionConfig


def make_record(index: int, split: str, config: FashionConfig) -> tuple[dict, Image.Image]:
    """One LLaVA record and its picture."""
    rng = np.random.default_rng([config.seed, STREAMS[split], index])
    if config.layout != "cells" or config.ground != "black" or config.listed:
        return make_variant(rng, index, split, config)
    contents = draw_contents(rng, config.grid**2)
    picture = compose(rng, contents, load_things(split), config.cell)
    name = f"{split}/{index:06d}"
    return conversation(name, f"{name}.png", ask(rng, contents, config.each)), picture


def compose_fashion(ctx: StageContext, config: FashionConfig) -> dict:
    """Stage: write a JSON file of each split and images/ in LLaVA's layout."""
    write_grids(ctx.out, config, ctx.progress)
    return {"train_pictures": config.train_pictures, "test_pictures": config.test_pictures}


def write_grids(
    out: Path,
    config: FashionConfig,
    progress: Callable[[float, float, str], None],
    each: Callable[..., Iterable[dict]] = map,
) -> None:
    """The files below `out`; `each` is `map`, or a pool's."""
    written = write_splits(out, config.counts, partial(make_record, config=config), progress, each)
    if config.listed:
        write_lists(out, config, {split for split in written if split != "train"})
