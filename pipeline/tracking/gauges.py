"""Gauges that a cluster's Prometheus reads: rates of a training, states of stages.

Ray exports them beside its own, on every node's metrics port, with the prefix `ray_`. They are for
looking at what runs now; what is kept is in MLflow and in the store. infra/monitoring draws them.
Where there is no Ray, they go nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

STATES = ("to run", "waiting", "running", "done", "cached", "failed", "not run")
"""A stage's state; `adsc_stage_state` is the place in this list."""

GAUGES = {
    "adsc_loss": "Mean loss of a supervised token since the last report",
    "adsc_gradient_norm": "Norm of the gradient before clipping",
    "adsc_samples_per_second": "Conversations per second, over all workers",
    "adsc_vision_tokens_per_second": "Vision tokens per second that enter the decoder, all workers",
    "adsc_text_tokens_per_second": "Text tokens per second, over all workers",
    "adsc_padding_share": "Share of the positions that were padding",
    "adsc_data_wait_share": "Share of the time in which rank 0 waited for data",
    "adsc_peak_memory_bytes": "Most memory that rank 0 had in use",
    "adsc_mfu": "Share of the devices' peak FLOP/s that training needed",
    "adsc_hfu": "The same, with what activation checkpointing computes again",
    "adsc_steps_done": "Optimizer steps done",
    "adsc_steps_total": "Optimizer steps of the stage",
    "adsc_stage_state": "State of a stage: " + ", ".join(f"{n} {s}" for n, s in enumerate(STATES)),
}
"""Every gauge, and what it says; none of them exists without standing here."""


def training(stage: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
    """What rank 0 of a training logs; metrics that have no gauge are left out."""
    values = {f"adsc_{name}": value for name, value in metrics.items()}
    values |= {"adsc_steps_done": float(step), "adsc_steps_total": float(steps)}
    for name in values.keys() & GAUGES.keys():
        _set(name, values[name], {"stage": stage})


def stage_states(workflow: str, states: Mapping[str, str]) -> None:
    """The states of a workflow's stages, in words of STATES; others are left out."""
    for stage, state in states.items():
        if state in STATES:
            tags = {"workflow": workflow, "stage": stage}
            _set("adsc_stage_state", STATES.index(state), tags)


def _set(name: str, value: float, tags: dict[str, str]) -> None:
    import ray

    if ray.is_initialized():
        _gauge(name, tuple(sorted(tags))).set(value, tags=tags)


@lru_cache
def _gauge(name: str, tag_keys: tuple[str, ...]) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(name, description=GAUGES[name], tag_keys=tag_keys)
