"""The workflows that `adsc` knows, by name. A module is imported when its workflow is wanted."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.durable.workflow import Workflow

WORKFLOWS = {
    "demo": "workflows.demo.workflow",
    "demo_paper": "workflows.demo.workflow",
    "tiny_base": "workflows.demo.tiny_base",
    "evidence": "workflows.evidence.workflow",
    "stamps": "workflows.evidence.stamps",
    "llava15_7b": "workflows.llava15_7b",
    "llava15_7b_128": "workflows.llava15_7b",
    "llava15_7b_64": "workflows.llava15_7b",
    "llava15_7b_elastic": "workflows.llava15_7b",
    "llava15_7b_paper": "workflows.llava15_7b",
    "llava15_7b_paper_128": "workflows.llava15_7b",
    "llava15_7b_paper_64": "workflows.llava15_7b",
}
"""Name of a workflow, which is also the name of the function -> its module."""


def load_workflow(name: str, changes: Sequence[str] = ()) -> Workflow:
    """The workflow of that name with `KEY=VALUE` changes.

    Raises:
        ValueError: an unknown name, a change that isn't KEY=VALUE, and (ConfigError) bad keys.
    """
    if name not in WORKFLOWS:
        near = get_close_matches(name, WORKFLOWS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(WORKFLOWS)}"
        raise ValueError(f"workflow {name!r} is unknown; {hint}")
    malformed = [change for change in changes if "=" not in change]
    if malformed:
        raise ValueError(f"--set {malformed[0]!r} is not KEY=VALUE, such as train.steps=50")
    make: Callable[[], Workflow] = getattr(importlib.import_module(WORKFLOWS[name]), name)
    return make().edit(dict(change.split("=", 1) for change in changes))
