"""ADSC: score-free vision-token dropping inside the decoder of LLaVA-type models.

Torch, transformers and peft only: nothing here knows of Ray, MLflow or object stores.
"""

from adsc import peers
from adsc.attachment.adapters import PlanWarning, keep_plans
from adsc.attachment.attach import attach, detach, name_plans, plan_of, plans_of
from adsc.attachment.continuous import refuse_continuous_batching
from adsc.attachment.running import running, suspended
from adsc.attachment.static_cache import static_cache
from adsc.checkpoint import CheckpointError, attach_on_loading, from_pretrained
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
