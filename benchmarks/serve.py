"""vLLM dense and under plans, in turns in one process: prefill, throughput, KV blocks, capacity.

    .venv-vllm/bin/python -m benchmarks.serve --json runs/bench/serve.json

A LLaVA with random weights, 576 vision tokens an image and a decoder of 16 layers; on a GPU pass
`--width 4096 --layers 32 --dtype bfloat16` for the geometry of LLaVA-1.5-7B. Times are medians over
turns, and only ratios within one run mean anything. All engines live in this process, one after
another answers the same requests, so load on the machine meets each alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PLANS = ("4:1/2,8:1/2,12:1/2", "1:1/8", "4:1/9,12:0;pool=tiles")
BASE = Path(__file__).parents[1] / "workflows" / "assets" / "tiny_base"
TEXT = 40  # text tokens of a request
IMAGE_TOKEN = 3


def write_model(folder: Path, width: int, layers: int) -> None:
    """A checkpoint with random weights; tokenizer and processor are the shipped base's."""
    import shutil

    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    for file in BASE.iterdir():
        if file.is_file() and file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder / file.name)
    processor = json.loads((folder / "processor_config.json").read_text()) | {"patch_size": 4}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    heads = max(1, width // 128) if width >= 1024 else width // 64
    text = LlamaConfig(
        vocab_size=392,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=96,
        patch_size=4,
        projection_dim=64,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)


def engine(folder: Path, plan: str, options: argparse.Namespace, **settings: Any) -> Any:
    from vllm import LLM

    from adsc import PruningPlan

    return LLM(
        model=str(folder),
        dtype=options.dtype,
        max_model_len=1024,
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        limit_mm_per_prompt={"image": 1},
        enable_prefix_caching=False,
        async_scheduling=False,
        block_size=32,
        seed=0,
        mm_processor_cache_gb=0,
        hf_overrides={"adsc": PruningPlan.parse(plan).to_dict()},
        **settings,
    )


def requests(count: int) -> list[dict[str, Any]]:
    """Pictures that differ, with the same short text."""
    from PIL import Image

    ids = [1, 5, 6, IMAGE_TOKEN, *range(20, 20 + TEXT - 3)]
    pictures = [Image.new("RGB", (96, 96), (9 * number, 90, 120)) for number in range(count)]
    return [{"prompt_token_ids": ids, "multi_modal_data": {"image": it}} for it in pictures]


def timed(engines: dict[str, Any], count: int, new: int, turns: int) -> dict[str, dict[str, float]]:
    """Medians of processor and wall seconds of `count` requests at once; one turn warms up."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    found: dict[str, list[tuple[float, float]]] = {plan: [] for plan in engines}
    for turn in range(turns + 1):
        for plan, llm in engines.items():
            wall, cpu = time.perf_counter(), time.process_time()
            llm.generate(requests(count), sampling, use_tqdm=False)
            if turn:
                found[plan].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {
        plan: {
            "cpu_seconds": statistics.median(cpu for cpu, _ in them),
            "wall_seconds": statistics.median(wall for _, wall in them),
        }
        for plan, them in found.items()
    }


def capacity(llm: Any, size: int) -> dict[str, float]:
    """Blocks and bytes that one request holds, and how many run together in the pool."""
    from vllm import SamplingParams

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool, plain = scheduler.kv_cache_manager.block_pool, scheduler.schedule
    seen: list[tuple[int, int]] = []

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        seen.append((len(scheduler.running), used))
        return output

    scheduler.schedule = schedule
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    llm.generate(requests(1), sampling, use_tqdm=False)
    blocks = max(used for _, used in seen)
    seen.clear()
    llm.generate(requests(28), sampling, use_tqdm=False)
    config = scheduler.kv_cache_config
    return {
        "groups": len(config.kv_cache_groups),
        "blocks": blocks,
        "mib": blocks * size / config.num_blocks / 2**20,
        "together": max(running for running, _ in seen),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", nargs="*", default=PLANS)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pool", type=int, default=200, help="MiB of KV cache for the capacity")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"plans": ["dense", *options.plans]}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(folder, options.width, options.layers)
        texts = {"dense": ""} | {plan: plan for plan in options.plans}
        engines = {name: engine(folder, plan, options) for name, plan in texts.items()}
        result["prefill"] = timed(engines, 8, 1, options.turns)
        result["generate"] = timed(engines, 8, 32, options.turns)
        for llm in engines.values():
            llm.llm_engine.engine_core.shutdown()
        engines.clear()
        size = options.pool << 20
        result["capacity"] = {}
        for name, plan in texts.items():
            llm = engine(folder, plan, options, kv_cache_memory_bytes=size)
            result["capacity"][name] = capacity(llm, size)
            llm.llm_engine.engine_core.shutdown()
    for name in texts:
        ratios = [
            result[case]["dense"]["cpu_seconds"] / result[case][name]["cpu_seconds"]
            for case in ("prefill", "generate")
        ]
        figures = result["capacity"][name]
        print(
            f"{name}: prefill {ratios[0]:.2f}x, with 32 tokens {ratios[1]:.2f}x; "
            f"{figures['groups']} groups, a request holds {figures['mib']:.1f} MiB, "
            f"{figures['together']} together in {options.pool} MiB"
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
