r"""A trained, exported, elastic checkpoint: the shipped base after a short LoRA training under its
plans, prepared, trained and merged by the stages of a compression, exported as `adsc export` does.

    python -m tests.adsc.serving.engine.trained FOLDER

It runs in the project's own environment, which has what stages need, and without Ray; the result is
FOLDER/trained. The serving tests start it from vLLM's.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.data.config import PrepareConfig
from pipeline.kinds.export import ExportConfig
from pipeline.kinds.merge import MergeConfig
from pipeline.stages.export import complete
from pipeline.stages.merge import merge
from pipeline.stages.prepare import prepare_data
from pipeline.training.config import LoraSettings, TrainConfig
from pipeline.training.loop import Sources, train
from pipeline.training.torchrun import FolderContext
from tests.adsc.serving.engine.cases import BASE, TRAINED
from tests.pipeline.contexts import stage_context
from tests.small import in_this_process
from workflows.demo.fashion_grids import compose_fashion
from workflows.demo.pictures import FashionConfig

STEPS = 30


def main(folder: Path) -> None:
    pictures = stage_context("pictures", folder / "pictures", {})
    compose_fashion(pictures, FashionConfig(train_pictures=24, test_pictures=2))
    given = {"data": (folder / "pictures", {}), "base": (BASE, {})}
    preparing = stage_context("prepare", folder / "prepared", given)
    prepared = prepare_data(
        preparing.inputs["data"],
        preparing.inputs["base"],
        PrepareConfig(template="vicuna_short", context=512),
        preparing.out,
        preparing.progress,
        render=in_this_process,
    )
    plan = next(iter(TRAINED.values()))
    config = TrainConfig(
        plan=plan,
        steps=STEPS,
        batch_size=4,
        learning_rate=2e-2,
        lora=LoraSettings(rank=4, alpha=8),
        checkpoint_every=STEPS,
    )
    sources = Sources(base=BASE, data=folder / "prepared" / "train", start=None)
    training = FolderContext(folder / "training", keep=1)
    train(config, sources, training)
    training.close()
    (last,) = training.checkpoints()
    given |= {"data": (folder / "prepared", prepared), "trained": (last, {})}
    merging = stage_context("merge", folder / "merge", given)
    merge(merging, MergeConfig(plan=plan, plans=TRAINED))
    complete(merging.out, folder / "trained", ExportConfig(name="trained"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
