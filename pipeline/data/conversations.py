"""Conversations in LLaVA's layout: what a record must be.

One record has `id`, `image` (a path below the image root, or the encoded picture, or a list of
these; absent for text alone) and `conversations`, a list of {"from": "human" | "gpt", "value":
text} in which `<image>` marks where a picture stands (the layout of llava_v1_5_mix665k). Nothing
here knows of Ray, of files (sources.py), of pixels (pictures.py) or of tokens (rendering.py).
"""

import re
from typing import Any

from pipeline.data.layouts import lost_content, role_hint
from pipeline.data.templates import MARKER, ROLES

__all__ = ["IGNORED", "MARKER", "REASONS", "BadRecord", "parse_turns", "picture_sources"]

IGNORED = -100
_SURROGATE = re.compile("[\ud800-\udfff]")
REASONS = {
    "malformed": "the record is not an object with a list of turns of text",
    "layout": "the record holds what LLaVA's layout has no place for, and would be lost",
    "encoding": "the text is not UTF-8, or holds half a character (a surrogate)",
    "roles": "turns must alternate human, gpt and end with gpt",
    "markers": "the number of <image> markers differs from the number of pictures",
    "control_token": "the text holds a token that only templates may write",
    "path": "the picture's path leads out of the image root",
    "missing_picture": "there is no such picture file",
    "broken_picture": "the picture can't be decoded",
    "picture_mode": "the picture's values have no fixed meaning as colours",
    "picture_size": "the picture's side, area or file size is out of bounds",
    "too_long": "the rendered conversation does not fit the context",
    "duplicate": "an identical record came before",
    "leak": "an identical record is in an earlier split",
}


class BadRecord(ValueError):
    """A record that is set aside; `reason` is a key of REASONS."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail} ({REASONS[self.reason]})"


def record_id(record: Any) -> str | None:
    """The record's id as text; None where it has none, which is no fault.

    Raises BadRecord: malformed, encoding.
    """
    found = record.get("id") if isinstance(record, dict) else None
    if found is None or found == "":
        return None
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        raise BadRecord("malformed", f"id {str(found)[:80]!r} is not a text or a number")
    _check_characters(str(found), "id")
    return str(found)


def parse_turns(record: Any) -> list[tuple[str, str]]:
    """The (role, text) turns of a record. Raises BadRecord: malformed, layout, encoding, roles."""
    if isinstance(record, dict) and (lost := lost_content(record)):
        raise BadRecord("layout", lost)
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise BadRecord("malformed", f"{str(record)[:80]!r} has no list `conversations`")
    turns = []
    for position, turn in enumerate(record["conversations"]):
        role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, 0)
        if not isinstance(text, str) or not text.strip():
            raise BadRecord("malformed", f"turn {position} has no text")
        _check_characters(text, f"turn {position}")
        if role != ROLES[position % 2]:
            raise BadRecord(
                "roles",
                f"turn {position} is from {role!r}, not {ROLES[position % 2]!r}{role_hint(role)}",
            )
        turns.append((role, text))
    if not turns or len(turns) % 2:
        raise BadRecord("roles", f"{len(turns)} turns; a conversation ends with an answer")
    return turns


def _check_characters(text: str, where: str) -> None:
    if _SURROGATE.search(text):
        raise BadRecord("encoding", f"{where} holds half a character (a surrogate)")


def question_kinds(record: dict[str, Any], exchanges: int) -> list[str]:
    """The record's kinds of question, one an exchange, or none at all."""
    kinds = record.get("kinds")
    if kinds is None:
        return []
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise BadRecord("malformed", f"kinds {str(kinds)[:80]!r} is not a list of texts")
    for kind in kinds:
        _check_characters(kind, "kinds")
    if kinds and len(kinds) != exchanges:
        raise BadRecord("malformed", f"{len(kinds)} kinds for {exchanges} exchanges")
    return kinds


def picture_sources(record: dict[str, Any]) -> list[str | bytes]:
    """The record's pictures, each a path or its encoded bytes: none, one, or a list.

    `image` and `images` mean the same; null, "" and [] are no picture. A table may hold bytes, or
    {bytes, path} as `datasets` writes it. Raises BadRecord: malformed, layout.
    """
    one, several = (_listed(record.get(key)) for key in ("image", "images"))
    if one and several and one != several:
        raise BadRecord("layout", f"{len(one)} `image` and {len(several)} `images` differ")
    return [_picture_source(item) for item in one or several]


def _listed(image: Any) -> list[Any]:
    return [] if image is None or image == "" else image if isinstance(image, list) else [image]


def _picture_source(item: Any) -> str | bytes:
    if isinstance(item, dict):
        item = item.get("bytes") or item.get("path")
    if not isinstance(item, str | bytes) or not item:
        raise BadRecord("malformed", f"image {str(item)[:80]!r} is not a path")
    return item


def check_markers(turns: list[tuple[str, str]], pictures: int) -> None:
    """As many <image> markers as pictures, in human turns only. Raises BadRecord: markers."""
    markers = sum(text.count(MARKER) for _, text in turns)
    if markers != pictures:
        raise BadRecord("markers", f"{markers} markers for {pictures} pictures")
    if any(MARKER in text for role, text in turns if role == ROLES[1]):
        raise BadRecord("markers", "an answer holds an <image> marker")
