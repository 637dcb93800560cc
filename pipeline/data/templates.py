"""Conversation templates: a conversation rendered to text segments, each of which knows whether it
is supervised.

The label mask is made while rendering, never found again in the finished text. Only assistant
turns and their end token are supervised (LLaVA's rule). Every template is Jinja: those that ship
(chat_templates/; vicuna_v1 is that of LLaVA-1.5, named as in haotian-liu/LLaVA's conversation.py)
and those that checkpoints bring. What a checkpoint is saved with is the text that its training data
were rendered with.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

ROLES = ("human", "gpt")
MARKER = "<image>"
"""Stands in a text where a picture stands, whatever token a checkpoint has for it."""
OWN = "tokenizer"
"""Name of the template that a checkpoint brings."""
AUTO = "auto"
"""Name for: the checkpoint's own where it ends answers with an end token, else vicuna_v1."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Turns = Sequence[tuple[str, str]]
Segments = list[tuple[str, bool]]


class TemplateError(ValueError):
    """The template can't render conversations with a label mask; why, and the way out."""


def place_marker(text: str) -> str:
    """A turn's only picture goes first, on a line of its own, as LLaVA's preprocessing puts it;
    several stay where they are.

    >>> place_marker("what is this?<image>")
    '<image>\\nwhat is this?'
    """
    if text.count(MARKER) != 1:
        return text.strip()
    return f"{MARKER}\n{text.replace(MARKER, '').strip()}".strip()


