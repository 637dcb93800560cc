"""A base for pictures or answers that the shipped one has not seen: the shipped one, trained on."""

from pipeline.config import Config
from pipeline.kinds.base import BaseConfig
from pipeline.training.config import TrainConfig


class AdaptedConfig(Config):
    """What the base of all arms is made of; it sees every token of a picture."""

    source: BaseConfig
    """The checkpoint to begin with."""
    decoder: TrainConfig
    """Its training on the evidence's own training pictures."""
