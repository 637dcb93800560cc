"""Transformers' continuous batching is refused for an attached model: its error would only stand in
a field of truncated results."""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import Any

from adsc.attachment.after_import import after_import

API = "transformers.generation.continuous_batching.continuous_api"


def refuse_continuous_batching() -> None:
    """Make transformers' continuous batching refuse an attached model, once it is imported; again
    is no more."""
    after_import(API, _refuse)


def _refuse(api: ModuleType) -> None:
    begin = api.ContinuousMixin.init_continuous_batching
    if hasattr(begin, "adsc_wraps"):
        return

    @wraps(begin)
    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        from adsc.attachment.attach import attached_plan
        from adsc.dropping.cache_record import CacheError

        if (plan := attached_plan(self)) is not None:
            raise CacheError(
                f"continuous batching (generate_batch, paged caches) with plan {str(plan)!r}: its "
                "blocks are as long in every layer, and it brings no images; use model.generate, "
                "or adsc.detach(model) to run text dense"
            )
        return begin(self, *args, **kwargs)

    init_continuous_batching.adsc_wraps = True  # type: ignore[attr-defined]
    api.ContinuousMixin.init_continuous_batching = init_continuous_batching
