"""vLLM dense and under plans, in turns in one process: prefill, throughput, KV blocks, capacity.

    .venv-vllm/bin/python -m benchmarks.serve --eager --json runs/bench/serve.json

A LLaVA with random weights, 576 vision tokens an image and a decoder of 16 layers; on a GPU pass
`--width 4096 --layers 32 --dtype bfloat16` for the geometry of LLaVA-1.5-7B. Times are medians over
turns, and only ratios within one run mean anything. All engines live in this process, one after
another answers the same requests, so load on the machine meets each alike. Without `--eager` vLLM
compiles the dense model and not those with plans.
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

SETTINGS = {
    "OMP_NUM_THREADS": "1",  # threads that wait for each other would count as work
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
PLANS = ("4:1/2,8:1/2,12:1/2", "1:1/8", "4:1/9,12:0;pool=tiles")
BASE = Path(__file__).parents[1] / "workflows" / "assets" / "tiny_base"
TEXT = 40  # text tokens of a request
IMAGE_TOKEN = 3
CONCURRENCY = 8
TIMED = ("prefill", "generate")
MOST = 32  # requests that an engine runs at once
POOLED = 5  # dense requests whose KV cache the pool of the capacity holds


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


def engine(folder: Path, plan: str, options: argparse.Namespace, pool: int = 0) -> Any:
    """An engine; `pool` is the bytes of its keys and values, where they aren't the usual."""
    from vllm import LLM

    from adsc import PruningPlan

    return LLM(
        model=str(folder),
        dtype=options.dtype,
        max_model_len=1024,
        max_num_seqs=MOST,
        max_num_batched_tokens=2048,
        limit_mm_per_prompt={"image": 1},
        enable_prefix_caching=False,
        async_scheduling=False,
        block_size=32,
        seed=0,
        mm_processor_cache_gb=0,
        disable_log_stats=False,
        kv_cache_memory_bytes=pool or pool_bytes(options),
        gpu_memory_utilization=0.2,  # free when an engine starts, beside those before it
        enforce_eager=options.eager,
        hf_overrides={"adsc": PruningPlan.parse(plan).to_dict()},
    )


def requests(count: int) -> list[dict[str, Any]]:
    """Pictures that differ, with the same short text."""
    from PIL import Image

    ids = [1, 5, 6, IMAGE_TOKEN, *range(20, 20 + TEXT - 3)]
    pictures = [Image.new("RGB", (96, 96), (9 * number, 90, 120)) for number in range(count)]
    return [{"prompt_token_ids": ids, "multi_modal_data": {"image": it}} for it in pictures]


def timed(engines: dict[str, Any], new: int, turns: int, warm: int) -> dict[str, dict[str, float]]:
    """Medians over turns of CONCURRENCY requests at once; the first `warm` turns don't count."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    found: dict[str, list[dict[str, float]]] = {plan: [] for plan in engines}
    for turn in range(turns + warm):
        for plan, llm in engines.items():
            wall, cpu = time.perf_counter(), time.process_time()
            outputs = llm.generate(requests(CONCURRENCY), sampling, use_tqdm=False)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            first = statistics.median(it.metrics.first_token_latency for it in outputs)
            if turn >= warm:
                found[plan].append(
                    {
                        "cpu_seconds": cpu,
                        "wall_seconds": wall,
                        "first_token_seconds": first,
                        "requests_per_s": CONCURRENCY / wall,
                        "tokens_per_s": CONCURRENCY * new / wall,
                    }
                )
    return {
        plan: {name: statistics.median(it[name] for it in them) for name in them[0]}
        for plan, them in found.items()
    }


def request_bytes(options: argparse.Namespace) -> int:
    """Bytes of keys and values of a dense request with 24 new tokens: whole blocks of 32."""
    size = 4 if options.dtype == "float32" else 2
    return 2 * options.layers * options.width * size * (576 + TEXT + 24)


def pool_bytes(options: argparse.Namespace) -> int:
    """Bytes of an engine's pool of keys and values."""
    return (CONCURRENCY + 2) * request_bytes(options)


