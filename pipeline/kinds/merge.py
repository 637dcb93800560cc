"""The kind of stage `merge`: trained weights folded into the base."""

from pydantic import Field

from pipeline.config import ADDED
from pipeline.durable.stage import Kind
from pipeline.evaluation.methods import MethodConfig, PeerConfig, Plan


class MergeConfig(MethodConfig):
    """Plans of the merged checkpoint, and how closely it must match."""

    plan: Plan = ""
    """The plan that the checkpoint runs with; it is stored in its config."""
    method: PeerConfig | None = Field(None, json_schema_extra=ADDED)
    """The peer that it runs with instead."""
    plans: dict[str, str] = Field({}, json_schema_extra=ADDED)
    """The plans of an elastic checkpoint by name; they are stored in its config beside `plan`."""
    probe_rows: int = Field(4, gt=0)
    """Conversations on which merged and adapter model are compared."""
    tolerance: float = Field(1e-3, gt=0)
    """Largest allowed difference of a logit, as a share of the largest logit."""
    max_shard_size: str = "4GB"
    """Size of a safetensors shard."""


MERGE = Kind(
    id="pipeline.stages.merge.merge",
    referring_id="pipeline.stages.search.merge_found",
    version=1,
    body="pipeline.stages.merge.merge",
    config=MergeConfig,
)
