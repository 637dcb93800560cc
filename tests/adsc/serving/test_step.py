"""The arithmetic of serving, without an engine: which tokens of a step reach which part, and where
they lie; and what is refused of a checkpoint's config."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    PixtralVisionConfig,
)

from adsc import PruningPlan
from adsc.families.family import Image
from adsc.serving import UnservedVersion, check_version
from adsc.serving.kept import Kept, Placed
from adsc.serving.settings import ServedPlan, served_plan
from adsc.serving.step import make_step
from tests.adsc import tiny
from tests.adsc.serving.configs import config_of, next_of, pictures_of

DEVICE = torch.device("cpu")
PLANS = (
    "1:1/2,3:1/2",
    "0:1/3;anchor=first",
    "2:1/4,4:0",
    "1:1/4,3:1/2;pool=tiles",
    "3:1/5;pool=runs",
)


NAMED = {"mean": "1:1/4,3:1/2;pool=tiles", "one": "3:1/8;anchor=first", "other": "2:1/2"}


def served(plan: str) -> ServedPlan:
    """Of an elastic checkpoint."""
    plans = {name: PruningPlan.parse(text).to_dict() for name, text in NAMED.items()}
    found = served_plan(config_of(plan, adsc_plans=plans))
    assert found is not None
    return found


def counts(plan: ServedPlan) -> list[int]:
    """Tokens of an image that are gone in each part."""
    return [int(row.sum()) for row in plan.layout(plan.image).gone]


def test_a_config_says_what_is_served() -> None:
    found = served("1:1/2,3:1/2")
    assert found.image == Image(tiny.TOKENS, (4, 4))
    assert found.part_of == (0, 1, 1, 2, 2, 2)
    assert counts(found) == [0, 8, 12]
    assert list(found.choices) == ["dense", "mean", "one"]  # the other drops elsewhere
    assert found.choices["one"].part_of == found.part_of
    assert counts(found.choices["one"]) == [0, 0, 14]
    assert counts(found.choices["dense"]) == [0, 0, 0]
    assert served_plan(config_of(None)) is None
    assert served_plan(config_of({"stages": []})) is None
    assert served_plan(config_of("1:1/2", adsc="dense")) is None


class Simulated:
    """A request that an engine computes in chunks: states go down the parts as the plan has them,
    and each part's cache is written where the step says."""

    def __init__(self, plan: ServedPlan, length: int, images: list[Placed]):
        self.plan, self.length, self.computed = plan, length, 0
        self.kept = Kept(plan, images) if images else None
        self.caches: list[dict[int, float]] = [{} for _ in range(plan.parts)]

    def expected(self) -> list[list[float]]:
        """What each part's cache holds in the end: token t has state t + 1, a mean its members'."""
        plan = self.plan
        states = {token: float(token + 1) for token in range(self.length)}
        found = [list(states.values())]
        for number in range(1, plan.parts):
            gone: set[int] = set()
            means: dict[int, float] = {}
            for start, _, layout in self.kept.images if self.kept else ():
                gone |= {start + int(token) for token in np.flatnonzero(layout.gone[number])}
                for group in layout.groups[number]:
                    members = [states[start + member] for member in group.members]
                    means[start + group.anchor] = sum(members) / len(members)
            states = {t: means.get(t, v) for t, v in states.items() if t not in gone}
            found.append([states[token] for token in sorted(states)])
        return found


