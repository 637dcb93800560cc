"""Train the small LLaVA that ships in workflows/assets/tiny_base from nothing: two core hours.

First the tower learns to name the thing in each cell, then projector and decoder learn to answer
with the tower frozen, as in LLaVA. To replace the checkpoint that ships:

    adsc run tiny_base
    python -m workflows.demo.tiny_base runs     # copies the checkpoint and the records of the run
"""

import json
import shutil
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn
from transformers import AutoProcessor, LlavaForConditionalGeneration

from pipeline.config import ADDED, OPERATIONAL, Config
from pipeline.data.config import PrepareConfig
from pipeline.data.conversations import parse_turns
from pipeline.data.sources import iter_records
from pipeline.data.templates import shipped
from pipeline.durable import graph
from pipeline.durable import record as records
from pipeline.durable.stage import Input, Kind, Stage, StageContext
from pipeline.durable.workflow import Workflow
from pipeline.evaluation.config import ArmConfig, EvaluateConfig
from pipeline.kinds.evaluate import EVALUATE
from pipeline.kinds.merge import MERGE, MergeConfig
from pipeline.kinds.prepare import PREPARE
from pipeline.kinds.train import TRAIN
from pipeline.store import open_store
from pipeline.training.config import TrainConfig
from workflows.demo.fashion import CLASSES, compose, draw_contents, load_things
from workflows.demo.pictures import THING, FashionConfig, pictures
from workflows.demo.tiny_llava import (
    TinyLlavaConfig,
    build_model,
    build_processor,
    initialise_decoder,
)

TEMPLATE = "vicuna_short"
ASSETS = Path(__file__).parent.parent / "assets" / "tiny_base"


class TowerConfig(Config):
    """Supervised training of the vision tower on the cells of fresh grids."""

    model: TinyLlavaConfig = TinyLlavaConfig()
    """Sizes of the whole model."""
    steps: int = Field(3000, gt=0)
    """Optimizer steps."""
    batch_size: int = Field(64, gt=0)
    """Grids in a step."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak of a one-cycle schedule."""
    weight_decay: float = Field(0.05, ge=0)
    """AdamW's decoupled weight decay."""
    test_grids: int = Field(500, gt=0)
    """Grids of official test instances on which the cells' accuracy is measured."""
    seed: int = Field(0, ge=0, lt=2**64)
    """Initial weights and grids."""
    grid: Literal[3, 4] = Field(3, json_schema_extra=ADDED)
    """Cells along a grid's side."""
    cell: int = Field(32, ge=THING, json_schema_extra=ADDED)
    """Side of a cell in pixels."""
    workers: int = Field(0, ge=0, json_schema_extra=OPERATIONAL)
    """Processes that compose grids ahead; 0 composes them between steps."""


class StartConfig(Config):
    """Fresh weights around the trained tower."""

    seed: int = Field(1, ge=0, lt=2**64)
    """Initial weights of projector and decoder."""


class TinyBaseConfig(Config):
    """The whole recipe of the small base."""

    data: FashionConfig = FashionConfig(train_pictures=24000, test_pictures=200)
    """Grids and questions for the decoder."""
    tower: TowerConfig = TowerConfig()
    """The tower's own training, and the model's sizes."""
    start: StartConfig = StartConfig()
    """Where projector and decoder start from."""
    prepare: PrepareConfig = PrepareConfig(template=TEMPLATE, context=512)
    """Validation and rendering."""
    decoder: TrainConfig = TrainConfig(
        steps=4500,
        batch_size=16,
        learning_rate=1e-3,
        warmup=0.05,
        weight_decay=0.05,
        lora=None,
        tune=(r".*language_model\..*", r".*multi_modal_projector\..*", r"lm_head\..*"),
        checkpoint_every=250,
    )
    """Projector and decoder in full, tower frozen."""
    second_steps: int = Field(2000, gt=0)
    """Steps of a second round at the same rate: after the first, places are still being learned."""
    evaluate: EvaluateConfig = EvaluateConfig(title="The small base", control="dense")
    """Questions about official test instances."""


class CellReader(nn.Module):
    """Names the thing in each cell from patch features (B, V, D): one query a cell attends over the
    patches. Only used to train the tower, and discarded afterwards."""

    def __init__(self, cells: int, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(cells, width) * 0.02)
        self.keys = nn.Linear(width, width)
        self.classify = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, len(CLASSES) + 1)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        scores = self.queries @ self.keys(features).transpose(1, 2) * 4 / features.shape[-1] ** 0.5
        return self.classify(scores.softmax(-1) @ features)


