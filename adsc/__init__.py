"""ADSC: score-free vision-token dropping inside the decoder of LLaVA-type models.

It needs torch, transformers and peft; Ray, MLflow and object stores belong to `pipeline`. Names are
imported on first use, so plans, budgets and costs load no torch. The method is that of
arXiv 2602.12618; pooling and exits are additions.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from adsc.attachment.adapters import keep_plans
from adsc.attachment.continuous import refuse_continuous_batching

if TYPE_CHECKING:
    from adsc import peers
    from adsc.attachment.adapters import PlanWarning
    from adsc.attachment.attach import attach, detach, name_plans, plan_of, plans_of
    from adsc.attachment.compiled import compile_layers, uncompile_layers
    from adsc.attachment.running import running, suspended
    from adsc.attachment.static_cache import static_cache
    from adsc.checkpoint import CheckpointError, from_pretrained
    from adsc.costs.cost import Cost, estimate_cost
    from adsc.dropping.cache_record import CacheError
    from adsc.dropping.outputs import full_length_logits
    from adsc.errors import CostError, UnsupportedModel, VisionTokenError
    from adsc.plan import PlanError, PruningPlan
    from adsc.solve import solve_plans

__all__ = [
    "CacheError",
    "CheckpointError",
    "Cost",
    "CostError",
    "PlanError",
    "PlanWarning",
    "PruningPlan",
    "UnsupportedModel",
    "VisionTokenError",
    "attach",
    "compile_layers",
    "detach",
    "estimate_cost",
    "from_pretrained",
    "full_length_logits",
    "name_plans",
    "peers",
    "plan_of",
    "plans_of",
    "running",
    "solve_plans",
    "static_cache",
    "suspended",
    "uncompile_layers",
]

_HOMES = {
    "CacheError": "adsc.dropping.cache_record",
    "CheckpointError": "adsc.checkpoint",
    "Cost": "adsc.costs.cost",
    "CostError": "adsc.errors",
    "PlanError": "adsc.plan",
    "PlanWarning": "adsc.attachment.adapters",
    "PruningPlan": "adsc.plan",
    "UnsupportedModel": "adsc.errors",
    "VisionTokenError": "adsc.errors",
    "attach": "adsc.attachment.attach",
    "compile_layers": "adsc.attachment.compiled",
    "detach": "adsc.attachment.attach",
    "estimate_cost": "adsc.costs.cost",
    "from_pretrained": "adsc.checkpoint",
    "full_length_logits": "adsc.dropping.outputs",
    "name_plans": "adsc.attachment.attach",
    "plan_of": "adsc.attachment.attach",
    "plans_of": "adsc.attachment.attach",
    "running": "adsc.attachment.running",
    "solve_plans": "adsc.solve",
    "static_cache": "adsc.attachment.static_cache",
    "suspended": "adsc.attachment.running",
    "uncompile_layers": "adsc.attachment.compiled",
}
"""Name -> the module that has it."""


def __getattr__(name: str) -> Any:
    """What is named for the first time (PEP 562)."""
    if name == "peers":
        return import_module("adsc.peers")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


keep_plans()
refuse_continuous_batching()
