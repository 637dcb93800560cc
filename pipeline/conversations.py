"""LLaVA's conversation JSON, record by record: read, validated, rendered to token ids with labels.

One record has `id`, `image` (a path below the image root; absent for text alone) and
`conversations`, a list of {"from": "human" | "gpt", "value": text} in which `<image>` marks where
the picture stands (the layout of llava_v1_5_mix665k). Nothing here knows of Ray or of files of
records: see stages/prepare.py.
"""

import io
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from pipeline.templates import ROLES, Template

IGNORED = -100
MARKER = "<image>"
REASONS = {
    "malformed": "the record is not an object with an id and a list of turns of text",
    "roles": "turns must alternate human, gpt and end with gpt",
    "markers": "the number of <image> markers differs from the number of pictures",
    "path": "the picture's path leads out of the image root",
    "missing_picture": "there is no such picture file",
    "broken_picture": "the picture can't be decoded",
    "picture_size": "the picture's side or area is out of bounds",
    "too_long": "the rendered conversation does not fit the context",
    "duplicate": "an identical record came before",
}


class BadRecord(ValueError):
    """A record that is set aside; `reason` is a key of REASONS."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail} ({REASONS[self.reason]})"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a picture and a text may be."""

    context: int
    """Longest rendered conversation in tokens, vision tokens included."""
    min_side: int
    """Shortest allowed side of a picture, pixels."""
    max_pixels: int
    """Largest allowed area of a picture, pixels; checked before decoding, so a bomb is never
    unpacked."""


def iter_records(path: Path) -> Iterator[tuple[int, Any]]:
    """(position, record) of a JSON list or a JSON Lines file; an unreadable line is yielded as a
    string.

    Positions count list entries from 0, or lines from 1.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name} is not UTF-8 text (byte {error.start}); convert it"
        ) from None
    if text.lstrip()[:1] == "[":
        try:
            yield from enumerate(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path.name} is not valid JSON (line {error.lineno}: {error.msg}); "
                "write a JSON list, or one object a line (JSON Lines)"
            ) from None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError:
                yield number, line


def parse_turns(record: Any) -> list[tuple[str, str]]:
    """The (role, text) turns of a record. Raises BadRecord: malformed, roles."""
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise BadRecord("malformed", f"{str(record)[:80]!r} has no list `conversations`")
    if not isinstance(record.get("id"), str | int):
        raise BadRecord("malformed", f"id {record.get('id')!r} is not a text or a number")
    turns = []
    for position, turn in enumerate(record["conversations"]):
        role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, 0)
        if not isinstance(text, str) or not text.strip():
            raise BadRecord("malformed", f"turn {position} has no text")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise BadRecord("malformed", f"turn {position} holds half a character (a surrogate)")
        if role != ROLES[position % 2]:
            raise BadRecord(
                "roles", f"turn {position} is from {role!r}, not {ROLES[position % 2]!r}"
            )
        turns.append((role, text))
    if not turns or len(turns) % 2:
        raise BadRecord("roles", f"{len(turns)} turns; a conversation ends with an answer")
    return turns


def question_kinds(record: dict[str, Any], exchanges: int) -> list[str]:
    """The record's kinds of question, one an exchange, or none at all."""
    kinds = record.get("kinds")
    if kinds is None:
        return []
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise BadRecord("malformed", f"kinds {str(kinds)[:80]!r} is not a list of texts")
    if len(kinds) != exchanges:
        raise BadRecord("malformed", f"{len(kinds)} kinds for {exchanges} exchanges")
    return kinds


def picture_names(record: dict[str, Any]) -> list[str]:
    """The record's picture paths: none, one, or a list."""
    image = record.get("image")
    names = [] if image is None else image if isinstance(image, list) else [image]
    if not all(isinstance(name, str) for name in names):
        raise BadRecord("malformed", f"image {image!r} is not a path")
    return names


def read_picture(root: Path, name: str, limits: Limits) -> bytes:
    """The encoded bytes of a picture that was decoded once to see that it can be.

    Raises BadRecord: path, missing_picture, broken_picture, picture_size.
    """
    try:
        path = (root / name).resolve()
    except ValueError as error:
        raise BadRecord("path", f"{name!r}: {error}") from None
    if not path.is_relative_to(root.resolve()):
        raise BadRecord("path", repr(name))
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise BadRecord("missing_picture", f"{name!r}: {error.strerror}") from None
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(encoded)) as picture:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            width, height = picture.size
            if min(width, height) < limits.min_side or width * height > limits.max_pixels:
                raise BadRecord(
                    "picture_size",
                    f"{name!r} is {width} x {height}; sides from {limits.min_side}, "
                    f"area up to {limits.max_pixels} pixels",
                )
            picture.load()
    except (
        OSError,
        UnidentifiedImageError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:
        if isinstance(error, BadRecord):
            raise
        raise BadRecord("broken_picture", f"{name!r}: {error}") from None
    return encoded


def render_tokens(
    turns: list[tuple[str, str]], template: Template, tokenizer: Any, vision_tokens: list[int]
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation; image number i takes `vision_tokens[i]` positions.

    Labels equal the ids where a turn is supervised and IGNORED (-100) elsewhere, vision positions
    always.
    Raises BadRecord: markers.
    """
    markers = sum(text.count(MARKER) for _, text in turns)
    if markers != len(vision_tokens) or any(
        MARKER in text for role, text in turns if role == ROLES[1]
    ):
        raise BadRecord("markers", f"{markers} markers for {len(vision_tokens)} pictures")
    ids = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    labels = [IGNORED] * len(ids)
    sizes = iter(vision_tokens)
    for text, supervised in template.render(turns):
        head, *rest = text.split(MARKER)
        expanded = head + "".join(MARKER * next(sizes) + piece for piece in rest)
        piece_ids = tokenizer(expanded, add_special_tokens=False).input_ids
        ids += piece_ids
        labels += piece_ids if supervised else [IGNORED] * len(piece_ids)
    return ids, labels