def blocks_held(llm: Any) -> list[int]:
    """A list that gets, after each step from now on, the blocks that requests hold."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool, plain = scheduler.kv_cache_manager.block_pool, scheduler.schedule
    free, seen = pool.get_num_free_blocks(), list[int]()

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        seen.append(free - pool.get_num_free_blocks())
        return output

    scheduler.schedule = schedule
    return seen


def mib(llm: Any, blocks: int, options: argparse.Namespace) -> float:
    """What so many blocks take."""
    config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    return blocks * pool_bytes(options) / config.num_blocks / 2**20


def capacity(llm: Any, options: argparse.Namespace) -> dict[str, float]:
    """Blocks and MiB that one request holds at most, and the groups that they are in."""
    from vllm import SamplingParams

    seen = blocks_held(llm)
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    llm.generate(requests(1), sampling, use_tqdm=False)
    groups = len(llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups)
    return {"groups": groups, "blocks": max(seen), "mib": mib(llm, max(seen), options)}


def fewer_flops(folder: Path, plans: dict[str, str]) -> dict[str, float]:
    """Dense FLOPs of a prefill over those under each plan: what no engine can gain more than."""
    from transformers import AutoConfig

    from adsc import PruningPlan, estimate_cost

    config = AutoConfig.from_pretrained(folder)
    dense = estimate_cost(config, None, text_tokens=TEXT).flops
    return {
        name: dense / estimate_cost(config, PruningPlan.parse(plan), text_tokens=TEXT).flops
        for name, plan in plans.items()
    }


def together(folder: Path, plan: str, options: argparse.Namespace) -> dict[str, float]:
    """How many of MOST requests answered at once, at most, in an engine with the pool that is
    divided beside; and how often one had to make room for others. Requests count from their first
    token on: vLLM admits more at once than fit, with the text before their images."""
    from vllm import SamplingParams

    llm = engine(folder, plan, options, POOLED * request_bytes(options))
    scheduler, ran = llm.llm_engine.engine_core.engine_core.scheduler, list[int]()
    plain = scheduler.schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        ran.append(sum(it.num_output_tokens > 0 for it in scheduler.running))
        return output

    scheduler.schedule = schedule
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    llm.generate(requests(MOST), sampling, use_tqdm=False)
    found = [it.value for it in llm.get_metrics() if it.name == "vllm:num_preemptions"]
    llm.llm_engine.engine_core.shutdown()
    return {"together": max(ran), "preemptions": sum(found)}


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each plan: FLOPs and times as multiples of dense, the first two times by processor
    time."""
    found = []
    for name, held in result["capacity"].items():
        own, dense = ({case: result[case][it] for case in TIMED} for it in (name, "dense"))
        cpu = [dense[case]["cpu_seconds"] / own[case]["cpu_seconds"] for case in TIMED]
        wall = {
            key: own["generate"][key] / dense["generate"][key]
            for key in ("requests_per_s", "tokens_per_s", "first_token_seconds")
        }
        found.append(
            {
                "plan": name,
                "FLOPs": round(result["flops"][name], 2),
                "prefill": round(cpu[0], 2),
                "with 32 tokens": round(cpu[1], 2),
                "requests/s": round(wall["requests_per_s"], 2),
                "tokens/s": round(wall["tokens_per_s"], 2),
                "time to first token": round(wall["first_token_seconds"], 2),
                "groups": held["groups"],
                "blocks of a request": held["blocks"],
                "MiB of a request": round(held["mib"], 1),
                f"would fit in {result['pool_mib']} MiB": int(result["pool_mib"] / held["mib"]),
                f"ran in {result['pool_mib']} MiB": held["together"],
                "preemptions": held["preemptions"],
            }
        )
    return found


def by_request(folder: Path, plan: str, options: argparse.Namespace) -> None:
    """Prefill of four requests under a plan and of the same four that choose `dense`, in turns in
    one engine; prints processor seconds and what one request holds."""
    from vllm import SamplingParams

    llm = engine(folder, plan, options)
    seen = blocks_held(llm)

    def seconds(count: int, choice: dict[str, str] | None) -> float:
        sampling = SamplingParams(
            temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, extra_args=choice
        )
        start = time.process_time()
        llm.generate(requests(count), sampling, use_tqdm=False)
        return time.process_time() - start

    seconds(1, None)
    held = max(seen)
    turns = [(seconds(4, {"adsc_plan": "dense"}), seconds(4, None)) for _ in range(options.turns)]
    dense, own = (statistics.median(them) for them in zip(*turns, strict=True))
    print(
        f"{plan}: prefill {dense / own:.2f}x ({dense:.2f} s, {own:.2f} s); a request holds {held} "
        f"blocks, {mib(llm, held, options):.1f} MiB"
    )
    llm.llm_engine.engine_core.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", nargs="*", default=PLANS)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--eager", action="store_true", help="nothing compiled, dense neither")
    parser.add_argument(
        "--by-request", action="store_true", help="prefill alone, dense chosen by the request"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if options.eager:
        os.environ["VLLM_CPU_CI_ENV"] = "1"  # the sampler on a CPU
    texts = {"dense": ""} | {plan: plan for plan in options.plans}
    pooled = POOLED * request_bytes(options)
    result: dict[str, Any] = {"plans": list(texts), "pool_mib": pooled >> 20}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(folder, options.width, options.layers)
        if options.by_request:
            for plan in options.plans:
                by_request(folder, plan, options)
            return
        result["flops"] = fewer_flops(folder, texts)
        engines = {name: engine(folder, plan, options) for name, plan in texts.items()}
        result["prefill"] = timed(engines, 1, options.turns, warm=1)
        result["generate"] = timed(engines, 32, options.turns, warm=0)
        result["capacity"] = {name: capacity(llm, options) for name, llm in engines.items()}
        for llm in engines.values():
            llm.llm_engine.engine_core.shutdown()
        for name, plan in texts.items():
            result["capacity"][name] |= together(folder, plan, options)
    for row in rows(result):
        print(", ".join(f"{key}: {value}" for key, value in row.items()))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
