"""What a record holds that LLaVA's layout has no place for: found, so that it is never lost unseen.

Other layouts' records differ by a key or a marker: taken for LLaVA's, one about a video would train
as a question about nothing. Metadata is everywhere, and no fault. So a key is judged by its name,
then by what it holds. Nothing here reads or converts another layout; it says how to.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

READ = ("id", "image", "images", "conversations", "kinds")
"""Keys that are read. They are all that LLaVA's layout has."""
TURN = ("from", "value")
KNOWN = f"a record of LLaVA's layout has {', '.join(READ)}, and turns of {{from, value}}"

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")
_PICTURE = {
    "image", "images", "img", "imgs", "picture", "pictures", "pic", "pics", "photo", "photos",
    "pixel", "pixels", "jpg", "jpeg", "png", "screenshot", "screenshots",
}  # fmt: skip
_MEDIA = _PICTURE | {
    "video", "videos", "audio", "audios", "clip", "clips", "frame", "frames", "speech", "sound",
    "sounds", "voice", "wav", "mp4", "movie", "media",
}  # fmt: skip
_RUN_TOGETHER = re.compile(
    r"(video|audio|image|img|picture|photo|media|clip|frame)s?"
    r"(file|path|uri|data|bytes|b64|base64|dir|folder|root)s?"
)
_ABOUT = {
    "id", "ids", "idx", "index", "size", "sizes", "width", "widths", "height", "heights", "shape",
    "url", "urls", "link", "name", "names", "source", "hash", "md5", "sha1", "sha256", "format",
    "mode", "type", "count", "license", "author", "caption", "captions", "description", "split",
    "dataset", "quality", "score", "list", "fps", "duration", "rate", "num", "number", "has", "is",
}  # fmt: skip
"""First or last words of names that say something about pictures and are none: num_images."""
_SPOKEN = {
    "system", "systemprompt", "systemmessage", "systeminstruction", "instruction", "instructions",
    "custominstruction", "input", "inputs", "prompt", "output", "outputs", "completion", "response",
    "question", "questions", "answer", "answers", "query", "history", "context", "passage",
    "messages", "message", "conversation", "dialog", "dialogue", "tool", "tools", "toolcalls",
    "functions", "functioncall", "chosen", "rejected",
}  # fmt: skip
"""Names of what other layouts say to a model, or expect of it."""
_WEIGHTS = {"loss", "weight", "train", "mask", "masked", "lossmask", "lossweight"}
"""Names of what decides whether a turn is trained."""
_DIGEST = 64  # bytes that a checksum has at most
_PICTURE_FILE = re.compile(r"\.(jpe?g|png|gif|webp|bmp|tiff?|heic|avif)$", re.IGNORECASE)
_OTHER_FILE = re.compile(r"\.(mp4|mkv|avi|mov|webm|m4v|wav|mp3|flac|ogg|m4a)$", re.IGNORECASE)
_DATA_URI = re.compile(r"data:(image|video|audio)/")

# Placeholders of other models' processors; none is prose.
_TOKEN = re.compile(
    r"<\|/?(?:vision|image|img|video|audio|picture|media)[\w:/-]*\|?>"
    r"|<(?P<tag>img|audio|video|image)>[^<>\s]+</(?P=tag)>"
    r"|</?(?:im_start|im_end|im_patch|im_col|vid_start|vid_end|vid_patch|au_start|au_end|au_patch"
    r"|image_soft_token|(?:start|end)_of_image|fake_token_around_image|imagehere|imagecontent"
    r"|img_context|(?:image|img|video|audio|speech)_(?:pad|placeholder|token|start|end))>",
    re.IGNORECASE,
)
# A bare tag in a question stands for a file, unless it is about HTML or closed, as HTML's are.
_TAG = re.compile(
    r"<\s*(?P<tag>images?|pictures?|photos?|videos?|audios?|sounds?|speech)[ _-]?[0-9]*\s*/?>"
    r"|<(?P<numbered>img|frame)[ _-]?[0-9]+>|(?:\A|^)\s*<img>\s*(?:$|\Z)|\A\s*<img>|<img>\s*\Z",
    re.IGNORECASE | re.MULTILINE,
)
_OURS, _PIXTRAL = "<image>", "[IMG]"
_ABOUT_HTML = re.compile(r"\s+(?:html\s+|html5\s+)?(?:tags?|elements?)\b", re.IGNORECASE)
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)

