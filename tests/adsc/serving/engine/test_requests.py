"""What clients may ask of one engine with a plan: several answers, stop strings, a grammar, other
pictures behind the same text, and requests that are taken back while they are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

import adsc
from adsc import PruningPlan
from tests.adsc.serving.engine.cases import Prompt, Reference, picture
from tests.adsc.serving.engine.engines import Watched, engine, request

PLAN = "1:1/4,6:0"
LONG = "USER: " + "what colour is the big round shape in the top left corner " * 4
HEADED = [Prompt(f"{LONG}<image>\nwhat is it ASSISTANT:", (number,)) for number in range(6)]


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[Watched]:
    plan = PruningPlan.parse(PLAN).to_dict()
    options = {"max_num_batched_tokens": 96, "enable_prefix_caching": True}
    with engine(checkpoint, plan, **options) as found:
        yield found


def logprobs(reference: Reference, prompt: Prompt, answer: tuple[int, ...]) -> torch.Tensor:
    """What transformers gives each token of an answer."""
    model = reference.model
    adsc.attach(model, PLAN)
    mark, n = model.config.image_token_id, model.config.image_seq_length
    ids = [token for it in reference.ids(prompt) for token in [it] * (n if it == mark else 1)]
    images = [picture(number) for number in prompt.pictures]
    pixels = reference.processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        inputs = torch.tensor([ids + list(answer)])
        logits = model(input_ids=inputs, pixel_values=pixels).logits[0, -len(answer) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def test_several_sampled_answers(
    served: Watched, reference: Reference, prompts: list[Prompt]
) -> None:
    """Whatever was drawn, its probability is that of transformers; worst seen 2e-5."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        n=4, temperature=0.9, max_tokens=5, ignore_eos=True, logprobs=0, detokenize=False
    )
    few = [prompts[0], prompts[13], HEADED[0]]
    found = served.llm.generate([request(reference, it) for it in few], sampling, use_tqdm=False)
    for prompt, one in zip(few, found, strict=True):
        answers = [tuple(it.token_ids) for it in one.outputs]
        assert len(set(answers)) > 1
        for answer, output in zip(answers, one.outputs, strict=True):
            got = [step[token].logprob for step, token in zip(output.logprobs, answer, strict=True)]
            wanted = logprobs(reference, prompt, answer)
            assert got == pytest.approx(wanted.tolist(), abs=1e-3)
    assert served.in_use == 0


def test_a_stop_string_and_a_grammar(
    served: Watched, reference: Reference, prompts: list[Prompt]
) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    (whole,) = reference.answers(PLAN, prompts[:1])
    pieces = [reference.tokenizer.decode(whole.tokens[: n + 1]) for n in range(len(whole.tokens))]
    stop = pieces[6][len(pieces[5]) :]
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    stopping = SamplingParams(**options, stop=[stop], skip_special_tokens=False)
    chosen = SamplingParams(
        temperature=0,
        max_tokens=12,
        structured_outputs=StructuredOutputsParams(choice=["is", "the"]),
    )
    sent = [request(reference, prompts[0])] * 2
    first, second = served.llm.generate(sent, [stopping, chosen], use_tqdm=False)
    assert first.outputs[0].finish_reason == "stop"
    assert first.outputs[0].stop_reason == stop
    assert pieces[-1].startswith(first.outputs[0].text) and stop not in first.outputs[0].text
    assert second.outputs[0].text in ("is", "the")


def test_the_same_text_before_other_pictures(served: Watched, reference: Reference) -> None:
    """The text is shared, the pictures behind it are not."""
    wanted = [it.tokens for it in reference.answers(PLAN, HEADED)]
    assert len(set(wanted)) == len(HEADED)
    served.answers(reference, HEADED[:1])
    before = served.metric("prefix_cache_hits")
    for order in (HEADED, HEADED[::-1]):
        got = served.answers(reference, order)
        assert got == (wanted if order is HEADED else wanted[::-1])
    text = reference.ids(HEADED[0]).index(reference.model.config.image_token_id)
    assert served.metric("prefix_cache_hits") - before == 12 * (text // 32 * 32) > 0
    assert served.in_use == 0


def test_requests_that_are_taken_back(
    served: Watched, reference: Reference, prompts: list[Prompt]
) -> None:
    """After each number of steps, so in the midst of an image, of text and of the answer."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
    llm, long = served.llm.llm_engine, prompts[20]
    for steps in range(8):
        names = [f"{steps}-{number}" for number in range(3)]
        for name, prompt in zip(names, (long, HEADED[1], long), strict=True):
            llm.add_request(name, request(reference, prompt), sampling)
        for _ in range(steps):
            llm.step()
        running = len(served.scheduler.running)
        llm.abort_request(names, internal=False)
        while llm.has_unfinished_requests():
            llm.step()
        assert not served.scheduler.kept and served.in_use == 0
        assert running > 0 or steps == 0
    assert served.answers(reference, prompts) == [
        it.tokens for it in reference.answers(PLAN, prompts)
    ]


def test_a_prompt_that_is_too_long_is_refused(served: Watched, reference: Reference) -> None:
    """Dropped tokens have positions, so they count."""
    from vllm.exceptions import VLLMValidationError

    longest = Prompt("USER: <image> " + "what " * 1000 + " ASSISTANT:", (30,))
    with pytest.raises(VLLMValidationError, match="1024"):
        served.answers(reference, [longest])
    assert served.in_use == 0
