"""The kind of stage `train`: one training; its config is pipeline.training's."""

from pipeline.durable.stage import Kind
from pipeline.training.config import TrainConfig

TRAIN = Kind(
    id="pipeline.stages.train.train_stage",
    referring_id="pipeline.stages.search.train_found",
    version=2,
    body="pipeline.stages.train.train_stage",
    config=TrainConfig,
    workers=True,
)
