"""The kind of stage `prepare`: records and pictures to tokens; its config is pipeline.data's."""

from pipeline.data.config import PrepareConfig
from pipeline.durable.record import Record
from pipeline.durable.stage import Kind
from pipeline.tracking.headline import DataSet, Headline


def headline(record: Record) -> Headline:
    """The prepared data, by the digest of its manifest."""
    digest = record.outputs.get("digest") or record.fingerprint
    return Headline(data=DataSet(record.uri, "prepared conversations", digest[:12]))


PREPARE = Kind(
    id="pipeline.stages.prepare.prepare",
    version=3,
    body="pipeline.stages.prepare.prepare",
    config=PrepareConfig,
    headline=headline,
)
