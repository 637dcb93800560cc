"""Redaction: nested configs as dotted keys, and text, without credentials.

Used wherever a config, a URI, an error or an answer is shown or stored. It recognises credentials
by the name of a key, by the format of a value, and by comparison with this process's environment.
It is a safety net, deliberately not a licence to put secrets into configs: credentials for storage
and tracking belong in the environment.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "[redacted]"

_SECRET_KEY = re.compile(
    r"passw(or)?d|secret|credential|(api|access|private|signing)[-_ ]?key|authorization|token$",
    re.IGNORECASE,
)
# A tokenizer's special tokens are not access tokens.
_SPECIAL_TOKEN = re.compile(
    r"(^|_)(image|video|bos|eos|pad|unk|cls|sep|mask|special|vision|start|end)_?token$", re.I
)
_SECRET_VALUE = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS access key id
    r"|\bgh[pousr]_\w{20,}|\bhf_\w{20,}|\bsk-[\w-]{20,}"  # GitHub, Hugging Face, model providers
    r"|\beyJ[\w-]{8,}\.[\w-]+\.[\w-]+"  # JSON web token
    r"|(?<=://)[^/\s@]+(?=@)"  # user:password@ of a URI
    r"|(?<=Bearer )\S+"
    r"|(?<=[?&])(?:X-Amz-(?:Signature|Credential|Security-Token)|sig|token|password)=[^&\s]+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)


_SECRET_VARIABLE = re.compile(
    r"(SECRET|TOKEN|PASSWORD|PASSWD|ACCESS_KEY|API_KEY)(?!.*(_PATH|_FILE|_DIR|PARALLELISM)$)", re.I
)


def redact(text: str) -> str:
    """The text with everything that looks like a credential replaced, and any secret of the
    environment.

    >>> redact("postgresql://ada:lovelace@db/mlflow")
    'postgresql://[redacted]@db/mlflow'
    """
    for name, secret in os.environ.items():
        if len(secret) >= 8 and secret in text and _SECRET_VARIABLE.search(name):
            text = text.replace(secret, HIDDEN)
    return _SECRET_VALUE.sub(HIDDEN, text)


def flatten(nested: Mapping[str, Any]) -> dict[str, str]:
    """Dotted keys to printable values, credentials replaced; a list of plain values stays one
    value, as JSON.

    >>> flatten({"train": {"lr": 1e-4, "plans": ["2:1/2", ""]}, "hf_token": "abc"})
    {'train.lr': '0.0001', 'train.plans': '["2:1/2", ""]', 'hf_token': '[redacted]'}
    """
    return {".".join(path): _shown(path, value) for path, value in leaves(nested)}


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The plain values of a nested structure, each with its path of keys."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, str(key)))
    elif isinstance(value, list | tuple) and any(
        isinstance(item, Mapping | list | tuple) for item in value
    ):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, str(index)))
    else:
        yield path, value


def names_secret(key: str) -> bool:
    """Whether a key's name marks its value as a credential."""
    return bool(_SECRET_KEY.search(key)) and not _SPECIAL_TOKEN.search(key)


def _shown(path: tuple[str, ...], value: object) -> str:
    if (
        any(map(names_secret, path))
        and value not in (None, "", (), [], {})
        and not isinstance(value, bool)
    ):
        return HIDDEN
    plain = isinstance(value, list | tuple | dict)
    return redact(json.dumps(value, default=str, ensure_ascii=False) if plain else str(value))


def clean(value: Any) -> Any:
    """JSON literals with credentials replaced, as in `redact`."""
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if isinstance(item, str) and item and names_secret(key) else clean(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return redact(value) if isinstance(value, str) else value
