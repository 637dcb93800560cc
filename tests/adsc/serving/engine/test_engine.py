"""vLLM with the plugin against transformers with `adsc.attach`: the same greedy tokens, whatever
the plan, the chunks and the company; and blocks for kept tokens alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from math import ceil
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from adsc import PruningPlan
from tests.adsc.serving.engine.cases import (
    BASE,
    PLANS,
    Prompt,
    Reference,
    Wanted,
    as_dict,
    tokens,
)
from tests.adsc.serving.engine.engines import engine, request
from tests.documents import ROOT

NAMED = {
    "16": "1:1/4",
    "tiles": "1:1/4;pool=tiles",
    "first": "1:1/8;anchor=first",
    "late": "4:1/2",
}
BLOCK = 32
IMAGE = 64


@pytest.mark.parametrize("plan", PLANS)
def test_two_dozen_requests_at_once(
    plan: str, checkpoint: Path, reference: Reference, prompts: list[Prompt], wanted: Wanted
) -> None:
    with engine(checkpoint, as_dict(plan)) as served:
        got = served.answers(reference, prompts)
        assert max(served.requests) >= 20
        assert served.in_use == 0
    assert got == tokens(wanted(plan))
    assert len(set(got)) == len(prompts)


@pytest.mark.parametrize("plan", ["2:1/4,4:1/4", "1:1/4,6:0;pool=tiles"])
def test_the_trained_base(plan: str, prompts: list[Prompt]) -> None:
    """Its tensors have the names that transformers 5.23 writes, which vLLM alone can't place."""
    trained = Reference(BASE)
    with engine(BASE, as_dict(plan)) as served:
        assert served.answers(trained, prompts) == tokens(trained.answers(plan, prompts))


def test_without_a_plan_it_is_vllm(
    checkpoint: Path, reference: Reference, prompts: list[Prompt], wanted: Wanted
) -> None:
    with engine(checkpoint) as served:
        assert type(served.scheduler).__module__.startswith("vllm.")
        assert served.answers(reference, prompts) == tokens(wanted(""))


def test_another_plan_answers_otherwise(
    checkpoint: Path, reference: Reference, prompts: list[Prompt], wanted: Wanted
) -> None:
    with engine(checkpoint, as_dict("1:1/8;anchor=first")) as served:
        got = served.answers(reference, prompts)
    same = [one == other for one, other in zip(got, tokens(wanted("1:1/4")), strict=True)]
    assert [it for it, prompt in zip(same, prompts, strict=True) if not prompt.pictures] == [
        True
    ] * 5
    assert sum(same) <= 7  # with pictures an answer agrees by chance at most


@pytest.mark.parametrize("plan", ["2:1/2,4:1/2,6:1/2", "2:1/4,6:0"])
def test_chunks_of_one_token(
    plan: str, checkpoint: Path, reference: Reference, prompts: list[Prompt], wanted: Wanted
) -> None:
    few = [number for number, answer in enumerate(wanted(plan)) if answer.wide < 170]
    with engine(checkpoint, as_dict(plan), long_prefill_token_threshold=1) as served:
        got = served.answers(reference, [prompts[number] for number in few])
        assert max(served.tokens) <= len(few)
    assert len(few) >= 10
    assert got == [wanted(plan)[number].tokens for number in few]


@pytest.mark.parametrize("plan", ["2:1/2,4:1/2,6:1/2", "2:1/9,6:0;pool=tiles"])
def test_short_steps(
    plan: str, checkpoint: Path, reference: Reference, prompts: list[Prompt], wanted: Wanted
) -> None:
    """Steps hold an image and 31 tokens, the least with which means can be served."""
    with engine(checkpoint, as_dict(plan), max_num_batched_tokens=IMAGE + 31) as served:
        got = served.answers(reference, prompts)
        assert max(served.tokens) <= IMAGE + 31
        assert len(served.tokens) > 40
    assert got == tokens(wanted(plan))


@pytest.mark.parametrize("plan", ["2:1/2,4:1/2,6:1/2", "1:1/4;pool=tiles"])
def test_preemption(
    plan: str, checkpoint: Path, reference: Reference, prompts: list[Prompt]
) -> None:
    """A pool in which requests that begin together cannot end together."""
    few = prompts[:4]  # 70 to 80 tokens, which become 140
    groups = {"2:1/2,4:1/2,6:1/2": 4, "1:1/4;pool=tiles": 8}[plan]
    with engine(checkpoint, as_dict(plan), num_gpu_blocks_override=33 * groups) as served:
        assert len(served.scheduler.kv_cache_config.kv_cache_groups) == groups
        got = served.answers(reference, few * 8, new=64)
        assert served.metric("num_preemptions") > 0
        assert served.in_use == 0
    assert got == tokens(reference.answers(plan, few, new=64)) * 8


