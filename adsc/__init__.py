"""ADSC: score-free vision-token dropping inside the decoder of LLaVA-type models.

Torch, transformers and peft only: nothing here knows of Ray, MLflow or object stores.
"""

from adsc.cost import Cost, estimate_cost
from adsc.cost_error import CostError
from adsc.plan import PlanError, PruningPlan
from adsc.solve import solve_plans

__all__ = ["Cost", "CostError", "PlanError", "PruningPlan", "estimate_cost", "solve_plans"]
