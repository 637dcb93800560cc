"""Configs are frozen pydantic models made of sections; `edit` derives one from another.

A config is plain data: what a run computes, never where or on how many machines. There is
deliberately no configuration language, no registry and no file format here: a config is written in
Python, and changed by dotted keys.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import reduce
from operator import or_
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic.fields import FieldInfo

from pipeline.values import ValueSyntaxError, read_value

_BOUNDS = {"gt": "> ", "ge": ">= ", "lt": "< ", "le": "<= ", "multiple_of": "a multiple of "}
_LENGTHS = {"min_length": "at least {} long", "max_length": "at most {} long"}

OPERATIONAL: dict[str, Any] = {"operational": True}
"""`Field(json_schema_extra=OPERATIONAL)` marks a field that decides how a stage is computed, not
what: pipeline.durable.identity leaves it out, so changing it reruns nothing."""
ADDED: dict[str, Any] = {"added": True}
"""`Field(json_schema_extra=ADDED)` marks a field added after stages had finished without it:
pipeline.durable.identity leaves it out at its default, so these results stay valid."""


class ConfigError(ValueError):
    """An invalid config: all problems at once, each with the way out."""


class _Typed(str):
    """A value as a user typed it."""


class Config(BaseModel):
    """Base of all config sections. Every field has a docstring: unit, range, effect."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,  # JSON has no literal for either
    )

    COMPARED_BY: ClassVar[tuple[str, ...]] = ()
    """Keys, or sections, that runs are compared by: the parameters of a workflow's MLflow run."""

    @field_validator("*", mode="wrap")
    @classmethod
    def _read(cls, given: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        """Read what a user typed; a string field takes "123", "true" and "null" literally."""
        value = read_value(given) if isinstance(given, _Typed) else given
        try:
            found = validate(value)
        except ValidationError:
            if value is given:
                raise
            with suppress(ValidationError):
                return validate(str(given))
            raise
        if not _booleans_kept(value, found):  # pydantic would make numbers of them
            raise ValueError("true and false are not numbers")
        return found


ConfigT = TypeVar("ConfigT", bound=Config)


def edit(config: ConfigT, changes: Mapping[str, Any]) -> ConfigT:
    """The config with dotted keys changed; strings are read by `pipeline.values`.

    Args:
        config: the starting point; it is not changed.
        changes: for instance `{"train.learning_rate": "1e-4", "train.stages.0.epochs": 2}`.

    Raises:
        ConfigError: every unknown key with the nearest valid name, and every bad value with what
            is allowed.
    """
    replaced = {key: value for key, value in changes.items() if _below(key, changes)}
    if replaced:  # whole sections, of which single keys are changed as well
        config = edit(config, replaced)
    changes = {key: value for key, value in changes.items() if key not in replaced}
    problems: list[str] = []
    edited = _edit(config, changes, (), problems, tuple(keys(config)))
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"config has {count}:\n" + "\n".join(f"  {line}" for line in problems))
    return edited  # type: ignore[no-any-return]


def _below(key: str, changes: Mapping[str, Any]) -> bool:
    return any(other.startswith(f"{key}.") for other in changes)


