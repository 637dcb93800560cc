"""Values typed by users: `--set KEY=VALUE`, and the options of a method.

Lists, mappings and quotes follow YAML; numbers follow YAML 1.2, so that they are read as decimal.
(YAML 1.1, which PyYAML implements, reads 010 as 8, 1:30 as 90, no as false, 2026-11-28 as a date,
and ends a text at ` #`.) Anything that is not a number, true, false, null, list or mapping is
literal text. This is the only module that reads YAML.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

_TRUE, _FALSE = {"true", "True", "TRUE"}, {"false", "False", "FALSE"}
_NULL = {"null", "Null", "NULL", "~"}
_DIGITS = "[0-9]+(?:_[0-9]+)*"
_WHOLE = re.compile(rf"[-+]?(?:{_DIGITS}|0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+)")
_REAL = re.compile(
    rf"[-+]?(?:{_DIGITS}\.(?:{_DIGITS})?|\.{_DIGITS}|{_DIGITS}(?=[eE]))(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_PREFIXED = re.compile(r"[-+]?0[xob]")


class ValueSyntaxError(ValueError):
    """An ambiguous text."""


def read_value(text: str) -> Any:
    """The value of a text: a number, true, false, null, a list, a mapping, or the text itself.

    Raises:
        ValueSyntaxError: a mapping names a key twice.

    >>> [read_value(text) for text in ("010", "1_000", "0x10", "1e3", "1:30", "no", "null")]
    [10, 1000, 16, 1000.0, '1:30', 'no', None]
    >>> read_value("{layers: [1, 02], name: '007'}")
    {'layers': [1, 2], 'name': '007'}
    """
    bare = text.strip()
    scalar = _scalar(bare)
    if not isinstance(scalar, str):
        return scalar
    if not bare.startswith(("[", "{", '"', "'")) and ":" not in bare and "- " not in bare:
        return bare
    import yaml  # seldom needed

    try:
        value = yaml.load(bare, _loader())  # a SafeLoader
    except (yaml.YAMLError, RecursionError):
        return bare
    quoted = bare.startswith(('"', "'"))
    return value if quoted or isinstance(value, list | dict) else bare


def _scalar(text: str) -> Any:
    """A plain scalar: a number, true, false, null, or the text itself."""
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if text in _NULL:
        return None
    try:
        if _WHOLE.fullmatch(text):
            return int(text, 0 if _PREFIXED.match(text) else 10)
        if _REAL.fullmatch(text):
            return float(re.sub(r"\.(?=inf|nan)", "", text, flags=re.IGNORECASE))
    except ValueError:  # thousands of digits
        pass
    return text


@cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML's with `_scalar` for plain scalars; no tags, no aliases."""

        yaml_implicit_resolvers: dict[str, Any] = {}
        yaml_constructors = {
            tag: yaml.SafeLoader.yaml_constructors[tag]
            for tag in (None, *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")))
        }

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("an alias")  # a list could hold itself
            return super().compose_node(parent, index)

        def construct_scalar(self, node: Any) -> Any:
            text = super().construct_scalar(node)
            plain = isinstance(node, yaml.ScalarNode) and node.style is None
            return _scalar(text or "null") if plain else text

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := sorted({key for key in keys if keys.count(key) > 1}):
                raise ValueSyntaxError(f"names {', '.join(map(repr, twice))} twice: keep one")
            return super().construct_mapping(node, deep)

    return Loader
