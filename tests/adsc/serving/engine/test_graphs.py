"""Compilation of each part, really; CUDA graphs for decoding, from recorded steps (`replays`): the
same greedy tokens as transformers, and no graph for a step that drops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.adsc.serving.engine.cases import Prompt, Reference, Wanted, as_dict, tokens
from tests.adsc.serving.engine.engines import configured, engine


@pytest.mark.parametrize("plan", ["2:1/2,4:1/2,6:1/2", "2:1/9,6:0;pool=tiles"])
def test_graphs_for_decoding(
    plan: str, checkpoint: Path, reference: Reference, prompts: list[Prompt], wanted: Wanted
) -> None:
    """Batches shrink and grow through all sizes, graphs and other steps in turns."""
    from adsc.serving.engine import attention
    from tests.adsc.serving.engine.replays import arm, watched

    with engine(checkpoint, as_dict(plan)) as served:
        runner = served.runner
        graphs = arm(runner)
        with watched(runner, lambda: attention.current) as steps:
            assert served.answers(reference, prompts) == tokens(wanted(plan))
            for few in (prompts[:3], prompts[5:20], prompts[3:4]):
                start = prompts.index(few[0])
                got = served.answers(reference, few)
                assert got == tokens(wanted(plan))[start : start + len(few)]
        assert served.in_use == 0
    decoding = [it for it in steps if set(it.scheduled) == {1}]
    assert all(it.graph for it in decoding if not it.drops)
    assert not any(it.graph for it in steps if it not in decoding)
    assert graphs.replays == sum(it.graph for it in steps) > 30
    assert {len(it.scheduled) for it in decoding} >= {1, 3, 15, 24}


def test_one_token_of_an_image_is_no_decoding(
    checkpoint: Path, reference: Reference, prompts: list[Prompt], wanted: Wanted
) -> None:
    """Chunks of one token: each step looks like decoding to vLLM, and most drop."""
    from adsc.serving.engine import attention
    from tests.adsc.serving.engine.replays import arm, watched

    plan = "2:1/4,6:0"
    few = [number for number, answer in enumerate(wanted(plan)) if answer.wide < 120]
    with engine(checkpoint, as_dict(plan), long_prefill_token_threshold=1) as served:
        runner = served.runner
        arm(runner)
        with watched(runner, lambda: attention.current) as steps:
            got = served.answers(reference, [prompts[number] for number in few])
    assert got == [wanted(plan)[number].tokens for number in few]
    uniform = [it for it in steps if set(it.scheduled) == {1}]
    assert all(it.graph != it.drops for it in uniform)
    assert not any(it.graph for it in steps if it not in uniform)
    assert sum(it.drops for it in uniform) > 50 and sum(it.graph for it in uniform) > 10


def test_each_part_is_compiled(
    checkpoint: Path,
    reference: Reference,
    prompts: list[Prompt],
    wanted: Wanted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By inductor, once a part, whatever the number of tokens; parts of different lengths."""
    from torch._dynamo.utils import counters
    from vllm.compilation.counter import compilation_counter

    monkeypatch.setenv("VLLM_CPU_CI_ENV", "0")  # else vLLM traces without compiling
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    plan, before = "2:1/9,6:0;pool=tiles", compilation_counter.num_aot_compiles
    options: dict[str, Any] = {"enforce_eager": False, "compilation_config": {"mode": 3}}
    with engine(checkpoint, as_dict(plan), **options) as served:
        assert compilation_counter.num_aot_compiles == before + 3
        traced = counters["stats"]["unique_graphs"]
        assert served.answers(reference, prompts) == tokens(wanted(plan))
        for number in (0, 11, 13):
            got = served.answers(reference, prompts[number : number + 1])
            assert got == [wanted(plan)[number].tokens]
        assert counters["stats"]["unique_graphs"] == traced
        assert compilation_counter.num_aot_compiles == before + 3


GRAPHS = {"cudagraph_mode": "FULL_AND_PIECEWISE"}


@pytest.mark.parametrize(
    ("options", "how", "mode", "graphs"),
    [
        ({}, "eagerly", "NONE", "NONE"),
        ({"compilation_config": {"mode": 3}}, "compiled", "VLLM_COMPILE", "NONE"),
        ({"compilation_config": {"mode": 2}}, "compiled", "DYNAMO_TRACE_ONCE", "NONE"),
        ({"compilation_config": {"mode": 1}}, "eagerly", "NONE", "NONE"),
        (
            {"compilation_config": GRAPHS},
            "with CUDA graphs for decoding",
            "NONE",
            "FULL_DECODE_ONLY",
        ),
        (
            {"compilation_config": GRAPHS | {"mode": 3}},
            "compiled and with CUDA graphs for decoding",
            "VLLM_COMPILE",
            "FULL_DECODE_ONLY",
        ),
        ({"compilation_config": {"cudagraph_mode": "PIECEWISE"}}, "eagerly", "NONE", "NONE"),
        (
            {"compilation_config": GRAPHS | {"mode": 3}, "enforce_eager": True},
            "eagerly",
            "NONE",
            "NONE",
        ),
        ({"compilation_config": GRAPHS, "data_parallel_size": 2}, "eagerly", "NONE", "NONE"),
    ],
)
def test_what_is_asked_of_vllm(
    options: dict[str, Any],
    how: str,
    mode: str,
    graphs: str,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM's own options switch both on; on a platform that has CUDA graphs."""
    from vllm.platforms import current_platform

    from adsc.serving.engine import limits

    settle, found = limits.graphs.settle, []

    def noted(config: Any) -> str:
        with monkeypatch.context() as platform:
            platform.setattr(type(current_platform), "support_static_graph_mode", lambda _: True)
            said = settle(config)
        chosen = config.compilation_config
        found.append((said, chosen.mode.name, chosen.cudagraph_mode.name, chosen.splitting_ops))
        return said

    monkeypatch.setattr(limits.graphs, "settle", noted)
    config = configured(checkpoint, as_dict("2:1/2"), **options)
    assert found == [(how, mode, graphs, [])]
    assert config.model_config.enforce_eager == (how == "eagerly")


def test_a_platform_without_graphs(checkpoint: Path) -> None:
    config = configured(checkpoint, as_dict("2:1/2"), compilation_config=GRAPHS)
    assert config.model_config.enforce_eager


def test_what_vllm_may_not_settle_on(checkpoint: Path) -> None:
    from vllm.config import CUDAGraphMode

    from adsc.serving.engine.graphs import check_settled

    config = configured(checkpoint, as_dict("2:1/2"))
    check_settled(config)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    with pytest.raises(RuntimeError, match="use --enforce-eager"):
        check_settled(config)