def keys(config: Config, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a config, including those of sections."""
    for name in type(config).model_fields:
        yield prefix + name
        yield from _keys_below(getattr(config, name), f"{prefix}{name}.")


def _keys_below(value: Any, prefix: str) -> Iterator[str]:
    if isinstance(value, Config):
        yield from keys(value, prefix)
        return
    for name, item in _items(value):
        if isinstance(item, Config):
            yield prefix + name
            yield from keys(item, f"{prefix}{name}.")


def _items(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, tuple | list):
        return [(str(index), item) for index, item in enumerate(value)]
    return [(str(key), item) for key, item in value.items()] if isinstance(value, Mapping) else []


def _edit(
    node: Any,
    changes: Mapping[str, Any],
    path: tuple[str, ...],
    problems: list[str],
    valid: tuple[str, ...],
) -> Any:
    """Merge changes into one node: a section, which is then validated, or a list or mapping that
    may hold sections."""
    below: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        name, dot, rest = key.partition(".")
        below.setdefault(name, {})[rest if dot else ""] = value
    known = dict(_fields(node))
    problems_before = len(problems)
    for name, inner in below.items():
        key = ".".join((*path, name))
        if name not in known:
            problems += [_unknown(f"{key}.{rest}".rstrip("."), valid) for rest in inner]
        elif "" in inner:
            try:
                known[name] = _typed(inner[""], isinstance(node, Config))
            except ValueSyntaxError as error:
                problems.append(f"{key} = {inner['']!r}: {error}")
        elif isinstance(known[name], Config) or _items(known[name]):
            known[name] = _edit(known[name], inner, (*path, name), problems, valid)
        else:
            problems.append(f"{key} is {known[name]!r}: it has no keys to set below it")
    if not isinstance(node, Config):
        return known if isinstance(node, Mapping) else type(node)(known.values())
    try:
        # By its own class: its field may take several.
        return type(node).model_validate(known)
    except ValidationError as error:
        whole = len(problems) == problems_before
        problems += _explain(error, path, type(node).model_fields, whole)
        return node


def _typed(value: Any, in_section: bool) -> Any:
    """Text for a section's own field, which reads it; the value of any other text."""
    if not isinstance(value, str):
        return value
    return _Typed(value) if in_section else read_value(value)


def _fields(node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, Config):
        return [(name, getattr(node, name)) for name in type(node).model_fields]
    return _items(node)


def _unknown(key: str, valid: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.6)
    if not near:  # the right name in the wrong section
        last = {name.rpartition(".")[2]: name for name in reversed(valid)}
        near = [last[name] for name in difflib.get_close_matches(key.rpartition(".")[2], last, n=1)]
    top = ", ".join(name for name in valid if "." not in name)
    hint = f"did you mean {near[0]}?" if near else f"valid are {top}"
    return f"{key} is unknown; {hint}"


def _booleans_kept(given: Any, validated: Any) -> bool:
    """Whether no true or false of a value became a number, which pydantic would allow."""
    if isinstance(given, bool):
        return type(validated) not in (int, float)
    before, after = dict(_items(given)), dict(_fields(validated))
    return all(_booleans_kept(before[name], after[name]) for name in before.keys() & after.keys())


def _explain(
    error: ValidationError, path: tuple[str, ...], fields: Mapping[str, FieldInfo], whole: bool
) -> Iterator[str]:
    """The problems of one section; those between its fields only if it is `whole`: if nothing
    below it was wrong."""
    for problem in error.errors(include_url=False):
        location = [str(part) for part in problem["loc"]]
        key = ".".join((*path, *location)) or "the config"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            yield f"{key} is unknown"
        elif location:
            hint = allowed(fields[location[0]])
            yield f"{key} = {problem['input']!r}: {message} ({hint})"
        elif whole:
            yield f"{key}: {message}"


def allowed(field: FieldInfo) -> str:
    """The values that a field allows, as text: `float, > 0, <= 1`."""
    parts = [_type_name(field.annotation)]
    for rule in field.metadata:
        parts += [
            f"{sign}{getattr(rule, name)}"
            for name, sign in _BOUNDS.items()
            if getattr(rule, name, None) is not None
        ]
        parts += [
            text.format(getattr(rule, name))
            for name, text in _LENGTHS.items()
            if getattr(rule, name, None) is not None
        ]
    return ", ".join(parts)


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(repr(value) for value in get_args(annotation))
    if annotation is type(None):
        return "null"
    parts = get_args(annotation)
    union = get_origin(annotation) in (Union, UnionType)
    if union and any(get_origin(part) is Literal for part in parts):
        return " or ".join(_type_name(part).removeprefix("one of ") for part in parts)
    if not parts:
        return getattr(annotation, "__name__", str(annotation))
    name = str(_without_marks(annotation)).replace("typing.", "").replace("NoneType", "null")
    return re.sub(r"\b[\w]+\.(?=\w)", "", name)


def _without_marks(annotation: Any) -> Any:
    """A type without the metadata that Annotated adds to it or to a part of it."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _without_marks(parts[0])
    if origin is Literal or not parts:
        return annotation
    plain = [_without_marks(part) for part in parts]
    return reduce(or_, plain) if origin in (Union, UnionType) else origin[tuple(plain)]
