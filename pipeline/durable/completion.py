"""What a finished stage could not do of what was wanted, and how a later run does just that.

A stage whose results are whole can still fail at something beside them, such as registering a model
where MLflow refuses. Its outputs then say so under `undone`, {what: why}; the record stands, and
`Kind.complete` is run by the next run instead of the body. Records are never rewritten: what was
made up for is an object of its own beside the record, created once.
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
    """Whether this run is to make up for it: without tracking nothing is asked for."""
    wanted = stage.kind.complete and stage.pinned is None and context.tracking_uri
    return bool(wanted and undone(record))


def publish(store: Store, home: str, record: Record, outputs: Mapping[str, Any]) -> Record:
    """Note what was made up for; the record as it is from now on. Nothing is noted while anything
    is still left: the next run tries again."""
    if not outputs.get(UNDONE):
        text = json.dumps(clean({**outputs, UNDONE: {}}), indent=1, ensure_ascii=False)
        store.create(completed_key(home), text.encode())
        return merged(store, home, record)
    return record.model_copy(update={"outputs": {**record.outputs, **outputs}})
