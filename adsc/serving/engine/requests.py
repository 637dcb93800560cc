"""What a request brings, in vLLM's terms, and what of it is refused before the engine sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.exceptions import VLLMClientError

from adsc.serving.kept import Kept, Span
from adsc.serving.settings import ServedPlan

PLAN = "adsc_plan"
"""Where a request names a plan: `"vllm_xargs": {"adsc_plan": "64"}` of the OpenAI API."""


class UnservedRequest(VLLMClientError, ValueError):
    """A request that can't be answered under a pruning plan; an HTTP client gets a 400. vLLM hides
    the message of errors that are not of its own kind."""


def spans_of(features: Sequence[Any] | None) -> list[Span]:
    """Where the images of a request are, from its `MultiModalFeatureSpec`s."""
    return [
        (int(first), int(last) - int(first) + 1)
        for feature in features or ()
        for first, last in feature.mm_position.extract_embeds_range()
    ]


def plan_for(served: ServedPlan, params: Any) -> ServedPlan:
    """The plan that a request's `SamplingParams` name, or the engine's.

    Raises:
        UnservedRequest: no such plan, or one that drops at other layers.
    """
    name = ((params and params.extra_args) or {}).get(PLAN)
    if name is None:
        return served
    if (found := served.choices.get(str(name))) is None:
        raise UnservedRequest(
            f"{PLAN} {name!r}: a request to this server may choose {', '.join(served.choices)}; "
            f"other plans drop at layers where {served.text!r} doesn't, and need a server started "
            "with --plan"
        )
    return found


def kept_of(served: ServedPlan, request: Any) -> Kept | None:
    """The prefix sums of a request, in whichever of vLLM's forms; None without images."""
    spans = spans_of(request.mm_features)
    return Kept(plan_for(served, request.sampling_params), spans) if spans else None


def check_request(served: ServedPlan, request: Any) -> None:
    """Raise UnservedRequest for an `EngineCoreRequest` that the plan can't serve."""
    served = plan_for(served, request.sampling_params)
    spans = spans_of(request.mm_features)
    if request.resumable:
        raise UnservedRequest(
            "streaming input is not served with a pruning plan: send the prompt at once"
        )
    if not spans:
        return
    for _, length in spans:
        if length != served.image.tokens:
            raise UnservedRequest(
                f"an image of {length} tokens: plan {served.text!r} was made for "
                f"{served.image.tokens}; send pictures, or embeddings of so many tokens"
            )
    start, length = spans[-1]
    if start + length >= len(request.prompt_token_ids or ()) and not served.keeps_last:
        raise UnservedRequest(
            "the prompt ends in an image whose last token is dropped: put text behind it"
        )
    params = request.sampling_params
    if params is not None and params.prompt_logprobs is not None:
        raise UnservedRequest(
            "prompt_logprobs over images are not served with a pruning plan: dropped tokens have "
            "none; leave prompt_logprobs out"
        )
