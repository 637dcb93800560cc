"""A vLLM engine for another process, whose environment has no vLLM: JSON lines in, JSON lines out.

    python -m adsc.serving.offline CHECKPOINT PLAN DTYPE

It says `ready` once the checkpoint is loaded. Then each line in is a batch of prompts with the most
tokens of an answer, each line out their greedy answers in the same order, or the error. It ends
with its input. `pipeline.evaluation.engine` is the other end.
"""

from __future__ import annotations

import base64
import json
import math
import os
import sys
from typing import Any

from adsc.serving.settings import FIELD

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: it ends when its input does
    "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB; without it vLLM asks for most of the memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def main(words: list[str]) -> None:
    place, plan, dtype = words
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # vLLM prints to stdout, too
        from vllm import LLM

        llm = LLM(model=place, dtype=dtype, hf_overrides={FIELD: plan}, seed=0)
        print("ready", file=out, flush=True)
        for line in sys.stdin:
            try:
                found: dict[str, Any] = {"answers": answers(llm, **json.loads(line))}
            # Whatever a request raises is the caller's to count.
            except Exception as error:  # noqa: BLE001
                found = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(found), file=out, flush=True)


def answers(llm: Any, prompts: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Greedy answers.

    Args:
        prompts: `ids`, with one token for each image, and `images`: width, height and RGB bytes
            in base64 of each.
        most: tokens of an answer.
    """
    from vllm import SamplingParams

    # The sampled token's log-probability tells whether logits are numbers.
    sampling = SamplingParams(temperature=0, max_tokens=most, logprobs=0, detokenize=False)
    found = llm.generate([_request(**it) for it in prompts], sampling, use_tqdm=False)
    for number, one in enumerate(found):
        steps = (chance for step in one.outputs[0].logprobs for chance in step.values())
        if any(math.isnan(it.logprob) for it in steps):
            raise ArithmeticError(f"the logits of prompt {number} are NaN")
    return [
        {
            "tokens": list(one.outputs[0].token_ids),
            "finished": one.outputs[0].finish_reason == "stop",
            "prompt": len(one.prompt_token_ids),
        }
        for one in found
    ]


def _request(ids: list[int], images: list[tuple[int, int, str]]) -> dict[str, Any]:
    from PIL import Image

    request: dict[str, Any] = {"prompt_token_ids": ids}
    if images:
        request["multi_modal_data"] = {
            "image": [
                Image.frombytes("RGB", (width, height), base64.b64decode(data))
                for width, height, data in images
            ]
        }
    return request


if __name__ == "__main__":
    main(sys.argv[1:])
