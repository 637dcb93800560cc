"""Names that MLflow's registry and S3 take, checked before anything runs and without either."""

from __future__ import annotations

import re
from collections.abc import Mapping

MAX_NAME = 200
"""Characters of a model's name; MLflow's databases keep 256, and add to it."""
_TAG = re.compile(r"[\w .:/=+@-]*")


def model_name(name: str) -> str:
    """The name under which a model is registered: what MLflow refuses in names of models that are
    logged or registered becomes `-`."""
    return re.sub(r"[/:'\".%]", "-", name)


def check_name(name: str) -> None:
    """Raise a ValueError for a name under which nothing can be registered."""
    if not re.search(r"\w", name) or not name.isprintable() or len(name) > MAX_NAME:
        raise ValueError(
            f"export.name = {name!r} can't name a model: use 1 to {MAX_NAME} visible characters, "
            "with at least one letter or digit"
        )


def check_tags(tags: Mapping[str, str]) -> None:
    """Raise a ValueError for tags that S3 refuses."""
    problems = [
        f"{key}={value}"
        for key, value in tags.items()
        if not (0 < len(key) <= 128 and len(value) <= 256)
        or not (_TAG.fullmatch(key) and _TAG.fullmatch(value))
        or key.lower().startswith("aws:")
    ]
    if problems or len(tags) > 10:
        shown = ", ".join(problems) or f"{len(tags)} of them"
        raise ValueError(
            f"S3 does not take the tags {shown}: at most 10, keys of 1 to 128 and values of up to "
            "256 letters, digits, spaces and . : / = + @ - _, and no key that begins with aws:"
        )
