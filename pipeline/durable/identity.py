"""Identity of a stage: a fingerprint of what it computes, and of nothing else.

It covers the canonical config, the fingerprints of the inputs, and the id and version of the
stage's kind. Machines, worker counts, storage roots, tracking and credentials aren't part of it,
nor are config fields marked OPERATIONAL, or ADDED and at their default (pipeline.config). Neither
source code nor its location is hashed: a body may move to another file, and a change of what it
computes requires raising its kind's version.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import math
from collections.abc import Callable, Mapping
from enum import Enum
from fractions import Fraction
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config import ADDED, OPERATIONAL
from pipeline.durable.reference import Reference

SHORT = 12  # hexadecimal digits of a fingerprint in a folder's name


class IdentityError(ValueError):
    """A value that has no deterministic literal; the message names the field."""


def canonical(value: Any, field: str = "config") -> Any:
    """The value as JSON literals, the same in every process and on every machine.

    Raises:
        IdentityError: with the field's name, for a function, an object, bytes, NaN, a key that
            isn't a string.

    >>> canonical({"b": (1, 2), "a": {"y", "x"}})
    {'a': ['x', 'y'], 'b': [1, 2]}
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, Enum):
        return canonical(value.value, field)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise IdentityError(f"{field} is {value}: JSON has no such number; use null or a bound")
        return float(value)
    if isinstance(value, str | int):
        return str(value) if isinstance(value, str) else int(value)
    if isinstance(value, Fraction):
        return str(value)
    if isinstance(value, Reference):
        return str(value)
    if isinstance(value, PurePath):
        return value.as_posix()
    if isinstance(value, BaseModel):
        return {
            name: canonical(getattr(value, name), f"{field}.{name}")
            for name, info in sorted(type(value).model_fields.items())
            if not _left_out(info, getattr(value, name))
        }
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = sorted(item.name for item in dataclasses.fields(value))
        return {name: canonical(getattr(value, name), f"{field}.{name}") for name in names}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise IdentityError(f"{field} has the key {key!r}: keys must be strings")
        return {key: canonical(value[key], f"{field}.{key}") for key in sorted(value)}
    if isinstance(value, tuple | list):
        return [canonical(item, f"{field}.{index}") for index, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return sorted((canonical(item, f"{field}.{{}}") for item in value), key=json.dumps)
    raise IdentityError(
        f"{field} is a {type(value).__qualname__}, which has no deterministic literal; "
        "use numbers, strings, tuples, mappings or configs"
    )


def _left_out(info: FieldInfo, value: Any) -> bool:
    marks = info.json_schema_extra
    if not isinstance(marks, dict):
        return False
    return OPERATIONAL.items() <= marks.items() or (
        ADDED.items() <= marks.items() and bool(value == info.default)
    )


def digest(value: Any, field: str = "config") -> str:
    """SHA-256 of the canonical literals, 64 hexadecimal digits."""
    text = json.dumps(
        canonical(value, field), sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def load_body(body: Callable[..., Any] | str) -> Callable[..., Any]:
    """The body's function; if it is given by its full name, its module is imported."""
    if not isinstance(body, str):
        return body
    module, _, name = body.rpartition(".")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def body_name(body: Any) -> str:
    """The full name of a stage's body, `module.function`, for other processes; not part of any
    identity.

    Raises:
        IdentityError: a lambda, an inner function, a partial, an object, or a text that is no full
            name.
    """
    if isinstance(body, str):
        if "." not in body or not all(part.isidentifier() for part in body.split(".")):
            raise IdentityError(
                f"the body {body!r} is not a function's full name, such as package.module.function"
            )
        return body
    name, module = getattr(body, "__qualname__", None), getattr(body, "__module__", None)
    if not name or not module or "<" in name:
        raise IdentityError(
            f"the body {body!r} can't be imported by name; use a function at the top of a module"
        )
    return f"{module}.{name}"


def fingerprint(*, config: Any, inputs: Mapping[str, str], version: int, kind: str) -> str:
    """The fingerprint of one stage.

    Args:
        inputs: parameter names -> fingerprints of the inputs.
        version: version of the kind.
        kind: id of the kind.
    """
    # The key `body` dates from when a body's name identified its kind: finished stages contain it.
    parts = {"inputs": dict(inputs), "version": version, "body": kind}
    return digest({"config": canonical(config), **parts})
