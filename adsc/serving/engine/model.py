"""LLaVA with drops inside its decoder: vLLM's modules and weights, another loop over the layers."""

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
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM, Qwen2Model
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from adsc.serving.engine import attention
from adsc.serving.settings import served_plan

DECODERS = {"llama": "AdscLlamaForCausalLM", "qwen2": "AdscQwen2ForCausalLM"}
"""Under which vLLM finds them."""
# Both names of a tower's weights: with and without transformers' former `vision_model`.
TOWER = WeightsMapper(
    orig_to_new_regex={
        re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)"): "vision_tower.vision_model."
    }
)


class PlanLayers:
    """A decoder whose layers lie in the parts of a plan. vLLM builds it as its own, which then
    changes its class and calls `join`."""

    embed_input_ids: Any
    layers: Any
    norm: Any

    def join(self, part_of: list[int]) -> None:
        self.part_of = part_of
        for layer, part in zip(self.layers, part_of, strict=True):
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


class PlanLlamaModel(PlanLayers, LlamaModel):
    """A LLaMA without its head."""


class PlanQwen2Model(PlanLayers, Qwen2Model):
    """A Qwen2 without its head."""


class PlanLlama(LlamaForCausalLM):
    """A LLaMA with its head."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any):
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        self.model.__class__ = PlanLlamaModel
        self.model.join(vllm_config.model_config.hf_config.adsc_parts)


class PlanQwen2(Qwen2ForCausalLM):
    """A Qwen2 with its head."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any):
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        self.model.__class__ = PlanQwen2Model
        self.model.join(vllm_config.model_config.hf_config.adsc_parts)


class Planned:
    """A LLaVA of any family; without a plan it is vLLM's own class in everything."""

    # The first that matches: former exports hold probe.safetensors beside their weights.
    allow_patterns_overrides = ["model*.safetensors", "*.safetensors", "*.bin", "*.pt"]

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        config = vllm_config.model_config.hf_config
        served = served_plan(config)
        if served is not None:
            config.text_config.architectures = [DECODERS[config.text_config.model_type]]
            config.text_config.adsc_parts = list(served.part_of)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.served = served

    def get_model_state_cls(self) -> Any:
        """vLLM's second model runner asks a model for what prepares its inputs."""
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        from adsc.serving.engine.state import PlanModelState

        return DefaultModelState if self.served is None else PlanModelState


@MULTIMODAL_REGISTRY.register_processor(
    _build_llava_or_pixtral_hf_processor,
    info=_build_llava_or_pixtral_hf_info,
    dummy_inputs=LlavaDummyInputsBuilder,
)
class PlanLlava(Planned, LlavaForConditionalGeneration):
    """LLaVA-1.5."""

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | TOWER


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextMultiModalProcessor,
    info=LlavaNextProcessingInfo,
    dummy_inputs=LlavaDummyInputsBuilder,
)
class PlanLlavaNext(Planned, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""

    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | TOWER


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionMultiModalProcessor,
    info=LlavaOnevisionProcessingInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class PlanLlavaOnevision(Planned, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision."""

    hf_to_vllm_mapper = LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper | TOWER
