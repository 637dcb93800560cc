"""The kind of stage `evaluate`: arms and questions; its config is pipeline.evaluation's."""

from typing import Any

from pipeline.durable.record import Record
from pipeline.durable.stage import Kind
from pipeline.evaluation.config import EvaluateConfig
from pipeline.tracking.headline import Headline

COMPARED_BY = (
    "accuracy",
    "retention",
    "average_vision_tokens",
    "flops",
    "kv_cache_bytes",
    "prefill_ms",
)
"""Numbers of an arm."""


def headline(record: Record) -> Headline:
    """Scores and costs of the arm that the workflow is about."""
    arm = main_arm(record)
    measured = record.outputs["arms"][arm] if arm else {}
    return Headline(
        metrics={name: measured.get(name) for name in COMPARED_BY},
        params={"arm": arm} if arm else {},
    )


def main_arm(record: Record) -> str | None:
    """The arm that a workflow is about: trained with a plan, as the recipe's own checkpoint (stage
    `merge`) if that was evaluated; of several, the one with the fewest vision tokens, and of equals
    the last. None if there is none."""
    measured: dict[str, dict[str, Any]] = record.outputs.get("arms", {})
    trained: dict[str, str] = {}
    for arm in (record.config or {}).get("arms", ()):
        row = arm.get("group") or arm["name"]
        if arm["trained"] and not arm.get("method") and measured.get(row, {}).get("plan"):
            trained[row] = arm["checkpoint"]
    own = [row for row, checkpoint in trained.items() if checkpoint == "merge"]
    return min(
        reversed(own or list(trained)),
        key=lambda row: measured[row]["average_vision_tokens"],
        default=None,
    )


EVALUATE = Kind(
    id="pipeline.stages.evaluate.evaluate",
    referring_id="pipeline.stages.search.evaluate_found",
    version=4,
    body="pipeline.stages.evaluate.evaluate",
    config=EvaluateConfig,
    headline=headline,
    workers=True,
)
