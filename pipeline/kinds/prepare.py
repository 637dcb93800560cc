"""The kind of stage `prepare`: records and pictures to tokens; its config is pipeline.data's."""

from pipeline.data.config import PrepareConfig
from pipeline.durable.stage import Kind

PREPARE = Kind(
    id="pipeline.stages.prepare.prepare",
    version=3,
    body="pipeline.stages.prepare.prepare",
    config=PrepareConfig,
)