def train_tower(ctx: StageContext, config: TowerConfig) -> dict[str, Any]:
    """Stage body: tokenizer, processor and model; the tower trained, the rest random."""
    torch.manual_seed(config.seed)
    rows = iter_records(ctx.inputs["data"].folder / "train.json")
    template = shipped(TEMPLATE)
    texts = (
        "".join(text for text, _ in template.render(parse_turns(record)))
        for _, record in islice(rows, 1000)
    )
    processor = build_processor(texts, config.model)
    model = build_model(processor, config.model, config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tower = model.model.vision_tower.to(device)
    reader = CellReader(config.grid**2, config.model.vision_width).to(device)
    parameters = [*tower.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.1
    )

    def read(grids: torch.Tensor) -> torch.Tensor:
        pixels = _normalised(grids.to(device), processor.image_processor)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            layers = tower(pixels, output_hidden_states=True).hidden_states
            return reader(layers[model.config.vision_feature_layer][:, 1:]).float()

    for step, (grids, contents) in enumerate(_batches(config)):
        loss = nn.functional.cross_entropy(read(grids).flatten(0, 1), contents.to(device).flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 19:
            ctx.track.metrics({"loss": loss.item()}, step=step + 1)
            ctx.progress(step + 1, config.steps, f"steps, loss {loss.item():.3f}")
    with torch.inference_mode():
        grids, contents = Grids("test", config.test_grids, config.grid, config.cell)[0]
        accuracy = (read(grids).argmax(-1).cpu() == contents).float().mean().item()
    ctx.track.metrics({"cell_accuracy": accuracy})
    tower.to("cpu")
    model.save_pretrained(ctx.out)
    processor.save_pretrained(ctx.out)
    return {"cell_accuracy": accuracy}


TRAIN_TOWER = Kind(
    id="workflows.tiny_base.train_tower", version=1, body=train_tower, config=TowerConfig
)


def start_decoder(ctx: StageContext, config: StartConfig) -> dict[str, Any]:
    """Stage body: the tower's checkpoint with projector and decoder drawn anew."""
    folder = ctx.inputs["tower"].folder
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    initialise_decoder(model, config.seed)
    model.save_pretrained(ctx.out)
    AutoProcessor.from_pretrained(folder).save_pretrained(ctx.out)
    return {}


START_DECODER = Kind(
    id="workflows.tiny_base.start_decoder", version=1, body=start_decoder, config=StartConfig
)


@dataclass(frozen=True)
class Grids(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Batches of grids made on the spot: grey (B, side, side) as bytes, and class + 1 of each cell
    (B, cells)."""

    split: str
    size: int
    grid: int
    cell: int

    def __getitem__(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, contents = [], []
        for index in range(batch * self.size, (batch + 1) * self.size):
            rng = np.random.default_rng([7, self.split == "test", index])
            contents.append(draw_contents(rng, self.grid**2))
            things = load_things(self.split)
            pixels.append(np.asarray(compose(rng, contents[-1], things, self.cell)))
        return torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(contents)) + 1


def _batches(config: TowerConfig) -> Any:
    """Those of the training, in order."""
    grids = Grids("train", config.batch_size, config.grid, config.cell)
    return torch.utils.data.DataLoader(
        grids, batch_size=None, sampler=range(config.steps), num_workers=config.workers
    )


def _normalised(grids: torch.Tensor, pictures: Any) -> torch.Tensor:
    """(B, 3, side, side) as the image processor makes them."""
    grey = grids.float() * pictures.rescale_factor
    grey = (grey - pictures.image_mean[0]) / pictures.image_std[0]
    return grey[:, None].expand(-1, 3, -1, -1)


def tiny_base() -> Workflow:
    return Workflow(
        name="tiny_base",
        config=TinyBaseConfig(),
        build=build,
    )


def build(config: TinyBaseConfig) -> list[Stage]:
    data = {"base": "start", "data": "prepare"}
    dense = ArmConfig(name="dense", label="dense base", checkpoint="merge", plan="", trained=True)
    return [
        pictures(config.data),
        TRAIN_TOWER.stage(
            name="tower",
            title="tower: naming what is in the cells",
            config=config.tower,
            needs={"data": "pictures"},
        ),
        PREPARE.stage(
            name="prepare",
            title="prepare: records to tokens",
            config=config.prepare,
            needs={"data": "pictures", "base": "tower"},
        ),
        START_DECODER.stage(
            name="start",
            title="start: fresh decoder around the tower",
            config=config.start,
            needs={"tower": "tower"},
        ),
        TRAIN.stage(
            name="train",
            title="train: projector and decoder",
            config=config.decoder,
            needs=data,
        ),
        TRAIN.stage(
            name="train-2",
            title="train-2: projector and decoder, second round",
            config=config.decoder.model_copy(
                update={"steps": config.second_steps, "seed": config.decoder.seed + 1}
            ),
            needs={**data, "start": "train"},
        ),
        MERGE.stage(
            name="merge",
            title="merge: one checkpoint",
            config=MergeConfig(),
            needs={**data, "trained": "train-2"},
        ),
        EVALUATE.stage(
            name="evaluate",
            title="evaluate: does it see?",
            config=config.evaluate.model_copy(update={"arms": (dense,)}),
            needs={**data, "merge": "merge", "train": "train", "train-2": "train-2"},
        ),
    ]


def ship(root: str, target: Path = ASSETS) -> None:
    """Copy the finished run's checkpoint into `target`, with the records of the stages that made
    it.

    Raises:
        ValueError: the workflow isn't finished in this store.
    """
    stages = tiny_base().stages()
    store = open_store(root)
    found = {
        name: records.load(store, name, fingerprint)
        for name, fingerprint in graph.fingerprints(stages).items()
    }
    missing = [name for name, record in found.items() if record is None]
    if missing:
        raise ValueError(f"stages {missing} are not finished in {root}; adsc run tiny_base")
    lineage = {
        # Not where the inputs lay: that means nothing elsewhere.
        name: record.model_dump(mode="json", exclude={"host", "files", "inputs"})
        | {"inputs": {need: source.fingerprint for need, source in record.inputs.items()}}
        for name, record in found.items()
        if record is not None
    }
    merged = Input(found["merge"]).folder  # type: ignore[arg-type]
    target.mkdir(parents=True, exist_ok=True)
    for file in merged.iterdir():
        if file.name != "probe.safetensors":
            shutil.copyfile(file, target / file.name)
    (target / "lineage.json").write_text(json.dumps(lineage, indent=1) + "\n")


if __name__ == "__main__":
    ship(sys.argv[1] if len(sys.argv) > 1 else "runs")
