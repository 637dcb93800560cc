"""What does not go with a plan is refused when the engine is configured, in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from adsc import PruningPlan
from adsc.serving import register

DROP = PruningPlan.parse("2:1/2").to_dict()
MEAN = PruningPlan.parse("2:1/4;pool=tiles").to_dict()


def configured(folder: Path, plan: dict[str, Any], **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    register()
    settings = {"model": str(folder), "hf_overrides": {"adsc": plan}, "max_num_seqs": 16}
    return EngineArgs(**(settings | options)).create_engine_config()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"enable_lora": True}, "LoRA"),
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


def test_other_families_are_refused_by_name(tmp_path: Path, checkpoint: Path) -> None:
    """vLLM would serve them dense."""
    from transformers import LlavaNextConfig

    config = json.loads((checkpoint / "config.json").read_text())
    for name in checkpoint.iterdir():
        if name.name != "config.json":
            (tmp_path / name.name).symlink_to(name)
    other = LlavaNextConfig(
        text_config=config["text_config"], vision_config=config["vision_config"]
    ).to_dict()
    other["architectures"] = ["LlavaNextForConditionalGeneration"]
    (tmp_path / "config.json").write_text(json.dumps(other, default=str))
    with pytest.raises(ValueError, match="LLaVA-NeXT with a pruning plan is not served"):
        configured(tmp_path, DROP)
    assert configured(tmp_path, {})
