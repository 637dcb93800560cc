"""The kinds of the stages `search-data` and `search`: conversations for trials, and the search.

The plan that is found goes to later stages by reference (pipeline.evaluation.methods.FoundPlan):
their configs say `search` (`search^1.5` for a curriculum's stage of that pressure), their needs
name the search, and so their fingerprints hold its.
"""

from pydantic import Field

from pipeline.config import Config
from pipeline.durable.record import Record
from pipeline.durable.stage import Kind
from pipeline.search.config import SearchConfig
from pipeline.tracking.headline import Headline
from pipeline.training.config import TrainConfig
from pipeline.training.curriculum import CurriculumConfig


class SearchDataConfig(Config):
    """What is taken out of the training split."""

    rows: int = Field(256, gt=0)
    """Conversations to judge trials on."""
    confirm_rows: int = Field(256, gt=0)
    """Further ones to compare the best plan on."""
    train_rows: int = Field(20_000, gt=0)
    """At most so many of the others to train on."""
    seed: int = 0
    """Which ones."""


class SearchStageConfig(Config):
    """A search, and how its trials train."""

    search: SearchConfig
    """Space, budget and study."""
    train: TrainConfig = TrainConfig()
    """Trainings of trials; an untrained search takes the precision from it alone."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """For trials of full fidelity."""


def headline(record: Record) -> Headline:
    """The best objective, the plan that reached it, and what that plan costs."""
    found = record.outputs
    return Headline(
        metrics={"search.best": found.get("value"), "search.cost": found.get("cost")},
        params={"search.plan": found["plan"]} if "plan" in found else {},
    )


SEARCH_DATA = Kind(
    id="pipeline.stages.search.search_data",
    version=1,
    body="pipeline.stages.search.search_data",
    config=SearchDataConfig,
)
SEARCH = Kind(
    id="pipeline.stages.search.search",
    version=1,
    body="pipeline.stages.search.search",
    config=SearchStageConfig,
    headline=headline,
    workers=True,
)
