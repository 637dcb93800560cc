r"""vLLM's second model runner on a CPU, its Triton kernels in Triton's interpreter.

    TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1 \
        python -m tests.adsc.serving.engine.run_v2 CHECKPOINT PLAN...

Prints the tokens of every third prompt under each plan, as one line of JSON, then another with how
steps look to the dispatch of CUDA graphs (`uniform`). A process of its own, since Triton reads its
settings when it is imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from adsc import PruningPlan
from tests.adsc.serving.engine.cases import Prompt, Reference, all_prompts
from tests.adsc.serving.engine.engines import engine


class Driver:
    @staticmethod
    def is_active() -> bool:
        return True


class Backend:
    """Only so that vLLM takes Triton as usable."""

    driver = Driver
    compiler = None


def main(folder: str, *plans: str) -> None:
    from triton.backends import backends  # no part of the environment in which tests are collected

    backends["cpu"] = Backend
    reference, found = Reference(Path(folder)), []
    for plan in plans:
        with engine(Path(folder), PruningPlan.parse(plan).to_dict()) as served:
            runner = served.runner
            assert type(runner).__module__ == "vllm.v1.worker.cpu.model_runner", type(runner)
            found.append(served.answers(reference, all_prompts()[::3], new=4))
    steps = uniform(reference, plans[0])
    sys.stdout.write(f"{json.dumps(found)}\n{json.dumps(steps)}\n")


def uniform(reference: Reference, plan: str) -> list[tuple[list[int], int | None, int | None]]:
    """Of each step of two requests, whose prompts end in a chunk of one token: tokens of each, and
    how many all of them compute, by the wrapped method and by vLLM's own. Graphs are found by it.
    """
    found = []
    prompts = [Prompt("what <image> is", (2,))] * 2
    wide = len(reference.ids(prompts[0])) + 63
    options = {"long_prefill_token_threshold": wide - 1}
    with engine(reference.folder, PruningPlan.parse(plan).to_dict(), **options) as served:
        runner = served.runner
        gather = runner.gather_batch_req_state

        def noted(output: Any, dummy: bool) -> Any:
            batch, each = gather(output, dummy)
            if batch is not None:
                own = type(runner).gather_batch_req_state.__wrapped__(runner, output, dummy)[1]
                found.append((batch.num_scheduled_tokens.tolist(), each, own))
            return batch, each

        runner.gather_batch_req_state = noted
        served.answers(reference, prompts, new=3)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
