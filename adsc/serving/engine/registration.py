"""Hands everything here to vLLM, in each of its processes."""

from __future__ import annotations

from vllm import ModelRegistry

from adsc.serving.engine import cache, limits, patches

MODEL = "adsc.serving.engine.model"
MODELS = {
    "LlavaForConditionalGeneration": "PlanLlava",
    "LlavaNextForConditionalGeneration": "PlanLlavaNext",
    "LlavaOnevisionForConditionalGeneration": "PlanLlavaOnevision",
    "AdscLlamaForCausalLM": "PlanLlama",
    "AdscQwen2ForCausalLM": "PlanQwen2",
}
"""vLLM's name of a model -> its class; a module that is imported where it is needed."""


def install() -> None:
    """Register models, KV cache specs and checks; again is no more."""
    for name, kind in MODELS.items():
        ModelRegistry.register_model(name, f"{MODEL}:{kind}")
    cache.install()
    limits.install()
    patches.install()
