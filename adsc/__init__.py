"""ADSC: score-free vision-token dropping inside the decoder of LLaVA-type models.

Torch, transformers and peft only: nothing here knows of Ray, MLflow or object stores.
"""

from adsc import peers
from adsc.adapters import PlanWarning, keep_plans
from adsc.attach import attach, detach, name_plans, plan_of, plans_of
from adsc.checkpoint import CheckpointError, attach_on_loading, from_pretrained
from adsc.continuous import refuse_continuous_batching
from adsc.cost import Cost, estimate_cost
from adsc.cost_error import CostError
from adsc.families import UnsupportedModel, VisionTokenError
from adsc.held import CacheError
from adsc.outputs import full_length_logits
from adsc.plan import PlanError, PruningPlan
from adsc.running import running, suspended
from adsc.solve import solve_plans
from adsc.static import static_cache

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
]

attach_on_loading()
keep_plans()
refuse_continuous_batching()