_CONVERT = (
    (("messages",), "`messages`: write each {role: user|assistant, content} as {from: human|gpt, "
     "value} in `conversations`, a picture in it as <image> with its path in `image`"),
    (("instruction", "output"), "the alpaca layout: write `conversations` of a human turn "
     "(instruction, a line break, input) and a gpt turn (output)"),
    (("texts",), "`texts`: write each {user, assistant} as a human and a gpt turn in "
     "`conversations`, with <image> where the first picture stands"),
    (("question", "answer"), "questions and answers: write `conversations` of a human turn "
     "(<image>, a line break, question) and a gpt turn (answer)"),
    (("prompt", "completion"), "prompts and completions: write `conversations` of a human turn "
     "(prompt) and a gpt turn (completion)"),
    (("query", "response"), "queries and responses: write `conversations` of a human turn (query) "
     "and a gpt turn (response)"),
    (("conversation",), "`conversation`: name it `conversations`, a list of {from, value}"),
)  # fmt: skip


def other_layout(keys: Iterator[str] | list[str]) -> str:
    """Which layout these keys are of, and how to convert it; empty where none is recognised."""
    found = {key.lower() for key in keys}
    return next((how for wanted, how in _CONVERT if found.issuperset(wanted)), "")


def role_hint(role: object) -> str:
    """What to write instead of a role that other layouts use."""
    name = str(role).lower()
    if name == "system":
        return "; LLaVA's layout has no system turn: put its text into the first question"
    for ours, theirs in (("human", ("user",)), ("gpt", ("assistant", "model", "bot", "chatgpt"))):
        if name in theirs:
            return f"; write from: {ours} for {name}"
    return ""


def lost_content(record: Mapping[str, Any]) -> str | None:
    """What of a record would be lost by reading it as LLaVA's layout, and the way out."""
    turns = record.get("conversations")
    if not isinstance(turns, list):
        how = other_layout(list(map(str, record)))
        return f"no list `conversations`, but {how}" if how else None
    seen = any(not _is_empty(record.get(key)) for key in ("image", "images"))
    texts = [turn["value"] for turn in turns if _is_turn(turn)]
    for key in record:
        if key not in READ and (why := _unread(str(key), record[key], seen, texts)):
            return f"key {key!r} {why}: {KNOWN}; convert it, or delete the key if it is no content"
    for position, turn in enumerate(turns):
        if isinstance(turn, dict) and (why := _lost_of_turn(turn, seen)):
            return f"turn {position} {why}"
    return None


def may_hold_content(name: str, holds_numbers: bool) -> bool:
    """Whether a table's column has to be looked at: numbers are metadata, unless a name says that
    they stand for something."""
    return not holds_numbers or _names_media(name) or _joined(name) in _SPOKEN


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("value"), str)


def _lost_of_turn(turn: Mapping[str, Any], seen: bool) -> str | None:
    if "from" not in turn and "role" in turn:
        return (
            "has role and content: write {role: user|assistant, content} as {from: human|gpt, "
            f"value}}; {KNOWN}"
        )
    if isinstance(turn.get("value"), list):
        return "is a list of parts: write one text, with <image> where a picture stands"
    for key, value in turn.items():
        if key in TURN or _is_empty(value, truth=False):
            continue
        if _joined(str(key)) in _WEIGHTS and value not in (None, 1, True):
            return f"has {key}: {value!r}, which decides what is trained; here every answer is"
        if why := _unread(str(key), value, seen, []):
            return f"has a key {key!r} that {why}: {KNOWN}"
    text = turn.get("value")
    marker = foreign_marker(text, turn.get("from") == "human") if isinstance(text, str) else None
    if marker:
        return (
            f"holds {marker!r}, a marker of another layout: <image> marks a picture of `image`; "
            "videos and sounds have no place here"
        )
    return None


