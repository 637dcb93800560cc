"""LLaVA-NeXT and LLaVA-OneVision: images of several sizes in one batch, each under a plan by its
own overview, crops and row ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.adsc.serving.engine.anyres import FAMILIES, anyres_checkpoint, sized_picture
from tests.adsc.serving.engine.cases import Answer, Prompt, Reference, as_dict, tokens
from tests.adsc.serving.engine.engines import engine

PLANS = (
    "",
    "2:1/2,4:1/2,6:1/2",
    "1:1/4;anchor=first",
    "0:1/2,4:1/4;anchor=center",
    "2:1/4;pool=tiles",
    "2:1/3,6:0;pool=tiles",
    "0:1/2,4:1/2;pool=runs",
    "4:0",
)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return anyres_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sized(folder: Path) -> Reference:
    return Reference(folder, sized_picture)


@pytest.fixture(scope="module")
def answers(sized: Reference, prompts: list[Prompt]) -> Callable[[str], list[Answer]]:
    known: dict[str, list[Answer]] = {}

    def found(plan: str) -> list[Answer]:
        if plan not in known:
            known[plan] = sized.answers(plan, prompts)
        return known[plan]

    return found


@pytest.mark.parametrize("plan", PLANS)
def test_two_dozen_requests_at_once(
    plan: str,
    folder: Path,
    sized: Reference,
    prompts: list[Prompt],
    answers: Callable[[str], list[Answer]],
) -> None:
    with engine(folder, as_dict(plan), max_model_len=2048) as served:
        got = served.answers(sized, prompts)
        assert max(served.requests) >= 20
        assert served.in_use == 0
    assert got == tokens(answers(plan))
    assert len(set(got)) > 20
    lengths = {
        it.wide - len(sized.ids(own)) for it, own in zip(answers(plan), prompts, strict=True)
    }
    assert len(lengths) > 8


@pytest.mark.parametrize("plan", ["2:1/4,6:0", "0:1/2,4:1/4;anchor=first"])
def test_chunks_of_one_token(
    plan: str,
    folder: Path,
    sized: Reference,
    prompts: list[Prompt],
    answers: Callable[[str], list[Answer]],
) -> None:
    few = [number for number, answer in enumerate(answers(plan)) if answer.wide < 160]
    assert len(few) >= 10
    with engine(folder, as_dict(plan), long_prefill_token_threshold=1) as served:
        got = served.answers(sized, [prompts[number] for number in few])
        assert max(served.tokens) <= len(few)
    assert got == [answers(plan)[number].tokens for number in few]


@pytest.mark.parametrize("plan", ["2:1/2,4:1/2,6:1/2", "2:1/3,6:0;pool=tiles"])
def test_preemption_in_short_steps(
    plan: str,
    folder: Path,
    sized: Reference,
    prompts: list[Prompt],
    answers: Callable[[str], list[Answer]],
) -> None:
    """Steps hold the largest image and the others, and the pool not all requests that began."""
    groups = 4
    options = {"max_num_seqs": 16, "num_gpu_blocks_override": 34 * groups}
    with engine(folder, as_dict(plan), max_num_batched_tokens=224, **options) as served:
        assert len(served.scheduler.kv_cache_config.kv_cache_groups) == groups
        got = served.answers(sized, prompts * 2, new=12)
        assert max(served.tokens) <= 224
        assert served.metric("num_preemptions") > 0
        assert served.in_use == 0
    assert got == tokens(answers(plan)) * 2


def test_the_second_time_pictures_come_from_the_cache(
    folder: Path, sized: Reference, prompts: list[Prompt], answers: Callable[[str], list[Answer]]
) -> None:
    """The front end doesn't send a picture that the engine has; its size is known all the same."""
    plan = "2:1/4;pool=tiles"
    with engine(folder, as_dict(plan), enable_prefix_caching=True) as served:
        for _ in range(2):
            assert served.answers(sized, prompts) == tokens(answers(plan))
        assert served.in_use == 0


def test_what_sizes_do_not_allow_is_refused(
    folder: Path, sized: Reference, prompts: list[Prompt]
) -> None:
    with engine(folder, as_dict("2:1/30;pool=tiles")) as served:
        with pytest.raises(ValueError, match="too small for plan"):
            served.answers(sized, [Prompt("USER: <image> what ASSISTANT:", (4,))])
        with pytest.raises(ValueError, match="ends in an image"):
            served.answers(sized, [Prompt("what is <image>", (3,))])
        assert served.answers(sized, [Prompt("USER: <image> what ASSISTANT:", (3,))])
        assert served.in_use == 0


@pytest.mark.parametrize("option", ["enable_mm_embeds", "mm_processor_cache_type"])
def test_pictures_whose_size_is_not_seen(folder: Path, option: str) -> None:
    options: dict[str, Any] = {"enable_mm_embeds": True, "mm_processor_cache_type": "shm"}
    with (
        pytest.raises(ValueError, match="pruning plan on this family"),
        engine(folder, as_dict("2:1/2"), **{option: options[option]}),
    ):
        pass


def test_a_llava_of_their_parts(tmp_path: Path, prompts: list[Prompt]) -> None:
    """LLaVA-1.5 with a SigLIP tower and a Qwen2."""
    plan, folder = "2:1/3,6:0;pool=tiles", anyres_checkpoint("llava", tmp_path)
    reference = Reference(folder, sized_picture)
    with engine(folder, as_dict(plan)) as served:
        got = served.answers(reference, prompts)
    assert got == tokens(reference.answers(plan, prompts))
    assert len(set(got)) > 20
