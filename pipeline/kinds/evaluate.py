"""The kind of stage `evaluate`: arms and questions; its config is pipeline.evaluation's."""

from pipeline.durable.stage import Kind
from pipeline.evaluation.config import EvaluateConfig

EVALUATE = Kind(
    id="pipeline.stages.evaluate.evaluate",
    referring_id="pipeline.stages.search.evaluate_found",
    version=4,
    body="pipeline.stages.evaluate.evaluate",
    config=EvaluateConfig,
)