@pytest.mark.parametrize("by_size", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_chunks_fill_each_parts_cache_in_order(plan: str, by_size: bool) -> None:
    """Requests of one step may have chosen different plans, and have images of several sizes."""
    draw = random.Random(plan)
    settings = served_plan(next_of(plan)) if by_size else served(plan)
    assert settings is not None
    choices = [settings, *settings.choices.values()]
    pictures = pictures_of(settings)
    for _ in range(20):
        running = []
        for _ in range(draw.randint(1, 4)):
            images: list[Placed] = []
            at = draw.randint(0, 5)
            for _ in range(draw.randint(0, 3)):
                images.append((at, draw.choice(pictures)))
                at += images[-1][1].tokens + draw.choice([0, 0, 3, 9])
            chosen = draw.choice(choices)
            running.append(Simulated(chosen, at + draw.randint(1, 6), images))
        while waiting := [one for one in running if one.computed < one.length]:
            chunks = [draw.randint(1, 30) for _ in waiting]
            _advance(waiting, chunks)
        for one in running:
            assert all(sorted(cache) == list(range(len(cache))) for cache in one.caches)
            for cache, expected in zip(one.caches, one.expected(), strict=True):
                assert [cache[place] for place in sorted(cache)] == pytest.approx(expected)


def _advance(waiting: list[Simulated], chunks: list[int]) -> None:
    """One step of all that wait."""
    sizes = []
    for one, chunk in zip(waiting, chunks, strict=True):
        size = min(chunk, one.length - one.computed)
        if one.kept and one.plan.pools:  # a step that is too short for an image takes all of it
            size = one.kept.last_whole(one.computed, size) or one.length - one.computed
        sizes.append(size)
    computed = np.array([one.computed for one in waiting])
    tokens = [c + i for c, size in zip(computed, sizes, strict=True) for i in range(size)]
    states = torch.tensor(tokens, dtype=torch.float64).unsqueeze(1) + 1
    step = make_step(computed, np.array(sizes), [one.kept for one in waiting], DEVICE)
    if step is None:
        for one, size in zip(waiting, sizes, strict=True):
            for cache in one.caches:
                cache.update({one.computed + i: one.computed + i + 1.0 for i in range(size)})
    for number, part in enumerate(step.parts if step else ()):
        states = part.enter(states) if number else states
        assert len(states) == part.count == len(part.owner)
        for owner, place, (state,) in zip(
            part.owner.tolist(), part.place.tolist(), states.tolist(), strict=True
        ):
            assert place not in waiting[owner].caches[number]
            waiting[owner].caches[number][place] = state
        for one, dropped, done in zip(waiting, part.dropped, computed + sizes, strict=True):
            assert len(one.caches[number]) == done - dropped
    if step:
        assert step.drops or all(part.count == step.total for part in step.parts)
        out = step.leave(states)
        assert len(out) == len(tokens)
        ends = np.cumsum(sizes) - 1
        for one, end in zip(waiting, ends, strict=True):
            if one.computed + sizes[waiting.index(one)] == one.length:
                assert out[end] == one.length  # a prompt's last token is text, and kept
    for one, size in zip(waiting, sizes, strict=True):
        one.computed += size


def test_prefix_sums_count_what_is_left() -> None:
    plan = served("1:1/4")
    kept = Kept(plan, [(2, plan.image), (20, plan.image)])
    assert kept.first == 2
    assert [kept.left(0, n) for n in (0, 18, 40)] == [0, 18, 40]
    assert [kept.left(1, n) for n in (0, 2, 5, 6, 18, 20, 36, 40)] == [0, 2, 2, 3, 6, 8, 12, 16]


def test_no_image_has_more_tokens_than_steps_must_hold() -> None:
    plan = served_plan(next_of("1:1/4;pool=tiles"))
    assert plan is not None
    assert plan.most == max(image.tokens for image in pictures_of(plan)) == 16 + 8 * 9
    assert plan.image.tokens == plan.most
    assert not plan.too_few(17) and plan.too_few(8)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (config_of("1:1/2", model_type="qwen2_5_vl"), r"Qwen2\.5-VL with a pruning plan is not"),
        (config_of("1:1/2;positions=reindex"), "positions=keep"),
        (config_of({"method": "fastv", "stages": [[2, "1/2"]]}), "by fastv"),
        (config_of("1:1/2", text_config=MistralConfig(sliding_window=None)), "mistral decoder"),
        (config_of("1:1/2", text_config=LlamaConfig(sliding_window=64)), "window of 64"),
        (
            LlavaConfig(vision_config=PixtralVisionConfig(), adsc={"stages": [[1, "1/2"]]}),
            "pixtral",
        ),
        (next_of("1:1/2;anchor=grid"), "grid"),
        (next_of("1:1/2", vision_aspect_ratio="anyres_max_4"), "anyres_max_9"),
        (config_of("1:1/2", adsc="64"), "no named plans"),
        (config_of("7:1/2"), "layers 0..5"),
    ],
)
def test_what_is_not_served_is_refused_by_name(config: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        served_plan(config)


def test_a_named_plan() -> None:
    plans = {"8": PruningPlan.parse("1:1/2").to_dict(), "4": PruningPlan.parse("1:1/4").to_dict()}
    found = served_plan(config_of(None, adsc="4", adsc_plans=plans))
    assert found is not None
    assert found.text == "1:1/4"


def test_other_versions_of_vllm_are_refused() -> None:
    check_version("0.32.7")
    for other in ("0.33.0", "0.3.2", "1.32.0", None):
        with pytest.raises(UnservedVersion, match=r"written for vLLM 0\.32"):
            check_version(other)
