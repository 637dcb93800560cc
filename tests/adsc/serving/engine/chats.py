"""Conversations of the HTTP tests, as OpenAI clients send them and as our template renders them."""

from __future__ import annotations

import base64
import io
from typing import Any

from tests.adsc.serving.engine.cases import Prompt, picture

PLAN = "2:1/4,6:0;pool=tiles"
"""Of the checkpoint that is served."""
Turns = list[tuple[str, str, tuple[int, ...]]]
"""Role, text, pictures."""


def chat(turns: Turns, new: int) -> dict[str, Any]:
    """A request of turns (role, text, pictures), greedy."""
    messages = []
    for role, text, pictures in turns:
        parts: list[dict[str, Any]] = []
        for number in pictures:
            file = io.BytesIO()
            picture(number).save(file, "PNG")
            url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
        messages.append({"role": role, "content": [*parts, {"type": "text", "text": text}]})
    return {
        "model": "tiny",
        "messages": messages,
        "max_tokens": new,
        "temperature": 0,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "return_token_ids": True,
    }


CHATS: list[Turns] = [
    [("user", "what is it", (0,))],
    [("user", "what is the big round shape", ())],
    [("user", "what colour", (1, 2))],
    [("user", "what is it", (3,)), ("assistant", "round", ()), ("user", "what colour", ())],
    [("user", "is this the corner", (4, 5, 6))],
    [("user", "what is in this picture", (7,))],
    [("user", "what", (8,)), ("assistant", "left", ()), ("user", "and this", (9,))],
    [("user", "what shape in the top left corner", (10, 11, 0, 1))],
]


def as_prompt(turns: Turns) -> Prompt:
    """What our template makes of it, worked out by hand."""
    text, pictures = "", []
    for role, words, numbers in turns:
        pictures += numbers
        marks = "<image>\n" * len(numbers)
        text += f"USER: {marks}{words} ASSISTANT:" if role == "user" else f" {words}</s>"
    return Prompt(text, tuple(pictures))
