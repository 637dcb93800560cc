"""What a request brings, in vLLM's terms, and what of it is refused before the engine sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.exceptions import VLLMClientError

from adsc.families.family import Image
from adsc.serving.kept import Kept, Placed
from adsc.serving.settings import PIECES, ServedPlan

PLAN = "adsc_plan"
"""Where a request names a plan: `"vllm_xargs": {"adsc_plan": "64"}` of the OpenAI API."""

Span = tuple[int, int]
"""Start and length of an image in its request's prompt."""


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


def images_of(served: ServedPlan, features: Sequence[Any]) -> list[Placed]:
    """The images of a request that `check_request` has let through."""
    if served.by_size is None:
        return [(start, served.image) for start, _ in spans_of(features)]
    return [(it.mm_position.offset, image_of(served, it)) for it in features]


def image_of(served: ServedPlan, feature: Any) -> Image:
    """What a feature brings, of a family whose images are as large as their pictures ask for."""
    inputs = {
        name: it.data.unsqueeze(0) for name, it in feature.data.items() if it.data is not None
    }
    return served.image_of(inputs)


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
    if not request.mm_features:
        return None
    own = plan_for(served, request.sampling_params)
    return Kept(own, images_of(own, request.mm_features))


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
    check_images(served, request.mm_features, spans)
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


def check_images(served: ServedPlan, features: Sequence[Any], spans: Sequence[Span]) -> None:
    """Raise UnservedRequest for images that the plan was not made for. Data are missing of pictures
    that the engine has from before; those have been checked."""
    for feature in features:
        if feature.modality != "image":
            raise UnservedRequest(
                f"{feature.modality} is not served with a pruning plan, only pictures are"
            )
    if served.by_size is None:
        for _, length in spans:
            if length != served.image.tokens:
                raise UnservedRequest(
                    f"an image of {length} tokens: plan {served.text!r} was made for "
                    f"{served.image.tokens}; send pictures, or embeddings of so many tokens"
                )
        return
    for feature, (_, length) in zip(features, spans, strict=True):
        if feature.data is not None and image_of(served, feature).tokens != length:
            raise UnservedRequest(
                f"a picture of {length} tokens, where the plan counts "
                f"{image_of(served, feature).tokens}: serve it through transformers"
            )
        if served.too_few(length):
            raise UnservedRequest(
                f"a picture of {length} tokens is too small for plan {served.text!r}: at least "
                f"{PIECES} means must be left of it; send it larger"
            )
