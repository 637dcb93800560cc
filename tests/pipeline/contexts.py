"""A real StageContext around folders that a test made, for bodies that need no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.durable.progress import ProgressHandle
from pipeline.durable.record import Record
from pipeline.durable.stage import Input, Inputs, RunContext, StageContext
from pipeline.tracking.tracker import RunHandle, Tracker

DATA = {"template": "vicuna_short", "digest": "0" * 64}
"""Outputs of a stage that prepared data."""
QUICK = {"prefill_rounds": 2, "decode_rounds": 1, "decode_tokens": 3, "max_new_tokens": 4}
"""Changes to EvaluateConfig: the least that is still measured."""


def stage_context(
    name: str,
    out: Path,
    inputs: Mapping[str, tuple[Path, dict[str, Any]]],
    track: Tracker | None = None,
) -> StageContext:
    """Inputs are given as (folder, outputs)."""
    out.mkdir(parents=True)
    given = {
        key: Input(
            Record(stage=key, fingerprint=key[0] * 64, attempt="1", outputs=outputs, uri=str(place))
        )
        for key, (place, outputs) in inputs.items()
    }
    return StageContext(
        name=name,
        fingerprint="f" * 64,
        run=RunContext(root=str(out.parent), workflow="demo", commit="8518b82"),
        inputs=Inputs(given),
        out=out,
        train_storage=(str(out.parent), "run"),
        track=track or Tracker(RunHandle("", None)),
        progress_handle=ProgressHandle(stage=name),
    )
