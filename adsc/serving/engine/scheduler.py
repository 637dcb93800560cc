"""The scheduler: it tells block managers where a request's images are, and cuts no image in two
where a plan takes means.

vLLM takes another scheduler by its setting `scheduler_cls`; which of its own two this one extends
is known only once the engine is configured.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from adsc.serving.engine.cache import PartManager
from adsc.serving.engine.requests import kept_of
from adsc.serving.kept import Kept
from adsc.serving.settings import served_plan


class _PlanScheduling:
    """What is added to either of vLLM's schedulers."""

    kv_cache_manager: Any

    def __init__(self, *, vllm_config: Any, **kwargs: Any):
        super().__init__(vllm_config=vllm_config, **kwargs)
        self.served = served_plan(vllm_config.model_config.hf_config)
        assert self.served is not None
        self.kept: dict[str, Kept] = {}
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, PartManager):
                manager.kept = self.kept

    def add_request(self, request: Any) -> None:
        assert self.served is not None
        if kept := kept_of(self.served, request.mm_features):
            self.kept[request.request_id] = kept
        super().add_request(request)  # type: ignore[misc]

    def _free_blocks(self, request: Any) -> None:
        super()._free_blocks(request)  # type: ignore[misc]
        self.kept.pop(request.request_id, None)

    def _try_schedule_encoder_inputs(
        self, request: Any, num_computed_tokens: int, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        """vLLM's own `disable_chunked_mm_input` still cuts an image with which a step begins."""
        assert self.served is not None
        kept = self.kept.get(request.request_id)
        if kept is not None and self.served.pools:
            num_new_tokens = kept.last_whole(num_computed_tokens, num_new_tokens)
        return super()._try_schedule_encoder_inputs(  # type: ignore[misc]
            request, num_computed_tokens, num_new_tokens, *args, **kwargs
        )


class PlanScheduler(_PlanScheduling, Scheduler):
    """Of an engine that waits for each step."""


class AsyncPlanScheduler(_PlanScheduling, AsyncScheduler):
    """Of an engine that schedules a step while another one runs."""


def make_scheduler(*, vllm_config: Any, **kwargs: Any) -> PlanScheduler | AsyncPlanScheduler:
    """What `scheduler_cls` names."""
    asynchronous = vllm_config.scheduler_config.async_scheduling
    kind = AsyncPlanScheduler if asynchronous else PlanScheduler
    return kind(vllm_config=vllm_config, **kwargs)
