"""Workflow names that came to mean another recipe, and what stores of before then hold under them.

A store knows stages by what they compute, never by a workflow's name, so nothing that was made is
lost: the former recipe has a name of its own. But the same command must not begin another training
in a store where it began the former one.
"""

from __future__ import annotations

from collections.abc import Sequence

from adsc.plan import PlanError
from pipeline.config import ConfigError
from pipeline.durable import graph
from pipeline.durable import record as records
from pipeline.durable.stage import Stage
from pipeline.durable.workflow import Workflow
from pipeline.store import Store
from workflows.registry import load_workflow

FORMERLY = {
    "llava15_7b": "llava15_7b_paper",
    "llava15_7b_128": "llava15_7b_paper_128",
    "llava15_7b_64": "llava15_7b_paper_64",
}
"""Name of a workflow -> the name that its former recipe has now."""


def former(workflow: Workflow, changes: Sequence[str], store: Store) -> str | None:
    """What a store says about a name that meant another recipe when its training began there.

    Args:
        changes: `KEY=VALUE`, with which the workflow was loaded.

    Returns:
        A sentence with the way out; None where the name means what it meant, where this recipe has
        begun as well, or where the plan was given, so that it is clear which one is meant.
    """
    name = FORMERLY.get(workflow.name)
    if name is None or any(change.partition("=")[0] == "plan" for change in changes):
        return None
    try:
        before = load_workflow(name, changes).stages()
    except (ConfigError, PlanError):  # changes that only the present recipe can have
        return None
    if begun(store, workflow.stages()) or not begun(store, before):
        return None
    plan = workflow.config.plan  # type: ignore[attr-defined]
    return (
        f"{workflow.name} began in {store.root} with the recipe that is called {name} now: "
        f"`adsc run {name}` opens or resumes it, and repeats nothing that is finished. To train "
        f"what {workflow.name} is today in the same store, name its plan: "
        f"`adsc run {workflow.name} --set 'plan={plan}'`"
    )


def begun(store: Store, stages: Sequence[Stage]) -> bool:
    """Whether the store holds anything of the first training with a plan."""
    prints = graph.fingerprints(stages)
    return any(
        store.list(records.folder(name, prints[name])) for name in prints if name == "train-1"
    )
