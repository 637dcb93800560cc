"""vLLM's second model runner: a step becomes known where a model's state prepares its attention."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from adsc.serving.engine import attention
from adsc.serving.engine.requests import kept_of
from adsc.serving.kept import Kept
from adsc.serving.step import make_step


class PlanModelState(DefaultModelState):
    """Remembers where the images of the running requests are."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any):
        super().__init__(vllm_config, model, encoder_cache, device)
        self.kept: dict[str, Kept | None] = {}

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        self.kept[new_req_data.req_id] = kept_of(self.model.served, new_req_data)

    def remove_request(self, req_id: str) -> None:
        self.kept.pop(req_id, None)
        super().remove_request(req_id)

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> Any:
        attention.current = None  # a dummy run may leave prepare_attn out
        return super().prepare_dummy_inputs(num_reqs, num_tokens)

    def prepare_attn(
        self, input_batch: Any, *args: Any, for_capture: bool = False, **kwargs: Any
    ) -> Any:
        count = input_batch.num_reqs
        attention.current = None
        if not for_capture:
            attention.current = make_step(
                input_batch.num_computed_tokens_np[:count],
                input_batch.num_scheduled_tokens[:count],
                [self.kept.get(name) for name in input_batch.req_ids],
                self.device,
            )
        return super().prepare_attn(input_batch, *args, for_capture=for_capture, **kwargs)
