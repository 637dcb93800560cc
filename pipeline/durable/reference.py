"""References: placeholders in a config for a value from another stage's result.

The value is filled in once, before the stage's body runs; bodies never see references, nor the
inputs they are resolved from. Until then a reference is its text, in fingerprints, records and
output; the fingerprint of the needed stage covers its value. Each subclass defines how a result
becomes a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, model_serializer

Value = TypeVar("Value")


class Reference(BaseModel):
    """A value of another stage's result."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    stage: str
    """The stage's name."""

    def value(self, outputs: Mapping[str, Any]) -> Any:
        """The value of the reference, given the stage's outputs."""
        raise NotImplementedError

    @model_serializer
    def _serialise(self) -> str:
        return str(self)


def references(config: Any) -> Iterator[Reference]:
    """All references in a config, its sections, lists and mappings."""
    if isinstance(config, Reference):
        yield config
    else:
        for _, value in _items(config):
            yield from references(value)


def resolve(config: Value, outputs: Mapping[str, Mapping[str, Any]]) -> Value:
    """The config with every reference replaced by its value.

    Args:
        outputs: stage name -> outputs, for the stages that it refers to.
    """
    if isinstance(config, Reference):
        return config.value(outputs[config.stage])  # type: ignore[no-any-return]
    changed = {
        key: resolve(value, outputs) for key, value in _items(config) if any(references(value))
    }
    if not changed:
        return config
    if isinstance(config, BaseModel):
        return config.model_copy(update=changed)
    items: Any = dict(_items(config)) | changed
    return items if isinstance(config, Mapping) else type(config)(items.values())  # type: ignore


def _items(config: Any) -> list[tuple[Any, Any]]:
    if isinstance(config, BaseModel):
        return [(name, getattr(config, name)) for name in type(config).model_fields]
    if isinstance(config, tuple | list):
        return list(enumerate(config))
    return list(config.items()) if isinstance(config, Mapping) else []
