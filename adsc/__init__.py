"""ADSC: score-free vision-token dropping inside the decoder of LLaVA-type models.

Torch, transformers and peft only: nothing here knows of Ray, MLflow or object stores.
"""

from adsc.plan import PlanError, PruningPlan

__all__ = ["PlanError", "PruningPlan"]
