"""Load a model with the plan that travels in its checkpoint's config, or with another one.

Transformers loads the weights; here it is checked that it misses and ignores none. A model
that is loaded by other means (the Auto classes, pipelines) after `import adsc` has its plan
attached too (adsc/attachment/adapters.py). Without adsc the same checkpoint loads as a dense model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText

from adsc import weight_files
from adsc.attachment.attach import attach
from adsc.method import Method
from adsc.plan import PruningPlan

SAFE = {"use_safetensors": True, "trust_remote_code": False}
"""Nothing in a checkpoint is executed: no pickle, no module, and no prompt to allow it."""


class CheckpointError(ValueError):
    """A checkpoint with weights that are missing, unexpected or of the wrong shape."""


def from_pretrained(
    path_or_id: str | Path, *, plan: PruningPlan | Method | str | None = None, **kwargs: Any
) -> Any:
    """Load a multimodal model and attach the plan in its config, if there is one.

    Args:
        path_or_id: a directory, or a name on the hub.
        plan: the plan to use instead: the name of one of the checkpoint's plans, `dense`, a plan,
            or its text form.
        kwargs: for `AutoModelForImageTextToText.from_pretrained`, for example `dtype`; weights
            must be safetensors and no remote code is run, unless `use_safetensors=None` or
            `trust_remote_code=True` is given.

    Raises:
        CheckpointError: weights are missing, unexpected or of the wrong shape, or are not complete
            safetensors in transformers' layout.
        PlanError: the plan does not fit the model, or the checkpoint has none of that name.
    """
    folder = Path(path_or_id) / (kwargs.get("subfolder") or "")
    if kwargs.get("use_safetensors", True) and (why := weight_files.problem(folder)):
        raise CheckpointError(f"can't load {path_or_id}: {why}")
    auto: Any = AutoModelForImageTextToText
    wanted = SAFE | kwargs | {"output_loading_info": True}
    model, report = auto.from_pretrained(path_or_id, **wanted)
    wrong = {
        what: sorted(map(str, names))
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if (names := report.get(what))
    }
    if wrong:
        raise CheckpointError(
            f"{path_or_id} does not fit {type(model).__name__}: {wrong}; every weight must be in "
            "the checkpoint and "
            "have its place in the model"
        )
    if plan is not None:
        attach(model, plan)
    return (model, report) if kwargs.get("output_loading_info") else model
