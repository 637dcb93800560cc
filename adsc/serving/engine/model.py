"""LLaVA with drops inside its decoder: vLLM's modules and weights, another loop over the layers."""

from __future__ import annotations

import re
from itertools import groupby
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
from adsc.serving.engine.graphs import check_settled
from adsc.serving.engine.parts import make_part
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

    def join(self, vllm_config: Any) -> None:
        check_settled(vllm_config)
        part_of = vllm_config.model_config.hf_config.adsc_parts
        for layer, part in zip(self.layers, part_of, strict=True):
            layer.self_attn.attn.__class__ = attention.PartAttention
            layer.self_attn.attn.join(part)
        self.do_not_compile = True  # each part is
        self.parts: dict[int, Any] = {}
        for part, numbers in groupby(range(len(part_of)), part_of.__getitem__):
            own = list(numbers)
            layers = [self.layers[number] for number in own]
            self.parts[part] = make_part(layers, own[0], vllm_config)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """(N,) ids or (N, D) embeddings -> (N, D). Between parts the residual stream is summed up,
        as the plan's means are of a layer's whole input."""
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        step = attention.current
        for number, part in self.parts.items():
            if step is not None and number:
                entered = step.parts[number]
                if not entered.count:  # a chunk of dropped tokens alone, as a chunk behind an exit
                    return hidden.new_zeros(step.total, hidden.shape[-1])
                hidden = entered.enter(hidden)
                if entered.take is not None:
                    positions = positions[entered.take]
                for layer in part.layers:
                    _cut_slots(layer.self_attn.attn.layer_name, entered.count)
            hidden = part(positions, hidden)
        hidden = self.norm(hidden)
        return hidden if step is None else step.leave(hidden)


def _cut_slots(name: str, count: int) -> None:
    """Leave a layer the slots of the rows that reach it: it writes as many keys as it has slots."""
    slots = get_forward_context().slot_mapping
    slots[name] = slots[name][:count]


class PlanLlamaModel(PlanLayers, LlamaModel):
    """A LLaMA without its head."""


class PlanQwen2Model(PlanLayers, Qwen2Model):
    """A Qwen2 without its head."""


class WithPlanLayers:
    """A decoder with its head."""

    kind: type

    model: Any

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.model.__class__ = self.kind
        self.model.join(vllm_config)


class PlanLlama(WithPlanLayers, LlamaForCausalLM):
    """A LLaMA with its head."""

    kind = PlanLlamaModel


class PlanQwen2(WithPlanLayers, Qwen2ForCausalLM):
    """A Qwen2 with its head."""

    kind = PlanQwen2Model


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

        from adsc.serving.engine.patches import wrap_second_runner
        from adsc.serving.engine.state import PlanModelState

        if self.served is None:
            return DefaultModelState
        wrap_second_runner()
        return PlanModelState


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
