"""vLLM engines of the tests, in this process, so that their schedulers can be watched."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from tests.adsc.serving.engine.cases import NEW, Prompt, Reference

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@dataclass
class Watched:
    """An engine, and what its scheduler did."""

    llm: Any
    requests: list[int] = field(default_factory=list)
    """Of each step."""
    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    """In use after each step was scheduled."""

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def runner(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner

    @property
    def in_use(self) -> int:
        """Blocks that requests or the prefix cache's hits hold now; block 0 is vLLM's own."""
        pool = self.scheduler.kv_cache_manager.block_pool
        return int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())

    def metric(self, name: str) -> float:
        found = [it.value for it in self.llm.get_metrics() if it.name == f"vllm:{name}"]
        return float(sum(found))

    def answers(
        self,
        reference: Reference,
        prompts: list[Prompt],
        new: int = NEW,
        plans: Sequence[str | None] = (None,),
    ) -> list[tuple[int, ...]]:
        """Greedy tokens; all prompts are sent at once, each with the next of `plans`."""
        from vllm import SamplingParams

        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=new,
                ignore_eos=True,
                detokenize=False,
                extra_args=None if plan is None else {"adsc_plan": plan},
            )
            for _, plan in zip(prompts, cycle(plans), strict=False)
        ]
        sent = [request(reference, prompt) for prompt in prompts]
        found = self.llm.generate(sent, sampling, use_tqdm=False)
        return [tuple(it.outputs[0].token_ids) for it in found]

    def watch(self) -> None:
        schedule = self.scheduler.schedule

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.requests.append(len(output.num_scheduled_tokens))
            self.tokens.append(output.total_num_scheduled_tokens)
            self.blocks.append(self.in_use)
            return output

        self.scheduler.schedule = watched


def request(reference: Reference, prompt: Prompt) -> dict[str, Any]:
    """A prompt as vLLM takes it."""
    found: dict[str, Any] = {"prompt_token_ids": reference.ids(prompt)}
    if prompt.pictures:
        images = [reference.picture(number) for number in prompt.pictures]
        found["multi_modal_data"] = {"image": images}
    return found


def configured(folder: Path, plan: dict[str, Any], **options: Any) -> Any:
    """A `VllmConfig` under a plan; nothing is loaded."""
    from vllm.engine.arg_utils import EngineArgs

    from adsc.serving import register

    register()
    settings = {"model": str(folder), "hf_overrides": {"adsc": plan}, "max_num_seqs": 16}
    return EngineArgs(**(settings | options)).create_engine_config()


@contextmanager
def engine(folder: Path, plan: Any = None, **options: Any) -> Iterator[Watched]:
    """A small engine for a checkpoint; `plan` as it would stand in config.json."""
    from vllm import LLM

    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 2048,
        "limit_mm_per_prompt": {"image": 4},
        "enable_prefix_caching": False,
        "async_scheduling": False,
        "disable_log_stats": False,
        "enforce_eager": True,
        "seed": 0,
        "block_size": 32,
    }
    if plan is not None:
        settings["hf_overrides"] = {"adsc": plan}
    llm = LLM(model=str(folder), **(settings | options))
    watched = Watched(llm)
    try:
        watched.watch()
        yield watched
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm, watched.llm
        gc.collect()