def message_parts(text: str, before: int = 0) -> list[dict[str, str]]:
    """A chat message's content: pictures where they are marked, texts between them.

    Args:
        before: pictures that are not marked, and come first.

    >>> message_parts("a <image>?")
    [{'type': 'text', 'text': 'a '}, {'type': 'image'}, {'type': 'text', 'text': '?'}]
    """
    parts: list[dict[str, str]] = [{"type": "image"}] * before
    for number, piece in enumerate(text.split(MARKER)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


@dataclass(frozen=True, kw_only=True)
class Template:
    """A Jinja chat template, with the label mask taken while it renders.

    A template with `{% generation %}` blocks names what is supervised. Any other is rendered turn
    by turn, and refused unless each shorter rendering is the beginning of the next.
    """

    name: str
    text: str
    """The Jinja template."""
    image_token: str = MARKER
    """The checkpoint's token for a picture."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """bos_token and so on, which templates name."""
    parts: bool = False
    """Whether messages are lists of parts (a processor's template) or texts (a tokenizer's)."""

    def render(self, turns: Turns) -> Segments:
        """Segments (text, supervised) of a conversation of (role, text) turns; roles as in LLaVA:
        human, gpt.

        A conversation that ends with a human turn is a prompt: it ends with the assistant's cue.

        Raises:
            TemplateError: the template fails, or its mask is unknown.

        >>> shipped("vicuna_short").render([("human", "what?"), ("gpt", "a bag")])
        [('USER: what? ASSISTANT:', False), (' a bag</s>', True)]
        """
        messages = [self._message(role, text) for role, text in turns]
        if turns[-1][0] == ROLES[0]:
            return [(self._neutral(self._text(messages, prompt=True)), False)]
        if _GENERATION.search(self.text):
            whole, spans = self._marked(messages)
        else:
            whole, spans = self._compared(messages)
        segments: Segments = []
        at = 0
        for start, end in spans:
            segments += [(whole[at:start], False), (whole[start:end], True)]
            at = end
        segments.append((whole[at:], False))
        return [(self._neutral(text), on) for text, on in segments if text]

    def _neutral(self, text: str) -> str:
        return text.replace(self.image_token, MARKER)

    def _message(self, role: str, text: str) -> dict[str, Any]:
        name = "user" if role == ROLES[0] else "assistant"
        placed = place_marker(text) if role == ROLES[0] else text.strip()
        if not self.parts:
            return {"role": name, "content": placed.replace(MARKER, self.image_token)}
        if text.count(MARKER) == 1:  # templates write the line break behind a picture themselves
            placed = placed.replace(f"{MARKER}\n", MARKER)
        return {"role": name, "content": message_parts(placed)}

    def _render(self, messages: list[dict[str, Any]], **options: bool) -> tuple[str, Any]:
        from jinja2.exceptions import TemplateError as JinjaError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            given: dict[str, Any] = {**options, **self.special_tokens}
            # Annotated as text, it returns the texts of all conversations and their spans.
            rendered, spans = cast(
                tuple[list[str], Any],
                render_jinja_template([messages], chat_template=self.text, **given),
            )
        except (JinjaError, TypeError) as error:
            raise TemplateError(
                f"the checkpoint's chat template fails on a plain conversation ({error}); name "
                f"another with template={'|'.join(SHIPPED)}"
            ) from None
        return rendered[0], spans

    def _text(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        return self._render(messages, add_generation_prompt=prompt)[0]

    def _marked(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        text, spans = self._render(messages, return_assistant_tokens_mask=True)
        return text, [(start, end) for start, end in spans[0]]

    def _compared(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        whole = self._text(messages)
        spans = []
        for number in range(1, len(messages), 2):
            prompt = self._text(messages[:number], prompt=True)
            answered = self._text(messages[: number + 1])
            if not (answered.startswith(prompt) and whole.startswith(answered)):
                raise TemplateError(
                    "the checkpoint's chat template renders the beginning of a conversation "
                    "differently once more turns follow, and marks no answers with "
                    "{% generation %}: the supervised tokens are unknown. Add those marks to the "
                    f"template, or name another with template={'|'.join(SHIPPED)}"
                )
            spans.append((len(prompt), len(answered.rstrip())))
        return whole, spans


SHIPPED = ("vicuna_v1", "vicuna_short")
NAMES = (*SHIPPED, OWN, AUTO)


@cache
def shipped(name: str) -> Template:
    """The template of that name in SHIPPED."""
    file = Path(__file__).parent / "chat_templates" / f"{name}.jinja"
    return Template(name=name, text=file.read_text(encoding="utf-8"))


def find_template(name: str, processor: Any) -> Template:
    """The template of that name for a checkpoint, tried on a small conversation.

    Raises:
        TemplateError: an unknown name; a checkpoint without a template; a template that ends
            answers without an end token, or whose mask is unknown.
    """
    if name not in NAMES:
        raise TemplateError(f"template {name!r} is unknown; there are {sorted(NAMES)}")
    if name in SHIPPED:
        return shipped(name)
    own = _own_template(processor)
    if name == AUTO:
        return own if own and _ends(own, processor.tokenizer) else shipped("vicuna_v1")
    if own is None:
        raise TemplateError(
            f"the checkpoint has no chat template; name one with template={'|'.join(SHIPPED)}"
        )
    if not _ends(own, processor.tokenizer):
        raise TemplateError(
            "the checkpoint's chat template ends an answer without an end token: a model trained "
            f"with it would not learn to stop. Name another with template={'|'.join(SHIPPED)}"
        )
    return own


def special_tokens(processor: Any, prompts: Sequence[str]) -> dict[str, bool]:
    """Arguments of a processor for rendered prompts: to put no second BOS token before
    those that begin with one."""
    bos = processor.tokenizer.bos_token
    begins = bool(bos) and all(prompt.startswith(bos) for prompt in prompts)
    return {"add_special_tokens": False} if begins else {}


def begin_with_bos(folder: Path) -> None:
    """Let a checkpoint's chat template write the BOS token that its tokenizer adds by itself:
    serving engines add none to a rendered conversation."""
    from transformers import AutoTokenizer

    file = folder / "chat_template.jinja"
    if not file.is_file():
        return
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    bos, text = tokenizer.bos_token, file.read_text()
    adds = bos and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    if adds and "bos_token" not in text and bos not in text:
        file.write_text("{{ bos_token }}" + text)


def _own_template(processor: Any) -> Template | None:
    text = getattr(processor, "chat_template", None)
    parts = isinstance(text, str)
    if not parts:
        text = processor.tokenizer.chat_template
    if not isinstance(text, str):
        return None
    special = {k: v for k, v in processor.tokenizer.special_tokens_map.items() if type(v) is str}
    token = getattr(processor, "image_token", MARKER)
    return Template(name=OWN, text=text, image_token=token, special_tokens=special, parts=parts)


def _ends(own: Template, tokenizer: Any) -> bool:
    """Whether each of two answers ends with a special token."""
    answers = [
        text
        for text, supervised in own.render([("human", "a"), ("gpt", "b")] * 2)
        if supervised and text.strip()
    ]
    return len(answers) == 2 and all(
        any(answer.rstrip().endswith(token) for token in tokenizer.all_special_tokens)
        for answer in answers
    )
