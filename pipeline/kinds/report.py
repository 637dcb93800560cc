"""The kind of stage `report`: what the page shows."""

from pydantic import Field

from pipeline.config import Config
from pipeline.durable.stage import Kind


class ReportConfig(Config):
    """What the report shows."""

    pictures: int = Field(default=4, ge=0)
    """How many sample pictures are shown, with questions and each arm's answers."""
    questions: int = Field(default=4, ge=1)
    """At most so many questions a picture."""
    thumbnail: int = Field(default=240, ge=16)
    """Longest side of a picture in pixels."""


REPORT = Kind(
    id="pipeline.stages.report.report",
    version=4,
    body="pipeline.stages.report.report",
    config=ReportConfig,
)
