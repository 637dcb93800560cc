"""A view of MLflow's list of runs: workflows alone, with the columns they are compared by.

The list opens with times and sources only. A view saved with the experiment, as MLflow's own button
Views saves it, shows the rest to everybody; `ADDRESS` opens it. Nothing here calls MLflow.
"""

from __future__ import annotations

import json
import time

KEY = "adsc-workflows"
TAG = f"mlflow.sharedViewState.{KEY}"
"""The experiment's tag in which MLflow's page looks for the view."""
ADDRESS = f"?viewStateShareKey={KEY}"
"""What follows the address of a list of runs."""
COLUMNS = (
    "params.`plan`",
    "metrics.`accuracy`",
    "metrics.`retention`",
    "metrics.`average_vision_tokens`",
    "metrics.`flops`",
    "metrics.`kv_cache_bytes`",
    "metrics.`prefill_ms`",
    "metrics.`gpu_hours`",
)


def saved_view() -> str:
    """The tag's value: a named view made now."""
    state = {
        "searchFilter": "metrics.gpu_hours >= 0",  # a workflow's own run alone has it
        "selectedColumns": list(COLUMNS),
        "columnOrder": list(COLUMNS),
    }
    now = int(1000 * time.time())
    return json.dumps(
        {"name": "Workflows", "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
    )
