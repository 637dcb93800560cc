"""Completion of a finished stage: what it left undone is done by a later run, without its body.

A stage whose results are complete can still fail at something else, such as registering a model
with MLflow. Its outputs then list it under `undone`, {what: why}; the record stands, and the next
run calls `Kind.complete` instead of the body. Records are never rewritten: a completion is a
separate object beside the record, created once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.durable.record import UNDONE, Record, completed_key, merged, undone
from pipeline.redact import clean

if TYPE_CHECKING:
    from pipeline.durable.stage import RunContext, Stage
    from pipeline.store import Store


def is_due(stage: Stage, record: Record, context: RunContext) -> bool:
    """Whether this run should complete the stage; without tracking there is nothing to complete."""
    wanted = stage.kind.complete and stage.pinned is None and context.tracking_uri
    return bool(wanted and undone(record))


def publish(store: Store, home: str, record: Record, outputs: Mapping[str, Any]) -> Record:
    """Store a completion and return the completed record. Nothing is stored while something is
    still undone: the next run tries again."""
    if not outputs.get(UNDONE):
        text = json.dumps(clean({**outputs, UNDONE: {}}), indent=1, ensure_ascii=False)
        store.create(completed_key(home), text.encode())
        return merged(store, home, record)
    return record.model_copy(update={"outputs": {**record.outputs, **outputs}})
