"""What a request brings, in vLLM's terms, and what of it is refused before the engine sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.exceptions import VLLMClientError

from adsc.serving.kept import Kept, Span
from adsc.serving.settings import ServedPlan


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


def kept_of(served: ServedPlan, features: Sequence[Any] | None) -> Kept | None:
    """The request's prefix sums; None without images."""
    spans = spans_of(features)
    return Kept(served, spans) if spans else None


def check_request(served: ServedPlan, request: Any) -> None:
    """Raise UnservedRequest for an `EngineCoreRequest` that the plan can't serve."""
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