def test_the_scheduler_of_async_engines(
    checkpoint: Path,
    reference: Reference,
    prompts: list[Prompt],
    wanted: Wanted,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM switches async scheduling off on a CPU, so its scheduler runs here without steps in
    flight."""
    from adsc.serving.engine import scheduler

    monkeypatch.setattr(scheduler, "make_scheduler", scheduler.AsyncPlanScheduler)
    plan = "2:1/4,4:1/4;pool=tiles"
    with engine(checkpoint, as_dict(plan)) as served:
        assert type(served.scheduler).__name__ == "AsyncPlanScheduler"
        assert served.answers(reference, prompts) == tokens(wanted(plan))


def test_two_workers_share_each_layer(
    checkpoint: Path, reference: Reference, prompts: list[Prompt], wanted: Wanted
) -> None:
    """Tensor parallelism; each worker works the steps out by itself."""
    plan = "2:1/9,6:0;pool=tiles"
    with engine(checkpoint, as_dict(plan), tensor_parallel_size=2) as served:
        assert served.answers(reference, prompts) == tokens(wanted(plan))


def test_the_second_model_runner(checkpoint: Path, wanted: Wanted) -> None:
    plans = ["2:1/2,4:1/2,6:1/2", "2:1/9,6:0;pool=tiles"]
    settings = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.adsc.serving.engine.run_v2", str(checkpoint), *plans],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | settings,
    )
    assert done.returncode == 0, done.stderr
    answers, steps = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    for plan, got in zip(plans, answers, strict=True):
        assert got == [list(it.tokens[:4]) for it in wanted(plan)[::3]]
    # A prompt's last token looks like decoding to vLLM, which would run it as a CUDA graph.
    assert [each for scheduled, each, _ in steps if scheduled == [1, 1]] == [None, 1, 1]
    assert [own for scheduled, _, own in steps if scheduled == [1, 1]] == [1, 1, 1]
    assert all(each is None for scheduled, each, _ in steps if scheduled != [1, 1])


@pytest.mark.parametrize("plan", ["0:1/2,4:1/4;anchor=first", "2:1/9,6:0;pool=tiles"])
def test_prefix_caching_ends_at_the_first_image(
    plan: str, checkpoint: Path, reference: Reference, prompts: list[Prompt], wanted: Wanted
) -> None:
    """The same prompts again find their text before the first image, and all of a text."""
    with engine(checkpoint, as_dict(plan), enable_prefix_caching=True) as served:
        first = served.answers(reference, prompts)
        before = served.metric("prefix_cache_hits")
        again = served.answers(reference, prompts)
        hits = served.metric("prefix_cache_hits") - before
        assert served.in_use == 0
    assert first == again == tokens(wanted(plan))
    heads = []
    for prompt, answer in zip(prompts, wanted(plan), strict=True):
        ids = reference.ids(prompt)
        text = ids.index(3) if prompt.pictures else answer.wide - 1
        heads.append(text // BLOCK * BLOCK)
    assert hits == sum(heads) > 0


@pytest.mark.parametrize("plan", ["1:1/4;pool=tiles", "4:0", "2:1/2,4:1/2,6:1/2"])
def test_blocks_hold_kept_tokens_alone(
    plan: str, checkpoint: Path, reference: Reference, prompts: list[Prompt]
) -> None:
    """One request after another, for the blocks that each holds at the end."""
    parsed = PruningPlan.parse(plan)
    left = [IMAGE, *parsed.tokens_after_drops(IMAGE)]
    with engine(checkpoint, as_dict(plan)) as served:
        groups = served.scheduler.kv_cache_config.kv_cache_groups
        parts = [group.kv_cache_spec.part for group in groups]
        for prompt in prompts[::4]:
            served.blocks.clear()
            served.answers(reference, [prompt], new=2)
            text = len(reference.ids(prompt)) - len(prompt.pictures) + 1
            kept = [text + left[part] * len(prompt.pictures) for part in parts]
            assert max(served.blocks) == sum(ceil(count / BLOCK) for count in kept)


def test_refused_requests_do_no_harm(
    checkpoint: Path, reference: Reference, prompts: list[Prompt], wanted: Wanted
) -> None:
    from vllm import SamplingParams

    plan = "0:1/2,4:1/4;anchor=first"
    with engine(checkpoint, as_dict(plan)) as served:
        scored = SamplingParams(max_tokens=1, prompt_logprobs=1)
        with pytest.raises(ValueError, match="prompt_logprobs"):
            served.llm.generate([request(reference, prompts[0])], scored, use_tqdm=False)
        text = served.llm.generate([request(reference, prompts[8])], scored, use_tqdm=False)
        assert text[0].prompt_logprobs
        with pytest.raises(ValueError, match="ends in an image"):
            served.answers(reference, [Prompt("what is <image>", (0,))])
        # The pictures of what was refused are sent again.
        assert served.answers(reference, prompts[:2]) == tokens(wanted(plan))[:2]
        assert served.in_use == 0


@pytest.fixture
def elastic(tmp_path: Path, checkpoint: Path) -> Path:
    """The checkpoint with several plans, of which it runs with the first."""
    folder = tmp_path / "elastic"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["adsc"] = as_dict(NAMED["16"])
    config["adsc_plans"] = {name: as_dict(plan) for name, plan in NAMED.items()}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_name_chooses_a_plan(
    elastic: Path, reference: Reference, prompts: list[Prompt], wanted: Wanted
) -> None:
    with engine(elastic, "tiles") as served:
        assert served.answers(reference, prompts) == tokens(wanted(NAMED["tiles"]))
    with pytest.raises(ValueError, match="did you mean tiles"), engine(elastic, "tile"):
        pass


def test_each_request_may_choose_its_plan(
    elastic: Path, reference: Reference, prompts: list[Prompt], wanted: Wanted
) -> None:
    """Requests under three plans and dense share steps and the cache of text before images."""
    names = [None, "tiles", "dense", "first"]
    by_name = [wanted(NAMED.get(name or "16", "")) for name in names]
    with engine(elastic, enable_prefix_caching=True) as served:
        for turn in range(len(names)):
            order = [(turn + number) % len(names) for number in range(len(prompts))]
            got = served.answers(reference, prompts, plans=[names[it] for it in order])
            assert got == [by_name[it][number].tokens for number, it in enumerate(order)]
        assert max(served.requests) >= 20
        assert served.in_use == 0
        for name in ("late", "tile"):
            with pytest.raises(ValueError, match="may choose dense, 16, first, tiles;"):
                served.answers(reference, prompts[:1], plans=[name])
        assert served.in_use == 0
