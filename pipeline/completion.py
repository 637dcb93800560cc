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

if TYPE_CHECKING:
    from pipeline.record import Record
    from pipeline.stage import RunContext, Stage
    from pipeline.store import Store

UNDONE = "undone"
"""The key of a stage's outputs; absent or empty where all was done."""


def key(home: str) -> str:
    """Of the outputs that a completion made, in a stage's folder."""
    return f"{home}/completed.json"


def undone(record: Record) -> dict[str, str]:
    """What is left to do, and why it could not be done."""
    if record.outputs.get(UNDONE):
        return dict(record.outputs[UNDONE])
    # Exports of versions that did not say so: asked for, tracked, and not there.
    config = record.config if isinstance(record.config, Mapping) else {}
    asked = config.get("log_model") and "mlflow_version" in record.outputs and record.run_id
    if asked and record.outputs["mlflow_version"] is None and UNDONE not in record.outputs:
        return {"register the model in MLflow": "see adsc.tracking_problems of its run"}
    return {}


def is_due(stage: Stage, record: Record, context: RunContext) -> bool:
    """Whether this run is to make up for it: without tracking nothing is asked for."""
    wanted = stage.kind.complete and stage.pinned is None and context.tracking_uri
    return bool(wanted and undone(record))


def merged(store: Store, home: str, record: Record) -> Record:
    """The record with what was made up for later."""
    if not undone(record):
        return record
    data = store.read(key(home))
    if data is None:
        return record
    return record.model_copy(update={"outputs": {**record.outputs, **json.loads(data)}})


def publish(store: Store, home: str, record: Record, outputs: Mapping[str, Any]) -> Record:
    """Note what was made up for; the record as it is from now on. Nothing is noted while anything
    is still left: the next run tries again."""
    from pipeline.record import clean

    if not outputs.get(UNDONE):
        text = json.dumps(clean({**outputs, UNDONE: {}}), indent=1, ensure_ascii=False)
        store.create(key(home), text.encode())
        return merged(store, home, record)
    return record.model_copy(update={"outputs": {**record.outputs, **outputs}})


def sentence(record: Record) -> str:
    """For a stage's summary; empty where all was done."""
    left = "; ".join(f"{what} ({why})" for what, why in undone(record).items())
    return f"not done: {left}; the next run with MLflow tries it again" if left else ""
