"""The workflows that `adsc` knows, by name. A workflow's module is imported when it is loaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pipeline.durable.workflow import Workflow


class Listed(NamedTuple):
    """A workflow before it is imported."""

    module: str
    """Module of the function that has the workflow's name."""
    title: str
    """Its description, in one line."""


WORKFLOWS = {
    "demo": Listed(
        "workflows.demo.workflow",
        "compress the small LLaVA that ships here, in minutes on two cores",
    ),
    "demo_paper": Listed(
        "workflows.demo.workflow",
        "the demo by the paper's recipe alone: drops, a reverse curriculum, no teacher",
    ),
    "tiny_base": Listed(
        "workflows.demo.tiny_base",
        "train the small LLaVA that ships here from scratch",
    ),
    "evidence": Listed(
        "workflows.evidence.workflow",
        "compare ADSC's choices and its peers under the same training: hours on two cores",
    ),
    "stamps": Listed(
        "workflows.evidence.stamps",
        "the evidence on pretrained parts, installed separately: nights on two cores",
    ),
    "llava15_7b": Listed(
        "workflows.llava15_7b",
        "compress LLaVA-1.5-7B to 192 vision tokens: tiles, exit, distillation (LLaVA-665K, GPUs, "
        "days)",
    ),
    "llava15_7b_128": Listed("workflows.llava15_7b", "llava15_7b with 128 vision tokens"),
    "llava15_7b_64": Listed("workflows.llava15_7b", "llava15_7b with 64 vision tokens"),
    "llava15_7b_elastic": Listed(
        "workflows.llava15_7b",
        "compress LLaVA-1.5-7B for 192, 128 and 64 vision tokens at once (LLaVA-665K, GPUs, days)",
    ),
    "llava15_7b_paper": Listed(
        "workflows.llava15_7b",
        "compress LLaVA-1.5-7B to 192 vision tokens, the paper's setting (LLaVA-665K, GPUs, days)",
    ),
    "llava15_7b_paper_128": Listed(
        "workflows.llava15_7b", "llava15_7b_paper with 128 vision tokens"
    ),
    "llava15_7b_paper_64": Listed("workflows.llava15_7b", "llava15_7b_paper with 64 vision tokens"),
}


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
    make: Callable[[], Workflow] = getattr(importlib.import_module(WORKFLOWS[name].module), name)
    return make().edit(dict(change.split("=", 1) for change in changes))
