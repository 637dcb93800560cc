"""LLaVA with drops inside its LLaMA: vLLM's modules and weights, another loop over the layers."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.llama import LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    _build_llava_or_pixtral_hf_info,
    _build_llava_or_pixtral_hf_processor,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from adsc.serving.engine import attention
from adsc.serving.settings import served_plan

DECODER = "AdscLlamaForCausalLM"
"""Under which vLLM finds the decoder."""


class PlanLlamaModel(LlamaModel):
    """A LLaMA whose layers lie in the parts of a plan."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any):
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        self.part_of = vllm_config.model_config.hf_config.adsc_parts
        for layer, part in zip(self.layers, self.part_of, strict=True):
            layer.self_attn.attn.__class__ = attention.PartAttention
            layer.self_attn.attn.join(part)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """(N,) ids or (N, D) embeddings -> (N, D). At a drop the residual stream is summed up, as
        the plan's means are of a layer's whole input."""
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        step, residual, number = attention.current, None, 0
        for layer, part in zip(self.layers, self.part_of, strict=True):
            while step is not None and number < part:
                number += 1
                entered = step.parts[number]
                if entered.take is None:
                    continue
                if not entered.count:  # a chunk of dropped tokens alone, as a chunk behind an exit
                    return hidden.new_zeros(step.total, hidden.shape[-1])
                hidden = entered.enter(hidden if residual is None else hidden + residual)
                positions, residual = positions[entered.take], None
            if step is not None and part:
                _cut_slots(layer.self_attn.attn.layer_name, step.parts[part].count)
            hidden, residual = layer(positions, hidden, residual)
        hidden, _ = self.norm(hidden, residual)
        return hidden if step is None else step.leave(hidden)


def _cut_slots(name: str, count: int) -> None:
    """Leave a layer the slots of the rows that reach it: it writes as many keys as it has slots."""
    slots = get_forward_context().slot_mapping
    slots[name] = slots[name][:count]


class PlanLlama(LlamaForCausalLM):
    """The decoder with its head."""

    def _init_model(self, vllm_config: Any, prefix: str = "", **kwargs: Any) -> PlanLlamaModel:
        return PlanLlamaModel(vllm_config=vllm_config, prefix=prefix, **kwargs)


@MULTIMODAL_REGISTRY.register_processor(
    _build_llava_or_pixtral_hf_processor,
    info=_build_llava_or_pixtral_hf_info,
    dummy_inputs=LlavaDummyInputsBuilder,
)
class PlanLlava(LlavaForConditionalGeneration):
    """A LLaVA checkpoint; without a plan it is vLLM's own class in everything."""

    # The first that matches: former exports hold probe.safetensors beside their weights.
    allow_patterns_overrides = ["model*.safetensors", "*.safetensors", "*.bin", "*.pt"]
    # Both names of a CLIP tower's weights: with and without transformers' former `vision_model`.
    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_regex={
            re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)"): "vision_tower.vision_model."
        }
    )

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        config = vllm_config.model_config.hf_config
        served = served_plan(config)
        if served is not None:
            config.text_config.architectures = [DECODER]
            config.text_config.adsc_parts = list(served.part_of)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.served = served

    def get_model_state_cls(self) -> Any:
        """vLLM's second model runner asks a model for what prepares its inputs."""
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        from adsc.serving.engine.state import PlanModelState

        return DefaultModelState if self.served is None else PlanModelState