def foreign_marker(text: str, question: bool) -> str | None:
    """A marker for a picture, a video or a sound that other layouts use.

    >>> foreign_marker("<video>\\nwhat happens?", question=True)
    '<video>'
    >>> foreign_marker("<image>\\nWhat does the <video> tag do?", question=True)
    """
    if "</image>" not in text:
        text = text.replace(_OURS, " ")
    if "<" not in text and _PIXTRAL not in text:  # nearly all texts
        return None
    if found := _TOKEN.search(text):
        return found.group()[:80]
    if not question:
        return None
    text = _CODE.sub("", text)
    if _PIXTRAL in text and "[/IMG]" not in text:  # which would be a forum's
        return _PIXTRAL
    for found in _TAG.finditer(text):
        tag = found.group().strip()
        name = (found["tag"] or found["numbered"] or "img").lower()
        if tag == _OURS or f"</{name}" in text.lower() or _ABOUT_HTML.match(text, found.end()):
            continue
        return tag
    return None


def _unread(key: str, value: Any, seen: bool, texts: list[str]) -> str | None:
    """Why a key that isn't read must not be dropped; `seen`: the record has pictures."""
    if _is_empty(value):
        return None
    joined = _joined(key)
    if _names_media(key):
        ends = _WORD.findall(key.lower())
        about = bool({ends[0], ends[-1]} & _ABOUT)
        return None if about and seen else f"holds {_shown(value)}, which is not read"
    if joined in _SPOKEN:
        repeated = isinstance(value, str) and any(value.strip() in text for text in texts)
        return None if repeated else f"holds {_shown(value)}, which no turn has"
    for leaf in _leaves(value):
        if isinstance(leaf, bytes):
            return f"holds a file, {_shown(leaf)}" if len(leaf) > _DIGEST else None
        if _OTHER_FILE.search(leaf) or _DATA_URI.match(leaf):
            return f"holds a file, {_shown(leaf)}"
        if not seen and _PICTURE_FILE.search(leaf):
            return f"holds a picture, {_shown(leaf)}, and `image` none"
    if isinstance(value, list) and value and all(_looks_like_a_turn(one) for one in value):
        return "holds turns"
    return None


def _looks_like_a_turn(value: Any) -> bool:
    return isinstance(value, dict) and (
        {"role", "content"} <= value.keys() or set(TURN) <= value.keys()
    )


def _leaves(value: Any) -> Iterator[Any]:
    """The short texts and the bytes in a value: what may be a file or its name."""
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, str):
        text = value.strip()
        if len(text) < 1024 and not re.search(r"\s", text[-1024:]):
            yield text
        elif _DATA_URI.match(text):
            yield text[:80]
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _leaves(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _leaves(one)


def _is_empty(value: Any, truth: bool = True) -> bool:
    """Nothing, however it is written; with `truth` also false and 0."""
    if isinstance(value, Mapping):
        return all(_is_empty(one, truth) for one in value.values())
    if isinstance(value, list | tuple):
        return all(_is_empty(one, truth) for one in value)
    if isinstance(value, str | bytes):
        return not value.strip() or value.strip() in ("[]", "{}")
    if isinstance(value, float) and math.isnan(value):  # a missing cell of pandas
        return True
    return value is None or (truth and not value)


def _names_media(key: str) -> bool:
    words = {word.lower() for word in _WORD.findall(key)} | set(_WORD.findall(key.lower()))
    return bool(words & _MEDIA) or any(map(_RUN_TOGETHER.fullmatch, words))


def _joined(key: str) -> str:
    return re.sub(r"[^a-z]", "", key.lower())


def _shown(value: Any) -> str:
    text = f"{len(value)} bytes" if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
