"""The kind of the stage that makes the demo's pictures: how many grids, and of which sort."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.config import ADDED, Config
from pipeline.durable.stage import Kind, Stage

THING = 28  # pixels: a thing's side as shipped


class FashionConfig(Config):
    """How many grids to compose, and from which seed."""

    train_pictures: int = Field(2000, gt=0)
    """Grids for training."""
    test_pictures: int = Field(200, gt=0)
    """Grids for evaluation, from official test instances."""
    seed: int = Field(0, ge=0)
    """Seed of composition and questions; train and test draw from separate streams."""
    grid: Literal[3, 4] = Field(3, json_schema_extra=ADDED)
    """Cells along a side."""
    cell: int = Field(32, ge=THING, json_schema_extra=ADDED)
    """Side of a cell in pixels."""
    each: int = Field(2, gt=0, json_schema_extra=ADDED)
    """Questions of each of four kinds about a grid, as far as it offers them."""
    validation_pictures: int = Field(0, ge=0, json_schema_extra=ADDED)
    """Grids to choose plans and rates on, with things that neither other split shows; 0: none."""
    layout: Literal["cells", "free"] = Field("cells", json_schema_extra=ADDED)
    """`cells`: a thing a cell. `free`: up to seven things wherever there is room (3 x 3 only)."""
    ground: Literal["black", "photographs"] = Field("black", json_schema_extra=ADDED)
    """What is behind the things; photographs are others in each split."""
    listed: float = Field(0.0, ge=0, lt=1, json_schema_extra=ADDED)
    """Share of the training grids about which nothing is asked but what is where. Above 0 each
    other split has a twin, SPLIT_list, with that question about each of its grids."""

    @model_validator(mode="after")
    def _free_places_have_no_cells(self) -> Self:
        if self.layout == "free" and (self.grid != 3 or self.listed):
            raise ValueError(
                f"layout = free with grid = {self.grid} and listed = {self.listed:g}: things at "
                "free places are asked about by ninths of the picture, and not listed by cells; "
                "set grid to 3 and listed to 0"
            )
        return self

    @property
    def counts(self) -> dict[str, int]:
        """Pictures of each split that there is."""
        counts = {
            "train": self.train_pictures,
            "validation": self.validation_pictures,
            "test": self.test_pictures,
        }
        return {split: count for split, count in counts.items() if count}


COMPOSE_FASHION = Kind(
    id="workflows.fashion.compose_fashion",
    version=1,
    body="workflows.demo.fashion_grids.compose_fashion",
    config=FashionConfig,
)


def pictures(config: FashionConfig) -> Stage:
    """The stage that makes the data."""
    return COMPOSE_FASHION.stage(
        name="pictures",
        title="pictures: real things in grids",
        config=config,
    )
