"""What does not go with a plan is refused when the engine is configured, in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from adsc import PruningPlan
from adsc.families.table import FAMILIES
from adsc.serving.settings import SERVED
from tests.adsc.serving.engine.engines import configured
from tests.adsc.zoo import CASES

DROP = PruningPlan.parse("2:1/2").to_dict()
MEAN = PruningPlan.parse("2:1/4;pool=tiles").to_dict()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"enable_lora": True}, "LoRA"),
        ({"runner": "pooling"}, "pooling"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding",
        ),
        (
            {
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                }
            },
            "KV transfer",
        ),
        ({"disable_hybrid_kv_cache_manager": True}, "hybrid"),
    ],
)
def test_features(checkpoint: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"not served with a pruning plan: .*{words}"):
        configured(checkpoint, DROP, **options)
    assert configured(checkpoint, DROP)


def test_steps_must_hold_an_image_of_which_means_are_taken(checkpoint: Path) -> None:
    short: dict[str, Any] = {"max_num_batched_tokens": 64 + 14}
    with pytest.raises(ValueError, match="use at least 79"):
        configured(checkpoint, MEAN, **short)
    assert configured(checkpoint, DROP, **short)
    with pytest.raises(ValueError, match="long_prefill_token_threshold = 63"):
        configured(checkpoint, MEAN, long_prefill_token_threshold=63)


def test_methods_and_positions(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="by fastv"):
        configured(checkpoint, {"method": "fastv", "stages": [[2, "1/2"]]})
    with pytest.raises(ValueError, match="positions=keep"):
        configured(checkpoint, PruningPlan.parse("2:1/2;positions=reindex").to_dict())


REFUSED = {
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": r"Qwen2\.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "internvl": "InternVL",
    "smolvlm": "SmolVLM",
    "idefics3": "Idefics3",
    "gemma3": "Gemma 3",
    "paligemma": "PaliGemma",
}


def test_every_family_is_served_or_refused() -> None:
    assert {family.model_type for family in FAMILIES} == {*SERVED, *REFUSED}


@pytest.mark.parametrize("family", REFUSED)
def test_other_families_are_refused_by_name(family: str, tmp_path: Path, checkpoint: Path) -> None:
    """vLLM would serve them dense."""
    config = CASES[family].build().config
    for name in checkpoint.iterdir():
        if name.name != "config.json":
            (tmp_path / name.name).symlink_to(name)
    architecture = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family]
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{REFUSED[family]} with a pruning plan is not served"):
        configured(tmp_path, DROP)
    assert configured(tmp_path, {})
