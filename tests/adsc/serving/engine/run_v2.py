r"""vLLM's second model runner on a CPU, its Triton kernels in Triton's interpreter.

    TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1 \
        python -m tests.adsc.serving.engine.run_v2 CHECKPOINT PLAN...

Prints the tokens of every third prompt under each plan, as one line of JSON. A process of its own,
since Triton reads its settings when it is imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from adsc import PruningPlan
from tests.adsc.serving.engine.cases import Reference, all_prompts
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
            runner = served.llm.llm_engine.model_executor.driver_worker.worker.model_runner
            assert type(runner).__module__ == "vllm.v1.worker.cpu.model_runner", type(runner)
            found.append(served.answers(reference, all_prompts()[::3], new=4))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
