"""What a plan asks of the engine's configuration, and which of vLLM's features go with none.

vLLM calls this when it has read a checkpoint's config and the command line, before anything is
loaded. Families that are not served are checked, too: vLLM would serve them dense.
"""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from adsc.families.table import FAMILIES
from adsc.serving.engine import graphs
from adsc.serving.settings import (
    DENSE,
    SERVED,
    ServedPlan,
    UnservedPlan,
    check_family,
    plan_in,
    served_plan,
)

logger = init_logger("vllm.adsc")

SCHEDULER = "adsc.serving.engine.scheduler.make_scheduler"


class LlavaPlanConfig(VerifyAndUpdateConfig):
    """Of a LLaVA of any family."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        served = served_plan(vllm_config.model_config.hf_config)
        if served is None:
            return
        refuse_features(vllm_config)
        if served.by_size is not None:
            refuse_inputs(vllm_config.model_config)
        refuse_lengths(vllm_config, served)
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER
        logger.info("serving plan %s, %s", served.text, graphs.settle(vllm_config))
        if vllm_config.cache_config.enable_prefix_caching:
            logger.info("prefix caching covers the text before a request's first image")


def refuse_features(config: Any) -> None:
    """Raise UnservedPlan for features of vLLM that don't go with a plan."""
    parallel = config.parallel_config
    features = {
        "speculative decoding": config.speculative_config is not None,
        "--runner pooling": config.model_config.runner_type == "pooling",
        "LoRA": config.lora_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "KV transfer": config.kv_transfer_config is not None,
        "a scheduler of another plugin": config.scheduler_config.scheduler_cls
        not in (None, SCHEDULER),
        "--disable-hybrid-kv-cache-manager": bool(
            config.scheduler_config.disable_hybrid_kv_cache_manager
        ),
    }
    if wanted := [name for name, on in features.items() if on]:
        raise UnservedPlan(
            f"not served with a pruning plan: {', '.join(wanted)}. Leave it out, or serve {DENSE}"
        )


def refuse_inputs(config: Any) -> None:
    """Raise UnservedPlan for pictures whose sizes the scheduler would not see."""
    inputs = config.multimodal_config
    if inputs.enable_mm_embeds:
        raise UnservedPlan(
            "--enable-mm-embeds is not served with a pruning plan on this family, which takes an "
            "image's layout from its picture's size: send pictures"
        )
    if inputs.mm_processor_cache_type == "shm":
        raise UnservedPlan(
            "--mm-processor-cache-type shm is not served with a pruning plan on this family, since "
            "the scheduler reads the sizes of pictures: use lru, the default"
        )


def refuse_lengths(config: Any, served: ServedPlan) -> None:
    """Raise UnservedPlan where steps may be too short for an image whose means need all of it."""
    scheduler = config.scheduler_config
    pooled = next((it for it in (served, *served.choices.values()) if it.pools), None)
    if pooled is None:
        return
    text = pooled.text
    least = served.most + scheduler.max_num_seqs - 1
    if scheduler.max_num_batched_tokens < least:
        raise UnservedPlan(
            f"max_num_batched_tokens = {scheduler.max_num_batched_tokens}: plan {text!r} "
            f"takes means, so a step must hold an image of {served.most} tokens beside "
            f"{scheduler.max_num_seqs - 1} others that decode; use at least {least}, or fewer "
            "max_num_seqs"
        )
    threshold = scheduler.long_prefill_token_threshold
    if 0 < threshold < served.most:
        raise UnservedPlan(
            f"long_prefill_token_threshold = {threshold} would cut images of {served.most} "
            f"tokens, of which plan {text!r} takes means: use 0 or at least that many"
        )


def _refusing(former: Any) -> Any:
    """The config class of a family that is not served with a plan, before vLLM's own one."""

    class Refusing(former or VerifyAndUpdateConfig):  # type: ignore[misc]
        adsc_refuses = True

        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            config = vllm_config.model_config.hf_config
            if plan_in(config) is not None:
                check_family(config)
            super().verify_and_update_config(vllm_config)

    return Refusing


def install() -> None:
    """Have vLLM ask; again is no more."""
    for family in FAMILIES:
        name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(family.model_type)
        former = MODELS_CONFIG_MAP.get(name)
        if family.model_type in SERVED:
            MODELS_CONFIG_MAP[name] = LlavaPlanConfig
        elif name and not hasattr(former, "adsc_refuses"):
            MODELS_CONFIG_MAP[name] = _refusing(former)
