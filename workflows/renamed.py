"""Workflow names that now mean another recipe, and stores from before the change.

A store identifies stages by what they compute, never by a workflow's name, so nothing is lost: the
former recipe has a new name. But the same command must not start another training in a store where
it started the former one.
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
"""Name of a workflow -> the present name of its former recipe."""


def former(workflow: Workflow, changes: Sequence[str], store: Store) -> str | None:
    """A warning if the name meant another recipe when its training started in this store.

    Args:
        changes: `KEY=VALUE`, with which the workflow was loaded.

    Returns:
        A sentence with the way out; None if the name still means the same, if this recipe has
        started as well, or if the plan was given, which makes the recipe unambiguous.
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
        f"{workflow.name} was started in {store.root} with the recipe now called {name}: "
        f"`adsc run {name}` resumes it and repeats no finished stage. To train today's "
        f"{workflow.name} in the same store, name its plan: "
        f"`adsc run {workflow.name} --set 'plan={plan}'`"
    )


def begun(store: Store, stages: Sequence[Stage]) -> bool:
    """Whether the store holds anything of the first training with a plan."""
    prints = graph.fingerprints(stages)
    return any(
        store.list(records.folder(name, prints[name])) for name in prints if name == "train-1"
    )
