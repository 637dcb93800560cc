"""The part of a finished stage that its workflow is compared by, in the workflow's own MLflow run.

A kind of stage chooses it from its record (`Kind.headline`); this module neither reads records nor
sends anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class DataSet(NamedTuple):
    """A version of a data set, as MLflow lists it among a run's inputs."""

    uri: str
    """Where it is."""
    name: str
    """What it is, in one or two words."""
    digest: str
    """Which version."""


@dataclass(frozen=True, kw_only=True)
class Headline:
    """What one stage adds to its workflow's run."""

    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """Numbers by name; None is left out."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """What was found rather than configured, by name."""
    data: DataSet | None = None
    """The data that the workflow used, where this stage knows it."""
