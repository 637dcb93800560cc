"""Hands everything here to vLLM, in each of its processes."""

from __future__ import annotations

from vllm import ModelRegistry

from adsc.serving.engine import cache, limits, patches

MODEL = "adsc.serving.engine.model"


def install() -> None:
    """Register models, KV cache specs and checks; again is no more."""
    ModelRegistry.register_model("LlavaForConditionalGeneration", f"{MODEL}:PlanLlava")
    ModelRegistry.register_model("AdscLlamaForCausalLM", f"{MODEL}:PlanLlama")
    cache.install()
    limits.install()
    patches.install()
