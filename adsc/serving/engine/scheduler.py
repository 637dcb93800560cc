"""The scheduler: it tells block managers where a request's images are, and cuts no image in two
where a plan takes means.

vLLM takes another scheduler by its setting `scheduler_cls`; which of its own two this one extends
is known only once the engine is configured.
"""

from __future__ import annotations

from math import ceil
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from adsc.serving.engine.cache import PartManager
from adsc.serving.engine.requests import kept_of
from adsc.serving.kept import Kept
from adsc.serving.settings import ServedPlan, served_plan

logger = init_logger("vllm.adsc")

TEXT = 100  # text tokens of the request that the pool is said to hold


class _PlanScheduling:
    """What is added to either of vLLM's schedulers."""

    kv_cache_manager: Any

    def __init__(self, *, vllm_config: Any, **kwargs: Any):
        super().__init__(vllm_config=vllm_config, **kwargs)  # type: ignore[call-arg]
        self.served = served_plan(vllm_config.model_config.hf_config)
        assert self.served is not None
        self.kept: dict[str, Kept] = {}
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, PartManager):
                manager.kept = self.kept
        logger.info(pool_of(self.served, self.kv_cache_manager))

    def add_request(self, request: Any) -> None:
        assert self.served is not None
        if kept := kept_of(self.served, request):
            self.kept[request.request_id] = kept
        super().add_request(request)  # type: ignore[misc]

    def _free_blocks(self, request: Any) -> None:
        super()._free_blocks(request)  # type: ignore[misc]
        self.kept.pop(request.request_id, None)

    def _try_schedule_encoder_inputs(
        self, request: Any, num_computed_tokens: int, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        """vLLM's own `disable_chunked_mm_input` still cuts an image with which a step begins."""
        kept = self.kept.get(request.request_id)
        if kept is not None and kept.served.pools:
            num_new_tokens = kept.last_whole(num_computed_tokens, num_new_tokens)
        return super()._try_schedule_encoder_inputs(  # type: ignore[misc]
            request, num_computed_tokens, num_new_tokens, *args, **kwargs
        )


class PlanScheduler(_PlanScheduling, Scheduler):
    """Of an engine that waits for each step."""


class AsyncPlanScheduler(_PlanScheduling, AsyncScheduler):
    """Of an engine that schedules a step while another one runs."""


def pool_of(served: ServedPlan, manager: Any) -> str:
    """How many requests with one image the pool of blocks holds, for the log."""
    groups = manager.kv_cache_config.kv_cache_groups
    tokens = served.image.tokens + TEXT
    kept = Kept(served, [(0, served.image)])
    held = [kept.left(group.kv_cache_spec.part, tokens) for group in groups]
    size = groups[0].kv_cache_spec.block_size
    own, dense = (sum(ceil(it / size) for it in them) for them in (held, [tokens] * len(groups)))
    blocks = manager.block_pool.num_gpu_blocks - 1  # the first is vLLM's own
    return (
        f"KV pool: {blocks} blocks of {size} tokens in {len(groups)} groups; a request with one "
        f"image and {TEXT} text tokens takes {own}, so {blocks // own} run together "
        f"(dense: {dense}, {blocks // dense})"
    )


def make_scheduler(*, vllm_config: Any, **kwargs: Any) -> PlanScheduler | AsyncPlanScheduler:
    """What `scheduler_cls` names."""
    asynchronous = vllm_config.scheduler_config.async_scheduling
    kind = AsyncPlanScheduler if asynchronous else PlanScheduler
    return kind(vllm_config=vllm_config, **kwargs)
